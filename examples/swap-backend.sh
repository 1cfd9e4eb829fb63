#!/usr/bin/env bash
# Boots the same guest on three disk back ends from three different projects, one after
# the other. Only the command that starts the back end differs.
#
#   examples/swap-backend.sh [--kernel FILE [runner options…]]
#
# Without --kernel it uses the embedded guest, which writes its disk, reads it back and
# verifies it. Needs qemu-storage-daemon (Debian: qemu-system-common).
set -euo pipefail
cd "$(dirname "$0")/.."

target=${CARGO_TARGET_DIR:-target}
bin=${OUTRIGGER_BIN:-$target/release}
if [ "${1:-}" = --kernel ] && [ $# -ge 2 ]; then
    guest=("$@")
elif [ $# -eq 0 ]; then
    cargo build --release --locked --quiet \
        --manifest-path embedded-guest/Cargo.toml --target-dir "$target/embedded-guest"
    guest=(--kernel "$target/embedded-guest/release/embedded-guest" --memory 64M
        --cmdline "job=main need=block")
else
    echo "swap-backend.sh: usage: swap-backend.sh [--kernel FILE [runner options…]]" >&2
    exit 2
fi

dir=$(mktemp -d)
pids=()
cleanup() {
    kill "${pids[@]}" 2>/dev/null || true
    wait 2>/dev/null || true
    rm -rf "$dir"
}
trap cleanup EXIT

# Waits until process $2 has created the socket $1.
await() { # SOCKET PID
    for _ in $(seq 200); do
        [ -S "$1" ] && return
        kill -0 "$2" 2>/dev/null || break
        sleep 0.05
    done
    echo "swap-backend.sh: no process listens on ${1##*/}" >&2
    exit 1
}

boot_on() { # NAME COMMAND…
    echo "== $1"
    shift
    "$@" &
    local back_end=$!
    pids+=("$back_end")
    await "$dir/disk" "$back_end"
    timeout 60 "$bin/vcpu-runner" "${guest[@]}" --log-level warn \
        --device "disk0,type=block,socket=$dir/disk" --platform "socket=$dir/platform"
    kill "$back_end" 2>/dev/null || true
    wait "$back_end" 2>/dev/null || true
    unset 'pids[-1]' # the kernel may reuse its id
    rm -f "$dir/disk"
}

truncate -s 64M "$dir/disk.img"
"$bin/device-platform" --socket-path "$dir/platform" --serial stdio --log-level warn </dev/null &
pids+=($!)
await "$dir/platform" $!

boot_on device-disk \
    "$bin/device-disk" --socket-path "$dir/disk" --blk-file "$dir/disk.img" --log-level warn
boot_on qemu-storage-daemon \
    qemu-storage-daemon --blockdev "driver=file,node-name=image,filename=$dir/disk.img" \
    --export "type=vhost-user-blk,id=disk,node-name=image,writable=on,addr.type=unix,addr.path=$dir/disk"
boot_on template-device \
    "$bin/template-device" "$dir/disk" 64
echo "the same guest passed on all three"
