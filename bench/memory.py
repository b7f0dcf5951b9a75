"""Whether memory stays flat: run many tasks, fetch and forget their results, and compare with the first ten thousand.

    python -m bench.memory [--tasks 1000000] [--engines 2]

Prints a table of the memory (RSS, and of it the part that is shared with nobody) of client, controller, agent and
engines after 10,000 tasks, at steps between, and at the end; exits with 1 if a process has grown by more than 10%.
Engines share most of their memory with their agent until they write to it, so that their own part grows while the whole
does not.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import tempfile
import time
from typing import Dict, List, Tuple

import psutil

import ipclite as ipp

FIRST = 10_000  # tasks after which everything is warm
STEPS = 4  # looks in between
BATCH = 1_000  # tasks under way at a time
GROWTH = 1.10  # what a process may have grown by
MIB = 1024 * 1024


def memory() -> Dict[str, Tuple[float, float]]:
    """(RSS, private part) in MiB of each process of our clusters, and of the client."""
    gc.collect()
    found = {"client": psutil.Process()}
    for process in psutil.Process().children(recursive=True):
        command = " ".join(process.cmdline())
        if ".controller" in command:
            found["controller"] = process
        elif ".engine" in command:
            found["agent" if process.children() else f"engine {process.pid}"] = process
    infos = {name: process.memory_full_info() for name, process in found.items()}
    return {name: (info.rss / MIB, info.uss / MIB) for name, info in infos.items()}


def run(view, n: int) -> None:
    """n tasks, fetched and forgotten."""
    for start in range(0, n, BATCH):
        results = [view.apply_async(abs, -i) for i in range(start, min(n, start + BATCH))]
        assert [ar.get() for ar in results] == list(range(start, min(n, start + BATCH)))


def measure(view, marks: List[int]) -> Dict[int, Dict[str, Tuple[float, float]]]:
    """{tasks done: memory}; `marks` are the numbers of tasks after which to look."""
    table: Dict[int, Dict[str, Tuple[float, float]]] = {}
    done = 0
    for mark in marks:
        run(view, mark - done)
        done = mark
        table[mark] = memory()
    return table


def main() -> int:
    """Measure, print, judge."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tasks", type=int, default=1_000_000)
    parser.add_argument("--engines", type=int, default=2)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        os.environ.update(IPYTHONDIR=folder, IPCLITE_RUNTIME_DIR=folder + "/run")
        started = time.monotonic()
        marks = sorted({FIRST, *[max(FIRST, args.tasks * i // STEPS) for i in range(1, STEPS + 1)]})
        with ipp.Cluster(n=args.engines) as rc:
            table = measure(rc.load_balanced_view(), marks)
    print(f"{'MiB after':<16}" + "".join(f"{mark:>16,}" for mark in marks) + f"{'growth':>10}")
    grown = False
    for name, (first, _) in table[marks[0]].items():
        last = table[marks[-1]][name][0]
        grown |= last > first * GROWTH
        cells = ["{:.1f} ({:.1f})".format(*table[mark][name]) for mark in marks]
        print(f"{name:<16}" + "".join(f"{cell:>16}" for cell in cells) + f"{last / first - 1:>10.1%}")
    print(f"{args.tasks:,} tasks in {time.monotonic() - started:.0f} s")
    return int(grown)


if __name__ == "__main__":
    sys.exit(main())
