#!/bin/bash
# Builds the fuzz targets and runs them: tools/fuzz.sh TARGET|all SECONDS, the seconds being what all targets take
# together.
#
# It needs no nightly compiler and no cargo-fuzz: the coverage that libFuzzer steers by comes from a pass which the stable
# compiler has. The flags go to the target's crates only, not to build scripts and macros, as --target is given.
# New inputs stand in target/fuzz/corpus/TARGET, what failed in target/fuzz/artifacts/TARGET.
set -euo pipefail
cd "$(dirname "$0")/.."

die() { echo "$0: $*" >&2; exit 2; }
(($# == 2)) && [[ $2 =~ ^[1-9][0-9]*$ ]] || die "usage: $0 TARGET|all SECONDS"
TRIPLE=x86_64-unknown-linux-gnu
OUT=target/fuzz
AT_A_TIME=2
LIMITS=(-rss_limit_mb=512 -malloc_limit_mb=64 -timeout=10)

targets=(fuzz/fuzz_targets/*.rs)
targets=("${targets[@]##*/}")
targets=("${targets[@]%.rs}")
if [[ $1 != all ]]; then
    [[ " ${targets[*]} " == *" $1 "* ]] || die "there is no target $1. Targets: ${targets[*]}"
    targets=("$1")
fi

COVERAGE="-Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 -Cllvm-args=-sanitizer-coverage-inline-8bit-counters
    -Cllvm-args=-sanitizer-coverage-pc-table -Cllvm-args=-sanitizer-coverage-trace-compares"
# The wrapper that links statically (.cargo/config.toml) is not for these.
RUSTFLAGS="--cfg fuzzing $(echo $COVERAGE) -Cdebug-assertions -Coverflow-checks" CARGO_BUILD_RUSTC_WORKSPACE_WRAPPER='' \
    "${CARGO:-cargo}" build --release --manifest-path fuzz/Cargo.toml --target $TRIPLE --target-dir $OUT

run() {
    local target=$1 seconds=$2 corpus=$OUT/corpus/$1 artifacts=$OUT/artifacts/$1 log=$OUT/$1.log status=0
    mkdir -p "$corpus" "$artifacts"
    # What the fuzzer finds goes to the first folder; the committed seeds are read only.
    "$OUT/$TRIPLE/release/$target" "${LIMITS[@]}" -max_total_time="$seconds" -artifact_prefix="$artifacts/" \
        -print_final_stats=1 "$corpus" "fuzz/corpus/$target" >"$log" 2>&1 || status=$?
    if ((status)); then
        tail -n 40 "$log"
        echo "$target: FAILED (its output is in $log, the input in $artifacts; see fuzz/README.md)"
        touch $OUT/failed
        return
    fi
    awk -v target="$target" '/^stat::number_of_executed_units/ { runs = $2 } / cov: / { sub(/.* cov: /, ""); cov = $1 }
        END { printf "%-16s %9d runs, %5d edges\n", target, runs, cov }' "$log"
}

seconds=$2
((${#targets[@]} == 1)) || seconds=$((($2 * AT_A_TIME + ${#targets[@]} - 1) / ${#targets[@]}))
rm -f $OUT/failed
for target in "${targets[@]}"; do
    if (($(jobs -r | wc -l) >= AT_A_TIME)); then wait -n || true; fi
    run "$target" "$seconds" &
done
wait
[[ ! -e $OUT/failed ]]
