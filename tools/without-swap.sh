#!/bin/bash
# without-swap.sh COMMAND…: runs it where its memory is never swapped out. A clone is refused on a machine with plaintext swap unless its
# QEMU can lock memory (10 and later, as root); Debian 12's own cannot, and Debian's installer makes such a swap.
set -euo pipefail
if [[ $(wc -l </proc/swaps) -gt 1 && -d /run/systemd/system ]] && command -v systemd-run >/dev/null; then
    user=--user
    ((EUID == 0)) && user=
    exec systemd-run $user --scope --quiet -p MemorySwapMax=0 -- "$@"
fi
exec "$@"
