"""`ipclite completion bash|zsh`: a script that completes our commands and their flags, made from `OPTIONS`.

    eval "$(ipclite completion bash)"

Zsh runs the same script by its `bashcompinit`.
"""

from __future__ import annotations

import sys
from typing import Dict, List, Optional

from . import config
from .errors import EXIT_FAILURE, ConfigError

SCRIPT = """{head}_ipclite_words() {{
    case "$1" in
{cases}    esac
}}

_ipclite_complete() {{
    local word="${{COMP_WORDS[COMP_CWORD]}}" before="${{COMP_WORDS[COMP_CWORD-1]}}"
    local path="${{COMP_WORDS[0]##*/}}" next
    [ "$word" = "=" ] && word=""
    [ "$before" = "=" ] && before="${{COMP_WORDS[COMP_CWORD-2]}}"
    case "$before" in
        --profile) COMPREPLY=($(compgen -W "$({program} profile list 2>/dev/null)" -- "$word")); return ;;
        {paths}) COMPREPLY=($(compgen -f -- "$word")); return ;;
    esac
    local i
    for ((i = 1; i < COMP_CWORD; i++)); do
        case "${{COMP_WORDS[i]}}" in -*|=) break ;; esac
        next="$path ${{COMP_WORDS[i]}}"
        [ -n "$(_ipclite_words "$next")" ] || break
        path="$next"
    done
    COMPREPLY=($(compgen -W "$(_ipclite_words "$path")" -- "$word"))
}}

complete -F _ipclite_complete {commands}
"""
ZSH = "autoload -U +X bashcompinit && bashcompinit\n\n"
SHELLS = {"bash": "", "zsh": ZSH}
# The names besides `ipclite <role>`.
COMMANDS = {"cluster": "ipcluster", "controller": "ipcontroller", "engine": "ipengine"}


def words_after() -> Dict[str, List[str]]:
    """`{"ipcluster start": what may follow}` for every beginning of a command line."""
    words: Dict[str, List[str]] = {config.PROGRAM: ["completion", "--help", "--version"],
                                   f"{config.PROGRAM} completion": list(SHELLS)}
    for role in config.PROGRAMS:
        flags = ["--help", "--help-all", "--version"]
        for option in config.options_of(role):
            takes = "" if option.kind == "switch" else "="
            flags += [flag if constant or not flag.startswith("--") else flag + takes
                      for flag, constant, _ in (word.partition("=") for word in option.flags.split())]
        first, _, second = role.partition(" ")
        words[config.PROGRAM] += [first] if first not in words[config.PROGRAM] else []
        for start in filter(None, (f"{config.PROGRAM} {first}", COMMANDS.get(first))):
            if second:
                words.setdefault(start, ["--help"]).append(second)
            words[f"{start} {second}".strip()] = sorted(flags)
    return words


def script(shell: str) -> str:
    """The script for a shell of `SHELLS`."""
    cases = "".join(f"        {start!r}) echo {' '.join(words)!r} ;;\n" for start, words in words_after().items())
    paths = sorted({word for option in config.OPTIONS if option.kind == "path" for word in option.flags.split()})
    return SCRIPT.format(head=SHELLS[shell], cases=cases, program=config.PROGRAM, paths="|".join(paths),
                         commands=" ".join([config.PROGRAM, *COMMANDS.values()]))


def _print_script(argv: List[str]) -> int:
    if argv == ["--version"]:
        print(config.version())
    elif not argv or argv[0] in ("-h", "--help", "--help-all"):
        print(f"Print a script that completes commands and flags.\n\nusage: {config.PROGRAM} completion bash|zsh\n\n"
              f"For bash, put this into ~/.bashrc; for zsh, into ~/.zshrc with zsh in place of bash:\n\n"
              f'  eval "$({config.PROGRAM} completion bash)"')
        return 0 if argv else EXIT_FAILURE
    elif argv[0] not in SHELLS or argv[1:]:
        raise ConfigError(f"unknown shell {argv[-1]!r}; choose from {', '.join(SHELLS)}.")
    else:
        print(script(argv[0]), end="")
    return 0


def main(argv: Optional[List[str]] = None) -> int:
    """`ipclite completion`: the command line."""
    return config.run_main(config.PROGRAM, _print_script, argv)


if __name__ == "__main__":
    sys.exit(main())
