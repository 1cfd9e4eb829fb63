#!/usr/bin/env bash
# Installs or builds what the tests need (Debian's packages and crates.io, nothing
# else), then runs everything. The summary is the test runner's own.
#
#   OUTRIGGER_SKIP_KVM=1   leave out what needs /dev/kvm; the summary counts it
#   OUTRIGGER_SEED=N       repeats a run of the chaos tests, which print their seeds
#   ./test.sh --long       kills and swaps device processes as often as is claimed:
#                          more than 1,000 kills, 100 swaps, 100 refused ones
set -euo pipefail
cd "$(dirname "$0")"

profile=default
case "${1:-}" in
--long)
    profile=long
    export OUTRIGGER_LONG=1
    ;;
"") ;;
*)
    echo "usage: ./test.sh [--long]" >&2
    exit 2
    ;;
esac

say() { printf '\n== %s\n' "$*"; }

command -v cargo >/dev/null || { echo "test.sh: cargo is missing; install Rust first (https://rustup.rs)" >&2; exit 1; }

# Programs that tests call, and the packages that have them.
missing=()
need() { command -v "$1" >/dev/null || missing+=("$2"); }
need ip iproute2
need e2fsck e2fsprogs
need nsenter util-linux
need setpriv util-linux
need gcc gcc
need objcopy binutils
need unshare util-linux
need python3 python3-minimal
need systemd-analyze systemd
need systemd-socket-activate systemd
if [ ${#missing[@]} -gt 0 ]; then
    say "installing ${missing[*]}"
    if [ "$(id -u)" != 0 ]; then
        echo "test.sh: as root: apt-get install ${missing[*]}" >&2
        exit 1
    fi
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends "${missing[@]}" >/dev/null
fi

skip=()
say "foreign vhost-user programs (built once, kept in the same place as the Linux guest)"
OUTRIGGER_PEERS=$(tests/peers/build.sh | tail -n 1)
export OUTRIGGER_PEERS
echo "$OUTRIGGER_PEERS"
if [ "${OUTRIGGER_SKIP_KVM:-}" = 1 ]; then
    say "tests that need /dev/kvm are left out (OUTRIGGER_SKIP_KVM=1)"
    # By test and not by binary, so that the summary counts them.
    skip=(-E 'not (binary(/^vm_/) and test(/./))')
else
    if ! [ -r /dev/kvm ] || ! [ -w /dev/kvm ]; then
        echo "test.sh: /dev/kvm is missing or not accessible; set OUTRIGGER_SKIP_KVM=1 to leave out what needs it" >&2
        exit 1
    fi
    say "the Linux guest (built once, kept in \${XDG_CACHE_HOME:-~/.cache}/outrigger)"
    OUTRIGGER_LINUX_GUEST=$(tests/guest/build.sh | tail -n 1)
    export OUTRIGGER_LINUX_GUEST
    echo "$OUTRIGGER_LINUX_GUEST"
fi

say "formatting and lints"
cargo fmt --check
cargo clippy --workspace --all-targets --locked --quiet -- -D warnings
(cd embedded-guest && cargo fmt --check && cargo clippy --locked --quiet --all-targets -- -D warnings)
RUSTDOCFLAGS="-D warnings" cargo doc --workspace --no-deps --locked --quiet

say "licences, versions and sources of the dependencies (deny.toml)"
cargo_deny=$(tests/cargo-deny.sh | tail -n 1)
cargo fetch --locked --quiet
"$cargo_deny" --offline check bans licenses sources

say "building"
cargo build --workspace --all-targets --locked --quiet

say "the embedded guest's own tests"
(cd embedded-guest && cargo test --locked --quiet)

say "documentation tests"
cargo test --workspace --doc --locked --quiet

say "all other tests"
if command -v cargo-nextest >/dev/null; then
    log=$(mktemp)
    trap 'rm -f "$log"' EXIT
    failed=0
    # What an earlier run left is no result of this one.
    rm -f "target/nextest/$profile/junit.xml"
    cargo nextest run --profile "$profile" --workspace --locked --no-fail-fast "${skip[@]}" 2>&1 | tee "$log" || failed=$?
    say "who served whom (docs/interop.md)"
    tests/interop.py "target/nextest/$profile/junit.xml" || failed=1
    # The runner's own words once more, where one looks for them.
    printf '\n'
    sed -n '/^ *Summary \[/,$p' "$log"
    exit "$failed"
fi
# Without cargo-nextest: cargo's own runner, one binary after the other.
if [ "${OUTRIGGER_SKIP_KVM:-}" = 1 ]; then
    echo "skipped: all of tests/tests/vm_*.rs"
fi
exec cargo test --workspace --lib --bins --tests --locked --no-fail-fast -- --test-threads=2
