#!/bin/bash
# dom0.sh RELEASEDIR OUTDIR: what a dom0 needs of us, as programs that need nothing of it: no loader, no library.
set -euo pipefail
die() { echo "error: $*" >&2; exit 1; }

release=$1 out=$2
mkdir -p "$out"
for name in dispvm-savefile dispvm-launch dispvm-qube dispvmd qvm qrexec-policy qrexec-client qrexec-policy-exec; do
    needs=$(readelf -W -l -d "$release/$name" | grep -E 'INTERP|NEEDED' || true)
    [[ -z $needs ]] || die "$release/$name is not static: $needs"
    cmp -s "$release/$name" "$out/$name" && continue
    cp "$release/$name" "$out/.$name.new"
    mv "$out/.$name.new" "$out/$name" # a running one stays as it is
done
