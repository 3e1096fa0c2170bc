# Sourced: Debian's packages without touching the machine's apt configuration.
# shellcheck shell=bash

die() { echo "error: $*" >&2; exit 1; }
say() { echo ">> $*" >&2; }

# An ordinary user's PATH often lacks these (mke2fs, depmod, debugfs).
export PATH=$PATH:/usr/sbin:/sbin LC_ALL=C.UTF-8
# Guests and unpacked packages must not depend on the caller's.
umask 022

# Prints "URI SUITE" of each source of Debian's own that this machine has configured. The origin comes from the signed
# release file: other vendors have suites called "bookworm" too.
debian_sources() { # [apt option…]
    # shellcheck disable=SC2016  # the $(…) are apt's, not ours
    apt-get "$@" indextargets --format '$(ORIGIN) $(COMPONENT) $(REPO_URI) $(RELEASE)' 'Created-By: Packages' |
        awk '$1 == "Debian" && $2 == "main" { print $3, $4 }' | sort -u
}

# Sets APT to the options of a private apt that knows Debian 12's main, updates, security and backports from the mirrors
# that this machine uses, with lists, cache and (empty) package status of its own under DIR. Needs no privileges.
# The lists are renewed when older than a day.
private_apt() { # DIR
    local dir=$1 uri suite keyring=/usr/share/keyrings/debian-archive-keyring.gpg from=()
    mkdir -p "$dir/lists/partial" "$dir/cache/archives/partial"
    chmod 755 "$dir" # apt reads as a user of its own when it runs as root
    APT=(-o "Dir::Etc::sourcelist=$dir/sources.list" -o Dir::Etc::sourceparts=/dev/null
        -o Dir::Etc::preferences=/dev/null -o Dir::Etc::preferencesparts=/dev/null
        -o "Dir::State::lists=$dir/lists" -o "Dir::Cache=$dir/cache" -o "Dir::State::status=$dir/status"
        -o APT::Sandbox::User=root -o Acquire::Retries=3 -o APT::Get::List-Cleanup=false -q=2)
    [[ -n $(find "$dir/fresh" -mtime -1 2>/dev/null) ]] && return

    if [[ -z $(debian_sources) ]]; then # never updated, as in a fresh container: read the same sources into lists of our own
        mkdir -p "$dir/host-lists/partial"
        from=(-o "Dir::State::lists=$dir/host-lists" -o "Dir::Cache=$dir/cache")
        apt-get "${from[@]}" -o APT::Sandbox::User=root -q=2 update || true # a third party's source may fail
    fi
    [[ -r $keyring ]] && keyring="[signed-by=$keyring] " || keyring=
    : >"$dir/status"
    debian_sources "${from[@]}" | while read -r uri suite; do
        case $suite in
        bookworm) printf 'deb %s%s %s main\n' "$keyring" "$uri" bookworm "$keyring" "$uri" bookworm-backports ;;
        bookworm-*) printf 'deb %s%s %s main\n' "$keyring" "$uri" "$suite" ;;
        esac
    done | sort -u >"$dir/sources.list"
    grep -q ' bookworm main' "$dir/sources.list" ||
        die "no source of Debian 12 (bookworm main) is configured in /etc/apt. Hint: add Debian's mirror there and run again"
    apt-get "${APT[@]}" update
    touch "$dir/fresh"
}

# Downloads packages with the private apt and unpacks them below DIR.
unpack_packages() { # DIR PACKAGE[=VERSION|/SUITE]…
    local dir=$1 debs deb
    shift
    mkdir -p "$dir"
    debs=$(mktemp -d "$dir.debs.XXXXXX")
    (cd "$debs" && apt-get "${APT[@]}" download "$@") || die "cannot download $* from the machine's Debian mirror"
    for deb in "$debs"/*.deb; do dpkg-deb -x "$deb" "$dir"; done
    rm -rf "$debs"
}
