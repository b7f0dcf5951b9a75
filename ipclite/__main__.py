"""`python -m <package> <role> ...`: one entrance to the roles' command lines."""

from __future__ import annotations

import sys
from importlib import import_module
from typing import List

from .config import run_main, version
from .errors import EXIT_FAILURE, ConfigError

# Role -> its module, whose main() takes the remaining words, and what it does.
ROLES = {
    "cluster": (".cluster", "start, stop and list clusters"),
    "controller": (".controller", "start a controller"),
    "engine": (".engine", "start engines"),
}


def _dispatch(argv: List[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print(f"usage: python -m {__package__} <role> [flags]\n")
        for role, (_, purpose) in ROLES.items():
            print(f"  {role:<12} {purpose}")
        return 0 if argv else EXIT_FAILURE
    if argv[0] == "--version":
        print(version())
        return 0
    if argv[0] not in ROLES:
        raise ConfigError(f"unknown role {argv[0]!r}; choose from {', '.join(ROLES)}.")
    return int(import_module(ROLES[argv[0]][0], __package__).main(argv[1:]))


if __name__ == "__main__":
    sys.exit(run_main(__package__ or "", _dispatch))
