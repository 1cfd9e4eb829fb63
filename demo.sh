#!/usr/bin/env bash
# Builds outrigger and runs the main job: the embedded guest uses a disk, a
# network and a console, each served by a sandboxed process of its own. Needs
# Rust and access to /dev/kvm and /dev/net/tun; no root, no download but crates.
set -euo pipefail
cd "$(dirname "$0")"

command -v cargo >/dev/null || { echo "demo.sh: cargo is missing; install Rust first (https://rustup.rs)" >&2; exit 1; }
for device in /dev/kvm /dev/net/tun; do
    [ -e "$device" ] || { echo "demo.sh: $device does not exist on this host" >&2; exit 1; }
    [ -r "$device" ] && [ -w "$device" ] || { echo "demo.sh: this user may not open $device (often: join the group '$(stat -c %G "$device")')" >&2; exit 1; }
done

cargo build --release --quiet --locked \
    -p outrigger -p vcpu-runner -p device-disk -p device-net -p device-console -p device-platform
exec target/release/outrigger demo "$@"
