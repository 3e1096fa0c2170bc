#!/usr/bin/env bash
# The rows of Qubes' behaviour (docs/rows.tsv) and the tests that prove them: rows.sh [ID…] runs those tests and prints the table that
# docs/rows.md is.
#
# A test names its rows in the last line before #[test] (`/// Rows: L1, L5`), or begins its own name with them (`t4_t5_…`, `xen_l1_…`).
# One whose name begins with xen_ runs in a real Xen; others run on the embedded host, or need none.
set -euo pipefail
cd "$(dirname "$0")/.."

# Package, kind of target, target, test, host, ID: one line for each row of each test.
proofs() {
    local file package
    git ls-files '*.rs' | grep -E '(^|/)(src|tests)/' | while read -r file; do
        package=${file%%/*}
        awk -v package="$package" -v file="$file" '
            /^ *\/\/\/ Rows: / { rows = $0; sub(/.*Rows: /, "", rows); sub(/\.$/, "", rows) }
            /#\[test\]/ { test = 1; next }
            test && /fn [a-z0-9_]+\(/ {
                name = $0; sub(/.*fn /, "", name); sub(/\(.*/, "", name)
                prefix = name
                sub(/^xen_/, "", prefix)
                if (!rows) while (match(prefix, /^[ltnfs][0-9]_/)) {
                    rows = rows (rows ? ", " : "") toupper(substr(prefix, 1, 2)); prefix = substr(prefix, 4)
                }
                split(file, part, "/")
                kind = part[2] == "tests" ? "--test" : "--src"
                target = part[3]; sub(/\.rs$/, "", target)
                count = split(rows, ids, /, */)
                for (at = 1; at <= count; at++)
                    print package, kind, target, name, (name ~ /^xen_/ ? "Xen" : package == "fixtures" ? "QEMU" : "any"), ids[at]
                test = 0; rows = ""
            }' "$file"
    done
}

wanted=${*:-$(cut -f1 docs/rows.tsv)}
proofs=$(proofs | grep -wF "$(tr ' ' '\n' <<<"$wanted")" || true)
results=$(mktemp)
trap 'rm -f "$results"' EXIT
status=0
# Each test binary once, with the tests of it that are wanted.
while read -r package kind target; do
    [[ -n $package ]] || continue
    names=$(awk -v p="$package" -v k="$kind" -v t="$target" '$1 == p && $2 == k && (k == "--src" || $3 == t) { print $4 }' <<<"$proofs" | sort -u)
    [[ $kind == --src ]] && where=(--lib --bins) || where=(--test "$target")
    # shellcheck disable=SC2086
    "${CARGO:-cargo}" test --release -q -p "$package" "${where[@]}" -- --format=pretty $names >>"$results" 2>&1 || status=1
done < <(awk '{ print $1, $2, $2 == "--src" ? "-" : $3 }' <<<"$proofs" | sort -u)

echo '| ID | row | test | host | result |'
echo '|---|---|---|---|---|'
while IFS=$'\t' read -r id row; do
    grep -qw "$id" <<<"$wanted" || continue
    lines=$(awk -v id="$id" '$6 == id { print $1, $4, $5 }' <<<"$proofs")
    [[ -n $lines ]] || echo "| $id | $row | none yet | | |"
    while read -r package name host; do
        [[ -n $name ]] || continue
        result=$(grep -E "^test (.*::)?$name \.\.\. " "$results" | sed 's/.*\.\.\. //' | sort -u | tr '\n' ' ' || true)
        [[ ${result% } == ok ]] && result=passed || { result="**${result:-did not run}**"; status=1; }
        echo "| $id | $row | $package: \`$name\` | $host | $result |"
    done <<<"$lines"
done <docs/rows.tsv
[[ $status == 0 ]] || sed -n '/^failures:/,/^test result/p' "$results" >&2
exit $status
