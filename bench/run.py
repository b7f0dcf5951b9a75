"""Compare ipclite with raw pyzmq, with ProcessPoolExecutor and, when installed, with its peers, in one run.

    python -m bench.run [--quick | --full] [--peers] [--json FILE] [--systems A,B]

Systems take turns, round after round, each in a fresh process that has the machine for itself; a cell is the
median over the rounds. The engines are 2 for the timed rows and 4 for the first result and the idle cluster. What a
system leaves behind is ended and reported.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.metadata
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional

import psutil

from .peers import CORE, MIB, MODES, PEERS, SYSTEMS

ROOT = Path(__file__).resolve().parent.parent
TURN_S = 180  # a system that takes longer for one turn has failed
IDLE_S = 5  # over which the CPU of an idle cluster is measured
PR_SET_CHILD_SUBREAPER = 36

SIZES = {"call": 200, "submit": 10_000, "map": 100_000, "results": 200, "send": 64 * MIB,
         "executor": 10_000, "imap": 20_000, "chain": 1000, "everywhere": 1000}


class Row(NamedTuple):
    """One line of the table; `digits` after the point."""

    key: str
    label: str
    digits: int


ROWS = [
    Row("call", "round trip of a no-op [ms]", 2),
    Row("submit", "no-ops submitted one by one [tasks/s]", 0),
    Row("map", "map of no-ops [items/s] (1)", 0),
    Row("results", "200 results of 1 MiB [MiB/s]", 0),
    Row("send", "64 MiB to each of 2 engines [ms]", 0),
    Row("executor", "no-ops submitted to an Executor [tasks/s]", 0),
    Row("imap", "imap of no-ops [items/s]", 0),
    Row("chain", "chain of dependent no-ops [tasks/s]", 0),
    Row("everywhere", "no-ops to each of 8 engines [tasks/s]", 0),
    Row("first", "process start to first result of 4 [ms]", 0),
    Row("many", "process start to first result of 64 [ms] (3)", 0),
    Row("pss", "idle cluster of 4: memory (PSS) [MB]", 1),
    Row("processes", "  processes (2)", 0),
    Row("controllers", "  of these named controller", 0),
    Row("threads", "  threads", 0),
    Row("ports", "  listening TCP ports", 0),
    Row("cpu", "  CPU [% of one core]", 2),
    Row("import", "import [ms]", 1),
    Row("modules", "  modules loaded", 0),
    Row("entry", "import with its entry point [ms]", 1),
    Row("entry_modules", "  modules loaded", 0),
]
NOTES = """(1) 100,000 items, untuned; the executors with chunksize=1000. Slow peers get fewer tasks in these two rows.
(2) without the client's own process
(3) interpreters: 64 of Python, each of which imports pyzmq and cloudpickle and says hello"""


class Target(NamedTuple):
    """What ipclite should reach: row `key`, as a ratio to `other` or, without one, as it is."""

    text: str
    key: str
    other: Optional[str]
    least: Optional[float] = None
    most: Optional[float] = None


TARGETS = [
    Target("submitted tasks per second, to raw pyzmq", "submit", "raw pyzmq", least=0.5),
    Target("submitted tasks per second, to ProcessPool", "submit", "ProcessPool", least=4),
    Target("submitted tasks per second, to ipyparallel", "submit", "ipyparallel", least=50),
    Target("round trip, to raw pyzmq", "call", "raw pyzmq", most=1.5),
    Target("untuned map, to ProcessPool with chunksize=1000", "map", "ProcessPool", least=0.8),
    Target("first result of 4 engines, to ipyparallel", "first", "ipyparallel", most=0.1),
    Target("64 engines on one host, to 64 interpreters", "many", "interpreters", most=0.5),
    Target("controller processes", "controllers", None, most=1),
    Target("processes of a cluster of 4", "processes", None, most=1 + 2 + 4),
    Target("listening TCP ports of a local cluster", "ports", None, most=0),
    Target("memory of an idle cluster of 4 [MB]", "pss", None, most=80),
    Target("CPU of an idle cluster of 4 [%]", "cpu", None, most=1),
]

Cells = Dict[str, Dict[str, List[float]]]  # system -> row -> one value per round


class Failed(Exception):
    """A system did not do its turn."""


class Turn:
    """One child process measuring one system, in directories of its own; ends whatever it started."""

    def __init__(self, system: str, mode: str, *args: str):
        self.folder = tempfile.TemporaryDirectory(prefix="bench-")
        env = {**os.environ, "IPYTHONDIR": self.folder.name, "IPCLITE_RUNTIME_DIR": self.folder.name + "/run",
               "RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
        self.errors = tempfile.TemporaryFile(mode="w+")
        self.child = subprocess.Popen([sys.executable, "-m", "bench.peers", system, mode, *args], cwd=ROOT, env=env,
                                      text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors)
        self.alarm = threading.Timer(TURN_S, self.child.kill)
        self.alarm.start()
        self.left_behind = 0

    def line(self) -> str:
        """The next line that the child prints."""
        text = self.child.stdout.readline()
        if not text:
            self.child.wait()
            raise Failed(self._reason())
        return text

    def _reason(self) -> str:
        self.errors.seek(0)
        lines = [line for line in self.errors.read().splitlines() if line.strip()]
        return lines[-1] if lines else f"ended with exit code {self.child.returncode}"

    def __enter__(self) -> Turn:
        return self

    def __exit__(self, *exc: object) -> None:
        self.child.stdin.close()
        try:
            self.child.wait(60)
        except subprocess.TimeoutExpired:
            self.child.kill()
            self.child.wait()
        self.alarm.cancel()
        self.child.stdout.close()
        self.errors.close()
        self.left_behind = end_descendants()
        self.folder.cleanup()


def adopt_orphans() -> None:
    """Have processes whose parent ends become our children, so that none escapes the count (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def end_descendants(patience_s: float = 5) -> int:
    """Wait for what the last turn started to end, then end the rest by force.

    Returns:
        The number of processes that had to be ended.
    """
    left = psutil.Process().children(recursive=True)
    _, left = psutil.wait_procs(left, timeout=patience_s)
    for process in left:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(left, timeout=patience_s)
    return len(left)


def idle_cluster(child: psutil.Process) -> dict[str, float]:
    """What the cluster costs that `child` has started and leaves alone."""
    time.sleep(1)  # what starting it has left to do
    processes = child.children(recursive=True)
    before = _cpu_s(processes)
    time.sleep(IDLE_S)
    ports = {c.laddr.port for p in processes for c in p.net_connections("tcp") if c.status == psutil.CONN_LISTEN}
    return {
        "cpu": 100 * (_cpu_s(processes) - before) / IDLE_S,
        "pss": sum(getattr(p.memory_full_info(), "pss", 0) for p in processes) / 1e6,
        "processes": len(processes),
        "controllers": sum("controller" in " ".join(p.cmdline()) for p in processes),
        "threads": sum(p.num_threads() for p in processes),
        "ports": len(ports),
    }


def _cpu_s(processes: list[psutil.Process]) -> float:
    """CPU time of the processes, from the scheduler's clock where there is one: ticks of 10 ms hide a small cost."""
    total = 0.0
    for process in processes:
        try:
            clocks = [path.read_text() for path in Path(f"/proc/{process.pid}/task").glob("*/schedstat")]
        except OSError:  # a thread ended in between
            clocks = []
        total += sum(int(clock.split()[0]) for clock in clocks) / 1e9 if clocks else sum(process.cpu_times()[:2])
    return total


def measure(system: str, idle: bool) -> tuple[dict[str, float], int]:
    """One round of one system: its cells, and the processes that it left behind."""
    cells: dict[str, float] = {}
    left = 0
    modes = getattr(SYSTEMS[system], "modes", MODES)
    for mode in modes if idle else [mode for mode in modes if mode not in ("idle", "many")]:
        start = time.perf_counter()
        with Turn(system, mode, json.dumps(SIZES)) as turn:
            line = turn.line()
            if mode in ("first", "many"):
                cells[mode] = (time.perf_counter() - start) * 1e3
            elif mode == "idle":
                cells.update(idle_cluster(psutil.Process(turn.child.pid)))
            else:
                cells.update(json.loads(line))
        left += turn.left_behind
    return cells, left


def compare(systems: list[str], rounds: int, idle_rounds: int) -> tuple[Cells, list[str]]:
    """All rounds of all systems: the cells, and remarks on what went wrong."""
    cells: Cells = {system: {} for system in systems}
    remarks: list[str] = []
    for number in range(rounds):
        for system in list(cells):
            print(f"\rround {number + 1} of {rounds}: {system:<20}", end="", file=sys.stderr, flush=True)
            try:
                found, left = measure(system, idle=number < idle_rounds)
            except (Failed, psutil.Error) as e:
                remarks.append(f"{system} failed in round {number + 1}: {e}")
                continue
            for row, value in found.items():
                cells[system].setdefault(row, []).append(value)
            if left:
                remarks.append(f"{system} left {left} processes behind in round {number + 1}; they were ended")
    print("\r" + " " * 40 + "\r", end="", file=sys.stderr)
    return cells, remarks


def median(cells: Cells, system: str, row: str) -> Optional[float]:
    """The cell that the table shows, if it was measured."""
    values = cells.get(system, {}).get(row)
    return statistics.median(values) if values else None


def table(cells: Cells) -> str:
    """Rows by systems."""
    wide = max(len(row.label) for row in ROWS) + 2
    lines = [" " * wide + "".join(f"{system:>13}" for system in cells)]
    for row in ROWS:
        values = [median(cells, system, row.key) for system in cells]
        shown = ["-" if v is None else f"{v:,.{row.digits}f}" for v in values]
        lines.append(f"{row.label:<{wide}}" + "".join(f"{text:>13}" for text in shown))
    return "\n".join([*lines, NOTES])


def verdicts(cells: Cells) -> list[dict[str, Any]]:
    """Each target with what was reached."""
    found = []
    for target in TARGETS:
        value = median(cells, "ipclite", target.key)
        if target.other and value is not None:
            other = median(cells, target.other, target.key)
            value = value / other if other else None
        met = None if value is None else (
            (target.least is None or value >= target.least) and (target.most is None or value <= target.most))
        found.append({**target._asdict(), "value": value, "met": met})
    return found


def verdict_lines(found: list[dict[str, Any]]) -> str:
    """The targets as text."""
    lines = ["targets of ipclite"]
    for v in found:
        bound = f"at least {v['least']:g}" if v["least"] is not None else f"at most {v['most']:g}"
        word = {None: "-", True: "met", False: "MISSED"}[v["met"]]
        value = "not measured" if v["value"] is None else f"{v['value']:.3g}"
        lines.append(f"  {word:<7}{v['text']:<50}{value:>13}   ({bound})")
    return "\n".join(lines)


def machine(systems: list[str]) -> dict[str, Any]:
    """Where the figures come from."""
    versions = {}
    for name in ["pyzmq", "cloudpickle", "numpy", *(SYSTEMS[s].module for s in systems)]:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {"python": platform.python_version(), "platform": platform.platform(), "cores": psutil.cpu_count(),
            "usable_cores": len(psutil.Process().cpu_affinity()) if sys.platform == "linux" else psutil.cpu_count(),
            "memory_GB": round(psutil.virtual_memory().total / 1e9, 1), "versions": versions}


def main() -> None:
    """Measure, print the table and the targets, write the JSON."""
    parser = argparse.ArgumentParser(description="Compare ipclite with its peers and with raw pyzmq.")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--quick", action="store_true", help="5 rounds, with peers 3 (default)")
    length.add_argument("--full", action="store_true", help="9 rounds")
    parser.add_argument("--peers", action="store_true", help="also " + ", ".join(PEERS) + ", those that are installed")
    parser.add_argument("--systems", help="these only, separated by commas")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything measured")
    options = parser.parse_args()

    systems = options.systems.split(",") if options.systems else CORE + PEERS * options.peers
    unknown = set(systems) - set(SYSTEMS)
    if unknown:
        parser.error(f"no system {', '.join(sorted(unknown))}: choose from {', '.join(SYSTEMS)}")
    absent = [s for s in systems if importlib.util.find_spec(SYSTEMS[s].module) is None]
    adopt_orphans()
    started = time.time()
    rounds, idle_rounds = (9, 3) if options.full else (3 if options.peers else 5, 1)
    cells, remarks = compare([s for s in systems if s not in absent], rounds, idle_rounds)
    remarks += [f"{system} is not installed" for system in absent]
    where, found = machine(systems), verdicts(cells)
    print(f"{where['usable_cores']} cores, Python {where['python']}, "
          + ", ".join(f"{k} {v}" for k, v in where["versions"].items()) + "\n")
    print(table(cells) + "\n\n" + verdict_lines(found))
    print("".join(f"\n{remark}" for remark in remarks))
    if options.json:
        everything = {"started": started, "took_s": time.time() - started, "machine": where, "sizes": SIZES,
                      "cells": cells, "targets": found, "remarks": remarks}
        options.json.write_text(json.dumps(everything, indent=1) + "\n")


if __name__ == "__main__":
    main()
