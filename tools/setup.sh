#!/bin/bash
# Installs from Debian's packages what building, testing and running need, on Debian 12. When nothing is missing it does
# nothing and asks the network nothing. The machine's apt configuration is left as it is.
set -euo pipefail
# shellcheck source=tools/apt.sh
. "$(dirname "$0")/apt.sh"

RUST_AT_LEAST=1.90 # rust-version in Cargo.toml; Debian 12's own rustc is 1.63

as_root() { if ((EUID == 0)); then "$@"; else sudo "$@"; fi; }
# DEBIAN_FRONTEND through env: sudo drops it.
apt_install() { as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends "$@"; }
removed_by() { apt-get -s -q=2 install --no-install-recommends "$@" | awk '/^Remv/ { print $2 }'; }

recent_rust() {
    local version
    command -v cargo >/dev/null && version=$(rustc --version 2>/dev/null | awk '{ print $2 }') &&
        dpkg --compare-versions "$version" ge $RUST_AT_LEAST
}

# ── What is missing ──
missing=()
need() { [[ -e $1 ]] || command -v "$1" >/dev/null || missing+=("${@:2}"); }
need cc gcc
need c++ g++ # libFuzzer
need /usr/lib/x86_64-linux-gnu/libc.a libc6-dev # for static binaries
need make make
need git git
need mmdebstrap mmdebstrap
need fakeroot fakeroot
need newuidmap uidmap # mmdebstrap as an ordinary user
need mke2fs e2fsprogs
need ip iproute2 # the tests of tap interfaces
need depmod kmod
need cpio cpio
need python3 python3 # Xen's checker of streams, in the tests
need readelf binutils
need setpriv util-linux
need zstd zstd
need xz xz-utils
need python3 python3 # the validator of migration streams that comes with Xen
need /etc/ssl/certs/ca-certificates.crt ca-certificates
need /usr/share/keyrings/debian-archive-keyring.gpg debian-archive-keyring

rust=()
if ! recent_rust; then
    rust=(rustc-web cargo-web)
    # The lints of .ci/run; they conflict with nothing that rustc-web does not replace anyway.
    rust+=(rust-web-clippy rustfmt-web)
fi
qemu=()
command -v qemu-system-x86_64 >/dev/null || qemu=(qemu-system-x86)

# An ordinary user's mmdebstrap needs a range of user ids to map.
if ((EUID != 0)) && ! grep -qs "^$(id -un):" /etc/subuid; then
    first=$(awk -F: '{ end = $2 + $3; if (end > max) max = end } END { print max < 100000 ? 100000 : max }' /etc/subuid /etc/subgid 2>/dev/null)
    range=$first-$((first + 65535))
    say "giving $(id -un) the subordinate ids $range"
    as_root usermod --add-subuids "$range" --add-subgids "$range" "$(id -un)"
fi

((${#missing[@]} + ${#rust[@]} + ${#qemu[@]})) || exit 0
say "installing: ${missing[*]} ${rust[*]} ${qemu[*]}"
command -v apt-get >/dev/null || die "this is no Debian: install these yourself, then run again"
((EUID == 0)) || command -v sudo >/dev/null || die "sudo is needed to install them. Hint: run $0 once as root"
as_root apt-get update -q || say "some package lists could not be renewed; going on with those there are"

((${#missing[@]})) && apt_install "${missing[@]}"

if ((${#rust[@]})); then
    # Only Debian's older Rust may make way for the newer one.
    other=$(removed_by "${rust[@]}" | grep -vE '^(rustc|cargo|rustfmt|rust-clippy|libstd-rust-.*)$' || true)
    [[ -z $other ]] || die "Debian's rustc-web would remove $other. Hint: install Rust $RUST_AT_LEAST or newer yourself and put it in PATH"
    apt_install "${rust[@]}"
    recent_rust || die "$(command -v rustc) is older than $RUST_AT_LEAST and comes first in PATH. Hint: put /usr/bin before it"
fi

if ((${#qemu[@]})); then
    if [[ -n $(removed_by "${qemu[@]}") ]]; then
        # Debian 12's own QEMU would push out the newer qemu-utils that this machine has: take the QEMU that goes with those
        # from backports, by an apt configuration that is gone afterwards.
        version=$(dpkg-query -W -f '${Version}' qemu-utils)
        tmp=$(mktemp -d)
        trap 'as_root rm -rf "$tmp"' EXIT
        private_apt "$tmp/apt"
        options=("${APT[@]}" -o "Dir::State::status=/var/lib/dpkg/status")
        package="qemu-system-x86"
        [[ -z $(apt-cache "${options[@]}" madison $package | awk -v v="$version" '$3 == v') ]] || package+="=$version"
        qemu=("${options[@]}" -t bookworm-backports "$package")
        removed=$(removed_by "${qemu[@]}")
        [[ -z $removed ]] || die "installing QEMU would remove $removed. Hint: install qemu-system-x86 yourself, then run again"
    fi
    apt_install "${qemu[@]}"
fi
