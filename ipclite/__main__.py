"""`ipclite <role> ...`, also `python -m <package> <role> ...`: one entrance to the command lines of all roles."""

from __future__ import annotations

import sys
from importlib import import_module
from typing import List, Optional

from .config import PROGRAM, run_main, suggest, version
from .errors import EXIT_FAILURE, ConfigError

# Role -> its module, whose main() takes the remaining words, and what it does.
ROLES = {
    "cluster": (".ipcluster", "start, stop, list and watch clusters"),
    "controller": (".controller", "start a controller"),
    "engine": (".engine", "start engines"),
    "profile": (".profiles", "make, list and find profiles"),
    "db": (".dbtool", "look at the records of tasks"),
    "logger": (".logger", "show the log lines of processes on all hosts"),
    "doctor": (".doctor", "find out why something does not connect"),
    "completion": (".completion", "print a script that completes commands in your shell"),
}


def _dispatch(argv: List[str]) -> int:
    if not argv or argv[0] in ("-h", "--help", "--help-all"):
        print(f"usage: {PROGRAM} <role> [flags]\n")
        for role, (_, purpose) in ROLES.items():
            print(f"  {role:<12} {purpose}")
        print(f"\n{PROGRAM} <role> --help shows its flags.")
        return 0 if argv else EXIT_FAILURE
    if argv[0] == "--version":
        print(version())
        return 0
    if argv[0] not in ROLES:
        raise ConfigError(f"unknown role {argv[0]!r}; choose from {', '.join(ROLES)}{suggest(argv[0], ROLES)}")
    return int(import_module(ROLES[argv[0]][0], __package__).main(argv[1:]))


def main(argv: Optional[List[str]] = None) -> int:
    """`ipclite`: the command line."""
    return run_main(__package__ or PROGRAM, _dispatch, argv)


if __name__ == "__main__":
    sys.exit(main())
