#!/bin/bash
# Builds the Linux test guest into the cache, unless it is there, and prints its directory as the
# last line of standard output. Usage: build.sh (README.md says more)
set -euo pipefail

here=$(dirname "$(realpath "$0")")
cache=${XDG_CACHE_HOME:-$HOME/.cache}/outrigger
kernel_inputs=(build-kernel.sh kernel.config patch-kernel.py)
guest_inputs=(build.sh fsx.rs init initramfs.list)
kernel_packages=(linux-source-6.1 gcc libc6-dev make flex bison bc libelf-dev xz-utils lz4 python3)
guest_packages=(busybox-static e2fsprogs)

fail() {
    echo "build.sh: $*" >&2
    exit 1
}

# shellcheck source=../packages.sh
. "$here/../packages.sh"

# The installed version of a package, else the one apt would install, else nothing.
version_of() {
    local state
    state=$(dpkg-query -W -f '${db:Status-Status} ${Version}' "$1" 2>/dev/null || true)
    case $state in
    "installed "*) echo "${state#* }" ;;
    *) apt-cache policy "$1" | sed -n '/(none)/d; s/^ *Candidate: //p' ;;
    esac
}

# Without a version there is no name for the result. A fresh machine knows no versions yet.
know_versions() {
    command -v apt-get >/dev/null || fail "needs Debian's apt-get: the kernel is linux-source-6.1"
    [ -n "$(version_of linux-source-6.1)" ] && return
    [ "$(id -u)" -ne 0 ] || apt-get update >&2
    [ -n "$(version_of linux-source-6.1)" ] ||
        fail "apt has no package linux-source-6.1 (Debian 12 has it; apt-get update may help)"
}

# key_of VERSION... -- FILE...: a short hash of both.
key_of() {
    local versions=()
    while [ "$1" != -- ]; do
        versions+=("$1")
        shift
    done
    shift
    { echo "${versions[*]}" && cd "$inputs" && sha256sum "$@"; } | sha256sum | cut -c 1-16
}

# publish TEMPORARY FINAL: the whole directory appears at once or not at all.
publish() {
    mv -T "$1" "$2"
}

build_kernel() {
    echo "build.sh: building the kernel, 5 to 10 minutes on 2 CPUs" >&2
    install_packages "${kernel_packages[@]}"
    mkdir "$temporary/work" "$temporary/kernel"
    "$inputs/build-kernel.sh" "$temporary/work" "$temporary/kernel" >&2
    publish "$temporary/kernel" "$kernel"
}

base_list() {
    sed "s|@INPUTS@|$inputs|" "$inputs/initramfs.list"
}

# mke2fs is a dynamic program: its libraries go where the loader looks without a configuration.
mke2fs_list() {
    local library
    echo "file /sbin/mke2fs $(realpath /sbin/mke2fs) 755 0 0"
    ldd /sbin/mke2fs | grep -o '/[^ ]*' | while read -r library; do
        case $library in
        */ld-linux*) echo "file /lib64/${library##*/} $(realpath "$library") 755 0 0" ;;
        *) echo "file /lib/${library##*/} $(realpath "$library") 644 0 0" ;;
        esac
    done
}

# The kernel's gen_init_cpio makes device nodes without being root.
make_cpio() {
    "$kernel/gen_init_cpio" - >"$1"
}

# The same system as a disk: the kernel mounts it with root=/dev/vda init=/init.
make_root() {
    local root=$temporary/root
    mkdir -p "$root"/{bin,dev,mnt,proc,tmp}
    cp /bin/busybox "$root/bin/"
    ln -s busybox "$root/bin/sh"
    cp "$inputs/init" "$root/"
    mke2fs -q -t ext4 -b 4096 -N 64 -J size=4 -E root_owner=0:0 -d "$root" "$1" 16M >&2
}

# Static, as the guest has no libraries.
build_fsx() {
    rustc --edition 2024 -O -C target-feature=+crt-static -C relocation-model=static \
        -C panic=abort -C strip=symbols -o "$temporary/fsx" "$inputs/fsx.rs" >&2
    echo "file /bin/fsx $temporary/fsx 755 0 0"
}

build_guest() {
    local out=$temporary/guest
    install_packages "${guest_packages[@]}"
    mkdir "$out"
    base_list | make_cpio "$out/initramfs-small.cpio"
    { base_list && mke2fs_list; } | make_cpio "$out/initramfs.cpio"
    { base_list && build_fsx; } | make_cpio "$out/initramfs-fsx.cpio"
    make_root "$out/root.ext4"
    ln "$kernel/vmlinux" "$kernel/bzImage" "$out/"
    publish "$out" "$guest"
}

main() {
    [ "$(uname -m)" = x86_64 ] || fail "builds on x86_64 only"
    know_versions
    mkdir -p "$cache"
    exec 9>"$cache/guest.lock"
    flock 9
    # Whoever holds the lock is alone here: what lies about is a killed run's.
    rm -rf "$cache"/building.*
    temporary=$(mktemp -d "$cache/building.XXXXXX")
    trap 'rm -rf "$temporary"' EXIT
    trap 'exit 1' HUP INT TERM

    # A copy, so that the key and the build see the same files.
    inputs=$temporary/inputs
    mkdir "$inputs"
    (cd "$here" && cp "${kernel_inputs[@]}" "${guest_inputs[@]}" "$inputs/")
    kernel=$cache/kernel-$(key_of "$(version_of linux-source-6.1)" -- "${kernel_inputs[@]}")
    guest=$cache/guest-$(key_of "${kernel##*/}" "$(version_of busybox-static)" \
        "$(version_of e2fsprogs)" "$(rustc --version)" -- "${guest_inputs[@]}")

    if [ ! -d "$guest" ]; then
        [ -d "$kernel" ] || build_kernel
        build_guest
    fi
    echo "$guest"
}

main
exit
