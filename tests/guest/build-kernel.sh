#!/bin/bash
# Builds the test guest's kernel: build-kernel.sh WORK OUT
#   WORK  empty directory for the source tree and the objects (2 GB)
#   OUT   existing directory; gets vmlinux, bzImage, config, System.map and gen_init_cpio
# build.sh calls this with the packages installed and keeps the result.
set -euo pipefail

here=$(dirname "$(realpath "$0")")
work=$(realpath "$1")
out=$(realpath "$2")
tree=$work/linux-source-6.1
objects=$work/objects

tar -C "$work" -xf /usr/src/linux-source-6.1.tar.xz
"$here/patch-kernel.py" "$tree"

kmake() { nice make -s -C "$tree" O="$objects" -j"$(nproc)" "$@"; }

mkdir "$objects"
kmake KCONFIG_ALLCONFIG="$here/kernel.config" allnoconfig
# Kconfig drops a choice whose dependencies are not met without a word.
while IFS='=' read -r option value; do
    # An option that is off has no line with a value.
    if [ "$value" = n ]; then
        grep -q "^$option=" "$objects/.config" || continue
    else
        grep -qxF "$option=$value" "$objects/.config" && continue
    fi
    echo "build-kernel.sh: Kconfig did not take over $option=$value" >&2
    exit 1
done < <(grep ^CONFIG_ "$here/kernel.config")

kmake bzImage
strip -s -o "$out/vmlinux" "$objects/vmlinux"
cp "$objects/arch/x86/boot/bzImage" "$objects/System.map" "$objects/usr/gen_init_cpio" "$out/"
cp "$objects/.config" "$out/config"
