#!/usr/bin/env bash
# Manual pages and shell completions of all commands, written by the commands themselves. man.sh BINARIES SHARE
set -euo pipefail
bin=$1 share=$2
mkdir -p "$share"/man/man1 "$share"/{bash-completion/completions,zsh/site-functions,fish/vendor_completions.d}
for command in dispvm-launch dispvm-savefile dispvm-qube dispvmd; do
    "$bin/$command" --generate man > "$share/man/man1/$command.1"
    "$bin/$command" --generate bash > "$share/bash-completion/completions/$command"
    "$bin/$command" --generate zsh > "$share/zsh/site-functions/_$command"
    "$bin/$command" --generate fish > "$share/fish/vendor_completions.d/$command.fish"
done
