#!/usr/bin/env bash
# Does in plain shell what `outrigger run` does: starts a disk, an isolated network, a
# console on this terminal and the platform, each as a process that listens on a socket,
# and then the runner, which connects to them.
#
#   examples/launch.sh KERNEL DISK [runner options…]
#
# for example
#
#   examples/launch.sh vmlinux disk.img --initrd initramfs.cpio --memory 256M
set -euo pipefail

[ $# -ge 2 ] || { echo "usage: launch.sh KERNEL DISK [runner options…]" >&2; exit 2; }
kernel=$1 disk=$2
shift 2
bin=${OUTRIGGER_BIN:-$(dirname "$0")/../target/release}

dir=$(mktemp -d)
pids=()
cleanup() {
    kill "${pids[@]}" 2>/dev/null || true
    wait 2>/dev/null || true
    rm -rf "$dir"
}
trap cleanup EXIT

# Restarts a program until it exits successfully or cannot start, or until this function
# is terminated. The runner tries to connect to the socket's path until it succeeds.
keep() { # COMMAND…
    local pid='' code
    trap 'kill "$pid" 2>/dev/null; wait; exit' TERM
    while :; do
        "$@" <&0 &
        pid=$! code=0
        wait "$pid" || code=$?
        case $code in
        0) return ;;
        1 | 2) echo "failed" >&4; return ;; # it has reported the reason
        10) kill "$(cat "$dir/runner.pid")"; return ;; # the user quit the console (Ctrl-A x)
        esac
        echo "launch.sh: ${1##*/} ended with code $code" >&2
        sleep 0.1
    done
}

# Starts a device process. It writes a line to its --ready-fd when it is ready.
start() { # NAME PROGRAM ARGS…
    local name=$1 program=$2 ready=''
    shift 2
    mkfifo "$dir/$name.ready"
    # Opened for reading as well, because a restarted process also writes its line.
    exec 4<>"$dir/$name.ready"
    keep "$bin/$program" --socket-path "$dir/$name" --ready-fd 4 "$@" <&0 &
    pids+=($!)
    read -r -t 10 -u 4 ready || true
    [ "$ready" = ready ] || { echo "launch.sh: $program did not start" >&2; exit 1; }
}
# The control socket of the disk accepts commands such as {"command":"stats"}
# (docs/control.md).
start disk device-disk --blk-file "$disk" --control "$dir/disk.control"
start net device-net --isolated
start console device-console --stdio
start platform device-platform --serial null

"$bin/vcpu-runner" --kernel "$kernel" \
    --device "disk0,type=block,socket=$dir/disk" \
    --device "net0,type=net,socket=$dir/net" \
    --device "console0,type=console,socket=$dir/console" \
    --platform "socket=$dir/platform" \
    "$@" <&0 4>&- &
echo $! >"$dir/runner.pid"
wait $!
