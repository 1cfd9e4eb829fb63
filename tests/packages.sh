# Sourced by the scripts that install Debian packages. They define fail().

apt_install() {
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@" >&2
}

install_packages() {
    local package missing=()
    for package in "$@"; do
        dpkg-query -W -f '${db:Status-Status}\n' "$package" 2>/dev/null | grep -qx installed ||
            missing+=("$package")
    done
    [ ${#missing[@]} -gt 0 ] || return 0
    [ "$(id -u)" -eq 0 ] || fail "these packages are missing, install them as root: ${missing[*]}"
    apt_install "${missing[@]}" || { apt-get update >&2 && apt_install "${missing[@]}"; } ||
        fail "apt-get could not install: ${missing[*]}"
}
