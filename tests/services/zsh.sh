#!/usr/bin/env bash
# The shell that one test types into.
#   zsh.sh install
set -euo pipefail
. "$(dirname "$0")/lib.sh"

case ${1:-} in
install) have zsh || install_packages zsh ;;
*) die "usage: zsh.sh install" ;;
esac
