#!/usr/bin/env bash
# Assembles one of the flat images in this directory and runs it with a runner and a
# platform process, whose debug console receives what the guest writes to port 0xf1.
# Prints the guest's output and exits with the runner's exit code.
#
#   examples/harness/run.sh real16|protected32|long64 [runner options…]
#
# for example
#
#   examples/harness/run.sh long64 --show-regs
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
bin=${OUTRIGGER_BIN:-$here/../../target/release}

case ${1:-} in
real16) bits=32 format=elf_i386 link=0 load=0xf0000 entry=real ;;
protected32) bits=32 format=elf_i386 link=0x100000 load=0x100000 entry=protected ;;
long64) bits=64 format=elf_x86_64 link=0x100000 load=0x100000 entry=long ;;
*) echo "usage: run.sh real16|protected32|long64 [runner options…]" >&2; exit 2 ;;
esac
name=$1
shift

dir=$(mktemp -d)
platform=
cleanup() {
    [ -z "$platform" ] || kill "$platform" 2>/dev/null || true
    wait
    rm -rf "$dir"
}
trap cleanup EXIT

# The image is only the text section, without a header or padding.
as --"$bits" -o "$dir/$name.o" "$here/$name.S"
ld -m "$format" -Ttext="$link" -e start -o "$dir/$name.elf" "$dir/$name.o"
objcopy -O binary -j .text "$dir/$name.elf" "$dir/$name.bin"

# The platform writes a line to its --ready-fd when it is ready.
mkfifo "$dir/ready"
"$bin/device-platform" --socket-path "$dir/platform" --ready-fd 3 \
    --serial null --debug-console "file=$dir/output" 3>"$dir/ready" &
platform=$!
read -r -t 10 _ <"$dir/ready" || { echo "run.sh: device-platform did not start" >&2; exit 1; }

code=0
"$bin/vcpu-runner" --load "$dir/$name.bin@$load" --entry "$entry" --memory 128M \
    --platform "socket=$dir/platform" --log-level warn "$@" || code=$?

# The file has all output once the platform has ended.
kill "$platform"
wait "$platform" || true
platform=
cat "$dir/output"
exit "$code"
