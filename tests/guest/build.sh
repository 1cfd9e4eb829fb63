#!/bin/bash
# Builds the Linux test guest into the cache, unless it is there, and prints its directory as the
# last line of standard output: vmlinux (ELF with a PVH note), bzImage, initramfs.cpio.
# Usage: build.sh        (README.md says more)
set -euo pipefail

here=$(dirname "$(realpath "$0")")
cache=${XDG_CACHE_HOME:-$HOME/.cache}/outrigger
guest_packages=(busybox-static e2fsprogs)
kernel_packages=(linux-source-6.1 gcc libc6-dev make flex bison bc libelf-dev xz-utils lz4 python3)

fail() {
    echo "build.sh: $*" >&2
    exit 1
}

# The installed version of a package, else the one apt would install, else nothing.
version_of() {
    local version
    version=$(dpkg-query -W -f '${db:Status-Status} ${Version}' "$1" 2>/dev/null || true)
    case $version in
    "installed "*) echo "${version#* }" ;;
    *) apt-cache policy "$1" | sed -n 's/^ *Candidate: //p' | grep -v '(none)' || true ;;
    esac
}

install_packages() {
    local package missing=()
    for package in "$@"; do
        dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null | grep -qx installed ||
            missing+=("$package")
    done
    [ ${#missing[@]} -eq 0 ] && return
    [ "$(id -u)" -eq 0 ] || fail "these packages are missing, install them as root: ${missing[*]}"
    apt_install "${missing[@]}" >&2 || { apt-get update >&2 && apt_install "${missing[@]}" >&2; } ||
        fail "apt-get could not install: ${missing[*]}"
}

apt_install() {
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@"
}

# Names a build by its inputs: package versions and the files of this folder that go into it.
key_of() {
    local files=("$@")
    { printf '%s\n' "${versions[@]}" && cd "$here" && sha256sum "${files[@]}"; } |
        sha256sum | cut -c 1-16
}

# publish TEMPORARY FINAL: the whole directory appears at once or not at all.
publish() {
    chmod 755 "$1"
    mv -T "$1" "$2"
}

build_kernel() {
    local work=$temporary/work out=$temporary/kernel
    echo "build.sh: building the kernel, about 5 minutes on 2 CPUs" >&2
    install_packages "${kernel_packages[@]}"
    mkdir "$work" "$out"
    "$here/build-kernel.sh" "$work" "$out" >&2
    rm -rf "$work"
    publish "$out" "$kernel"
}

# The list for the kernel's gen_init_cpio, which makes device nodes without being root.
# mke2fs is a dynamic program: its libraries go where the loader looks without a configuration.
initramfs_list() {
    sed "s|@HERE@|$here|" "$here/initramfs.list"
    local library
    ldd /sbin/mke2fs | grep -o '/[^ ]*' | while read -r library; do
        case $library in
        */ld-linux*) echo "file /lib64/${library##*/} $(realpath "$library") 755 0 0" ;;
        *) echo "file /lib/${library##*/} $(realpath "$library") 644 0 0" ;;
        esac
    done
}

build_guest() {
    local out=$temporary/guest
    install_packages "${guest_packages[@]}"
    mkdir "$out"
    initramfs_list >"$temporary/list"
    "$kernel/gen_init_cpio" -t 0 "$temporary/list" >"$out/initramfs.cpio"
    ln "$kernel/vmlinux" "$kernel/bzImage" "$out/"
    publish "$out" "$guest"
}

command -v apt-get >/dev/null || fail "needs Debian's apt-get: the kernel is linux-source-6.1"
[ "$(uname -m)" = x86_64 ] || fail "builds on x86_64 only"
if [ -z "$(version_of linux-source-6.1)" ] && [ "$(id -u)" -eq 0 ]; then
    apt-get update >&2
fi
[ -n "$(version_of linux-source-6.1)" ] ||
    fail "apt knows no package linux-source-6.1 (Debian 12 has it; try apt-get update)"

versions=("linux $(version_of linux-source-6.1)")
kernel=$cache/kernel-$(key_of build-kernel.sh kernel.config patch-kernel.py)
versions+=("${kernel##*/}" "busybox $(version_of busybox-static)" "e2fsprogs $(version_of e2fsprogs)")
guest=$cache/guest-$(key_of build.sh init initramfs.list)

mkdir -p "$cache"
exec 9>"$cache/guest.lock"
flock 9
# Whoever holds the lock is alone here: a temporary directory is a killed run's.
rm -rf "$cache"/building.*
if [ ! -d "$guest" ]; then
    temporary=$(mktemp -d "$cache/building.XXXXXX")
    trap 'rm -rf "$temporary"' EXIT
    trap 'exit 1' HUP INT TERM
    [ -d "$kernel" ] || build_kernel
    build_guest
fi
echo "$guest"
