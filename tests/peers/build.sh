#!/bin/bash
# Installs the foreign vhost-user programs that tests talk to, and prints the directory of those
# that crates.io has as the last line of standard output. Usage: build.sh
#
# QEMU and qemu-storage-daemon are Debian's; vhost-device-rng and virtiofsd are built once and kept
# in ${XDG_CACHE_HOME:-~/.cache}/outrigger, by the hash of their versions and the compiler's.
set -euo pipefail

cache=${XDG_CACHE_HOME:-$HOME/.cache}/outrigger
crates=(vhost-device-rng@0.1.0 virtiofsd@1.14.0)
libraries=(libseccomp-dev libcap-ng-dev gcc libc6-dev)

fail() {
    echo "build.sh: $*" >&2
    exit 1
}

# shellcheck source=../packages.sh
. "$(dirname "$(realpath "$0")")/../packages.sh"

# qemu-system-x86 and qemu-utils have to be of one version. Where qemu-utils comes from
# bookworm-backports, so does the other.
install_qemu() {
    command -v qemu-system-x86_64 >/dev/null && command -v qemu-storage-daemon >/dev/null &&
        command -v qemu-img >/dev/null && return
    apt-get update -qq >&2 || true
    local release=()
    if dpkg-query -W -f '${Version}' qemu-utils 2>/dev/null | grep -q bpo12; then
        apt-cache policy | grep -q bookworm-backports || {
            [ "$(id -u)" -eq 0 ] || fail "add bookworm-backports to apt's sources, as root"
            echo 'deb http://deb.debian.org/debian bookworm-backports main' \
                >/etc/apt/sources.list.d/bookworm-backports.list
            apt-get update -qq >&2
        }
        release=(-t bookworm-backports)
    fi
    [ "$(id -u)" -eq 0 ] || fail "install as root: qemu-system-x86 qemu-utils"
    apt_install "${release[@]}" qemu-system-x86 qemu-utils
}

build_crates() {
    local crate
    for crate in "${crates[@]}"; do
        echo "build.sh: building $crate" >&2
        CARGO_TARGET_DIR=$temporary/target CARGO_PROFILE_RELEASE_LTO=off \
            CARGO_PROFILE_RELEASE_CODEGEN_UNITS=16 \
            cargo install --quiet --locked --root "$temporary/peers" "$crate" >&2
    done
}

install_qemu
mkdir -p "$cache"
exec 9>"$cache/peers.lock"
flock 9
peers=$cache/peers-$({ rustc --version && echo "${crates[*]}"; } | sha256sum | cut -c 1-16)
if [ ! -d "$peers" ]; then
    install_packages "${libraries[@]}"
    temporary=$(mktemp -d "$cache/building-peers.XXXXXX")
    trap 'rm -rf "$temporary"' EXIT
    trap 'exit 1' HUP INT TERM
    build_crates
    # The whole directory appears at once or not at all.
    mv -T "$temporary/peers" "$peers"
fi
echo "$peers/bin"
