#!/usr/bin/env bash
# Manual pages and shell completions of all commands, written by the commands themselves. man.sh BINARIES SHARE
set -euo pipefail
bin=$1 share=$2
mkdir -p "$share"/man/man1 "$share"/{bash-completion/completions,zsh/site-functions,fish/vendor_completions.d}

# document NAME COMMAND…
document() {
    local name=$1
    shift
    "$@" --generate man > "$share/man/man1/$name.1"
    "$@" --generate bash > "$share/bash-completion/completions/$name"
    "$@" --generate zsh > "$share/zsh/site-functions/_$name"
    "$@" --generate fish > "$share/fish/vendor_completions.d/$name.fish"
}

for command in dispvm-launch dispvm-savefile dispvm-qube dispvmd qrexec-client qrexec-policy; do
    document "$command" "$bin/$command"
done
for tool in $("$bin/qvm" 2>&1 | sed -n 's/^tools: //p' | tr -d ,); do
    document "$tool" "$bin/qvm" "$tool"
done
