"""A launcher of your own: engines that run with lower priority, so that the machine stays pleasant to work at.

    python examples/own_launcher.py

`Cluster` takes the class itself. By its dotted path, or as an entry point, it serves in config files and on the command
line, too:

    ipcluster start --engines=yourpackage.launchers.NiceEngineSetLauncher --NiceEngineSetLauncher.niceness=5

    [project.entry-points."ipclite.engine_launchers"]
    nice = "yourpackage.launchers:NiceEngineSetLauncher"
"""

from __future__ import annotations

import os
from typing import List

import ipclite as ipp
from ipclite.launchers import LocalEngineSetLauncher


class NiceEngineSetLauncher(LocalEngineSetLauncher):
    """Local engines under `nice`. Setting: c.NiceEngineSetLauncher.niceness (default: 10)."""

    def find_args(self) -> List[str]:
        """The command, as a list."""
        return ["nice", "-n", str(self.options.get("niceness", 10)), *super().find_args()]


if __name__ == "__main__":
    with ipp.Cluster(n=2, engines=NiceEngineSetLauncher) as rc:
        print("niceness of the engines:", rc[:].apply_sync(os.getpriority, os.PRIO_PROCESS, 0))
