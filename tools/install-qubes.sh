#!/usr/bin/env bash
# What stands where Qubes has it: the default policy, and the programs that scripts look for in /usr/lib/qubes. Nothing that is there is
# touched. install-qubes.sh DESTDIR PREFIX
set -euo pipefail
cd "$(dirname "$0")/.."
root=$1 prefix=$2

# /etc/qubes-rpc/policy is what 35-compat.policy reads: without it every call would be refused.
install -d "$root/etc/qubes/policy.d/include" "$root/etc/qubes-rpc/policy" "$root/usr/lib/qubes"
(cd policy/defaults && find . -type f) | while read -r file; do
    to=$root/etc/qubes/policy.d/$file
    [[ -e $to ]] || install -m 644 "policy/defaults/$file" "$to"
done
# Services of dom0's that the stock client runs by their paths: a volume's data does not go over the API's socket.
for service in admin.vm.volume.Import 'admin.vm.volume.ImportWithSize --with-size'; do
    read -r name option <<< "$service"
    to=$root/etc/qubes-rpc/$name
    [[ -e $to ]] && continue
    # Under its name only when it is whole: one that is there is never touched again.
    printf '#!/bin/sh\nexec %s/bin/dispvmd import %s -- "$QREXEC_REQUESTED_TARGET" "$1"\n' "$prefix" "$option" > "$to.new"
    chmod 755 "$to.new"
    mv "$to.new" "$to"
done
for name in qrexec-client qfile-daemon-dvm; do
    to=$root/usr/lib/qubes/$name
    [[ -e $to || -L $to ]] || ln -s "$prefix/bin/$name" "$to"
done
