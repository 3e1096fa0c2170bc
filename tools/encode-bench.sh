#!/usr/bin/env bash
# Encoding and admission of the Debian guest's memory, as the launch benches have left it, beside `zstd` and `b3sum`.
set -euo pipefail
cd "$(dirname "$0")/.."
CARGO=${CARGO:-cargo}
command -v b3sum > /dev/null || [[ -x target/tools/bin/b3sum ]] || $CARGO install -q --root target/tools b3sum --version 1.8.2 --locked
image=$(ls -S target/bench/hot/*/memory.img | while read -r file; do
    # The Debian guest's is the one of 1 GiB.
    [[ $(stat -c %s "$file") == $((1 << 30)) ]] && echo "$file" && break
done)
PATH=$PWD/target/tools/bin:$PATH $CARGO bench -q -p engine --bench against_zstd -- \
    --image "$PWD/$image" --rounds 11 --keep "$PWD/benches/results/encode.jsonl"
