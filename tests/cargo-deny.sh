#!/bin/bash
# Builds cargo-deny from crates.io once and prints its path as the last line of standard
# output. It is kept in ${XDG_CACHE_HOME:-~/.cache}/outrigger, by the hash of its version
# and the compiler's.
set -euo pipefail

crate=cargo-deny@0.20.2
cache=${XDG_CACHE_HOME:-$HOME/.cache}/outrigger
mkdir -p "$cache"
exec 9>"$cache/cargo-deny.lock"
flock 9
program=$cache/cargo-deny-$({ rustc --version && echo "$crate"; } | sha256sum | cut -c 1-16)
if [ ! -e "$program" ]; then
    echo "cargo-deny.sh: building $crate" >&2
    temporary=$(mktemp -d "$cache/building-cargo-deny.XXXXXX")
    trap 'rm -rf "$temporary"' EXIT
    trap 'exit 1' HUP INT TERM
    # It runs for a second: the build is what has to be fast.
    CARGO_TARGET_DIR=$temporary/target CARGO_PROFILE_RELEASE_LTO=off \
        CARGO_PROFILE_RELEASE_OPT_LEVEL=1 CARGO_PROFILE_RELEASE_CODEGEN_UNITS=16 \
        cargo install --quiet --locked --root "$temporary/root" "$crate" >&2
    mv -T "$temporary/root/bin/cargo-deny" "$program"
fi
echo "$program"
