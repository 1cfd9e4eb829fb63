#!/bin/bash
# Installs the foreign vhost-user programs that tests talk to, and prints the directory of those
# that crates.io has as the last line of standard output. Usage: build.sh
#
# QEMU and qemu-storage-daemon are Debian's; vhost-device-rng and virtiofsd are built once and kept
# in ${XDG_CACHE_HOME:-~/.cache}/outrigger, by the hash of their versions and the compiler's. So is
# vhost-user-blk, which QEMU has in contrib/ and Debian in its source package only.
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

# Debian's sources, with a list and an index of their own: apt's are left as they are.
fetch_qemu_source() {
    local codename=$1 options
    mkdir -p lists/partial archives/partial
    printf 'deb-src [signed-by=%s] http://deb.debian.org/debian %s main\n' \
        /usr/share/keyrings/debian-archive-keyring.gpg "$codename" >sources.list
    options=(-qq -o "Dir::Etc::sourcelist=$PWD/sources.list" -o Dir::Etc::sourceparts=/dev/null
        -o "Dir::State::lists=$PWD/lists" -o "Dir::Cache=$PWD" -o APT::Sandbox::User=)
    apt-get "${options[@]}" update >&2
    apt-get "${options[@]}" source --download-only qemu >&2
    mkdir qemu
    tar -xf qemu_*.orig.tar.* -C qemu --strip-components 1 --wildcards '*/contrib/vhost-user-blk' \
        '*/subprojects/libvhost-user' '*/include/standard-headers' '*/include/qemu/*.h'
}

# Three files of C: neither QEMU's configuration nor its build system is needed for them, but for
# what its qemu/osdep.h includes.
build_vhost_user_blk() {
    cd "$temporary"
    fetch_qemu_source "$1"
    mkdir -p own/qemu
    printf '#include <%s.h>\n' assert errno fcntl glib inttypes stdbool stddef stdint stdio stdlib \
        string unistd sys/socket sys/uio sys/un >own/qemu/osdep.h
    echo '#include "compiler.h"' >>own/qemu/osdep.h
    cd qemu
    # shellcheck disable=SC2046 # pkg-config prints words
    gcc -O2 -w -D_GNU_SOURCE -I../own -Iinclude -Isubprojects/libvhost-user \
        -Isubprojects/libvhost-user/include $(pkg-config --cflags glib-2.0) -o ../vhost-user-blk \
        contrib/vhost-user-blk/vhost-user-blk.c subprojects/libvhost-user/libvhost-user.c \
        subprojects/libvhost-user/libvhost-user-glib.c $(pkg-config --libs glib-2.0) -lpthread
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
    rm -rf "$temporary"
fi
codename=$(. /etc/os-release && echo "$VERSION_CODENAME")
blk=$cache/vhost-user-blk-$({ echo "$codename" && declare -f fetch_qemu_source build_vhost_user_blk; } |
    sha256sum | cut -c 1-16)
if [ ! -e "$blk" ]; then
    echo "build.sh: building vhost-user-blk" >&2
    install_packages libglib2.0-dev pkg-config gcc libc6-dev
    temporary=$(mktemp -d "$cache/building-blk.XXXXXX")
    trap 'rm -rf "$temporary"' EXIT
    trap 'exit 1' HUP INT TERM
    (build_vhost_user_blk "$codename")
    mv -T "$temporary/vhost-user-blk" "$blk"
fi
ln -sfn "$blk" "$peers/bin/vhost-user-blk"
echo "$peers/bin"
