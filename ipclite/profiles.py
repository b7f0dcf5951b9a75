"""`ipclite profile`: make, list and find profiles, the directories with the settings of clusters.

    profile create NAME ──► $IPYTHONDIR/profile_NAME/{security,pid,log} and commented config files
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import List, Optional

from . import config
from .errors import ConfigError


def _create(settings: config.Settings) -> int:
    folder = _folder(settings)
    if not settings["Profile.parallel"]:
        config.make_profile_dir(folder)
        print(f"The profile is {folder}")
        return 0
    for path in config.write_config_files(folder, settings["Profile.reset"]):
        print(f"Wrote {path}")
    print(f"The profile is {folder}")
    return 0


def _list(settings: config.Settings) -> int:
    folder = config.profile_path(None, None, settings["Application.ipython_dir"]).parent
    found = sorted(path.name[len("profile_"):] for path in folder.glob("profile_*") if path.is_dir())
    print("\n".join(found) if found else f"There are no profiles in {folder}.")
    return 0


def _locate(settings: config.Settings) -> int:
    folder = _folder(settings)
    if not folder.is_dir():
        config.no_such_profile(folder)
    print(folder)
    return 0


def _folder(settings: config.Settings) -> Path:
    """The profile's directory; its name may be given as a flag or by itself."""
    if len(settings.args) > 1 or (settings.args and settings["Application.profile"]):
        raise ConfigError(f"unexpected argument {settings.args[-1]!r}: give one profile. See --help")
    name = settings.args[0] if settings.args else settings["Application.profile"]
    return config.profile_path(name, settings["Application.profile_dir"], settings["Application.ipython_dir"])


COMMANDS = {"create": _create, "list": _list, "locate": _locate}


def _dispatch(argv: List[str]) -> int:
    return config.dispatch(f"{config.PROGRAM} profile", "Make, list and find profiles.",
                           {name: f"profile {name}" for name in COMMANDS},
                           lambda command, rest: COMMANDS[command](config.parse(f"profile {command}", rest)), argv)


def main(argv: Optional[List[str]] = None) -> int:
    """`ipclite profile`: the command line."""
    return config.run_main(config.PROGRAM, _dispatch, argv)


if __name__ == "__main__":
    sys.exit(main())
