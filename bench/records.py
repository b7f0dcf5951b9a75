"""What keeping records of tasks costs: the databases in turn, in one run.

    python -m bench.records [--tasks 40000] [--rounds 7] [--queued 1000000] [--restart 100000]

Prints no-op tasks per second, submitted one by one to 2 engines and gathered, with each database, and the ratio to NoDB of
the same round; what a queued task takes in the controller's memory, and what is left when all have been run; the time
from the start of a controller with many records to the first task that it has run, and from the kill of one with many
unfinished tasks to the next result. Exits with 1 if a target is missed.
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import sys
import tempfile
import time
from typing import Dict, List, Tuple

import psutil

import ipclite as ipp

TARGETS = {"NoDB": 1.0, "DictDB": 0.95, "SQLiteDB": 0.75}  # of the throughput with NoDB
MIB = 1 << 20


def rate(view, n: int) -> float:
    """No-ops per second."""
    gc.collect()
    start = time.perf_counter()
    results = [view.apply_async(abs, -i) for i in range(n)]
    assert [ar.get() for ar in results] == list(range(n))
    return n / (time.perf_counter() - start)


def throughput(n: int, rounds: int) -> Dict[str, List[float]]:
    """Rates of each database, round by round; in every second round the order is reversed."""
    found: Dict[str, List[float]] = {db: [] for db in TARGETS}
    for number in range(rounds):
        for db in list(TARGETS)[:: -1 if number % 2 else 1]:
            with ipp.Cluster(n=2, controller_args=[f"--IPController.db_class={db}"]) as rc:
                view = rc.load_balanced_view()
                rate(view, 5000)
                found[db].append(rate(view, n))
                print(".", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return found


def controller() -> psutil.Process:
    """The process of our cluster's controller."""
    return next(p for p in psutil.Process().children(recursive=True) if ".controller" in " ".join(p.cmdline()))


def memory(db: str, n: int) -> Dict[str, float]:
    """MiB of the controller: warm, with n tasks that wait for an engine, after they have run."""
    found = {}
    with ipp.Cluster(n=1, controller_args=[f"--IPController.db_class={db}"]) as rc:
        view = rc.load_balanced_view()
        rate(view, 10_000)
        process = controller()
        found["warm"] = process.memory_info().rss / MIB
        plug = rc[0].apply_async(time.sleep, 5 + n / 20_000)
        results = [view.apply_async(abs, -i) for i in range(n)]
        while sum(s["queue"] + s["tasks"] if isinstance(s, dict) else s for s in rc.queue_status().values()) < n:
            time.sleep(0.1)
        found["queued"] = process.memory_info().rss / MIB
        plug.get()
        rc.wait(results)
        del results
        time.sleep(3)  # the controller gives memory back with its heartbeats
        found["drained"] = process.memory_info().rss / MIB
    return found


def restart(n: int) -> float:
    """s from the start of a controller with n records to its first result."""
    args = ["--sqlitedb"]
    with ipp.Cluster(n=1, cluster_id="again", controller_args=args) as rc:
        rate(rc.load_balanced_view(), n)
    start = time.perf_counter()
    with ipp.Cluster(n=1, cluster_id="again", controller_args=args) as rc:
        assert rc[0].apply_sync(abs, -1) == 1
        return time.perf_counter() - start


def recovery(n: int) -> Tuple[float, float]:
    """(s that a plain start takes to its first result, s from the kill of a controller with n unfinished tasks to the next result)."""
    start = time.perf_counter()
    with ipp.Cluster(n=1, restart_controller=True, controller_args=["--sqlitedb"]) as rc:
        view = rc.load_balanced_view()
        assert view.apply_sync(abs, -1) == 1
        plain = time.perf_counter() - start
        results = [view.apply_async(time.sleep, 0.002) for _ in range(n)]
        rc.queue_status()
        time.sleep(1)  # so that all is on disk
        controller().kill()
        start = time.perf_counter()
        done = sum(ar.done() for ar in results)
        while sum(ar.done() for ar in results) < done + 10:
            time.sleep(0.01)
        return plain, time.perf_counter() - start


def main() -> int:
    """Measure, print, judge."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tasks", type=int, default=40_000)
    parser.add_argument("--rounds", type=int, default=7, help="0: do not measure throughput")
    parser.add_argument("--queued", type=int, default=1_000_000, help="0: do not measure memory")
    parser.add_argument("--restart", type=int, default=100_000, help="0: do not measure restarts")
    args = parser.parse_args()
    missed = False
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        os.environ.update(IPYTHONDIR=folder, IPCLITE_RUNTIME_DIR=folder + "/run")
        rates = throughput(args.tasks, args.rounds) if args.rounds else {}
        print(f"{'':<12}{'tasks/s':>12}{'to NoDB':>12}{'target':>12}")
        for db, found in rates.items():
            ratio = statistics.median(own / none for own, none in zip(found, rates["NoDB"]))
            missed |= ratio < TARGETS[db]
            print(f"{db:<12}{statistics.median(found):>12,.0f}{ratio:>12.3f}{TARGETS[db]:>12.2f}")
        if args.queued:
            print(f"\n{'MiB':<12}{'warm':>12}{'queued':>12}{'drained':>12}{'bytes/task':>12}")
        for db in TARGETS if args.queued else ():
            m = memory(db, args.queued)
            missed |= m["drained"] > m["queued"]
            print(f"{db:<12}{m['warm']:>12.1f}{m['queued']:>12.1f}{m['drained']:>12.1f}"
                  f"{(m['queued'] - m['warm']) * MIB / args.queued:>12.0f}")
        if args.restart:
            plain, again = recovery(args.restart)
            print(f"\n{again:.2f} s from the kill of a controller with {args.restart:,} unfinished tasks to the next result, "
                  f"{again / plain:.1f} times a plain start")
            print(f"\n{restart(args.restart):.2f} s from the start of a cluster with {args.restart:,} records to its first result")
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
