"""How much later than a trivial job are engines ready that Slurm starts? Run as root where Slurm is installed.

    python -m bench.batch [--rounds N]

Each round submits an engine set and, right after it, a job that does nothing but leave a file, so that both wait for the same
turn of the scheduler, which comes once a second. What counts is the ratio of the times from the moment the scheduler
accepted them, each added up over all rounds: what the scheduler itself needs is in both.
"""

from __future__ import annotations

import argparse
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Dict, Generator, NamedTuple, Tuple

import ipclite as ipp

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "tests" / "services" / "slurm.sh"
NODES, CPUS = 3, 64
PATIENCE_S = 60
STORM, RATE = 50, 10.0  # jobs, and how many in a second


class Row(NamedTuple):
    """One line of the table: engines, settings of the launcher, and the most that the ratio may be."""

    label: str
    n: int
    settings: Dict[str, int]
    most: float


ROWS = [
    Row("4 engines in one job", 4, {}, 2.0),
    Row("4 engines, a job each", 4, {"engines_per_job": 1}, 2.0),
    Row("3 nodes, 1 engine each", NODES, {"engines_per_node": 1}, 2.0),
    Row("64 engines on one node", CPUS, {"engines_per_node": CPUS}, 3.0),
]


def free_ports(n: int) -> int:
    """The first of `n` ports in a row on which nobody listens, most likely."""
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return int(sock.getsockname()[1]) - n


def a_slurm() -> Generator[None, None, None]:
    """Slurm of our own for as long as the generator lives; our environment leads to it."""
    with tempfile.TemporaryDirectory(prefix="bench-slurm-") as state:
        os.chmod(state, 0o755)
        env = {**os.environ, "STATE": state, "SLURM_NODES": str(NODES), "SLURM_CPUS": str(CPUS),
               "SLURM_PORT": str(free_ports(NODES + 1))}
        try:
            subprocess.run([SCRIPT, "start"], env=env, check=True)
            os.environ["SLURM_CONF"] = f"{state}/slurm.conf"
            yield
        finally:
            subprocess.run([SCRIPT, "stop"], env=env, check=True)


def wait_for(path: Path) -> None:
    """Until a file is there."""
    deadline = time.monotonic() + PATIENCE_S
    while not path.exists():
        if time.monotonic() > deadline:
            sys.exit(f"a trivial job did not run in {PATIENCE_S} s")
        time.sleep(0.002)


def one_round(folder: Path, row: Row) -> Tuple[float, float]:
    """The time in s from accepted to engines ready, and that to the end of a trivial job."""
    cluster = ipp.Cluster(engines="slurm", config={"SlurmEngineSetLauncher": row.settings})
    cluster.start_controller_sync()
    try:
        with cluster.connect_client_sync() as client:
            cluster.start_engines_sync(row.n)
            engines_from = time.time()
            sign = folder / f"sign-{time.time_ns()}"
            subprocess.run(["sbatch", "--quiet", "--output=/dev/null", f"--wrap=touch {sign}"], check=True)
            trivial_from = time.time()
            client.wait_for_engines(row.n, timeout=PATIENCE_S)
            engines_s = time.time() - engines_from
            wait_for(sign)
            return engines_s, sign.stat().st_mtime - trivial_from
    finally:
        cluster.stop_cluster_sync()


def storm() -> float:
    """Jobs submitted in a second, as a ratio to the rate that was asked for."""
    settings = {"engines_per_job": 1, "submit_rate": RATE}
    cluster = ipp.Cluster(engines="slurm", config={"SlurmEngineSetLauncher": settings})
    cluster.start_controller_sync()
    try:
        begun = time.monotonic()
        cluster.start_engines_sync(STORM)
        return STORM / (time.monotonic() - begun) / RATE
    finally:
        cluster.stop_cluster_sync()


def tell(label: str, ratio: float, least: float, most: float) -> None:
    """Print a line of the table."""
    bound = f"{least:g} to {most:g}" if least else f"at most {most:g}"
    print(f"{label:<40}{ratio:>9.2f}   {bound}: {'met' if least <= ratio <= most else 'MISSED'}", flush=True)


def main() -> None:
    """Measure, print the table."""
    parser = argparse.ArgumentParser(description="From a job accepted by Slurm to engines ready.")
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    if os.geteuid() != 0 or not shutil.which("sbatch"):
        sys.exit(f"This needs root and Slurm; {SCRIPT.relative_to(ROOT)} install")
    slurm = a_slurm()
    next(slurm)
    try:
        with tempfile.TemporaryDirectory(prefix="bench-") as folder:
            os.environ.update(IPYTHONDIR=folder, IPCLITE_RUNTIME_DIR=f"{folder}/run")
            one_round(Path(folder), ROWS[0])  # Slurm's first job takes longer
            print(f"{'accepted to ready, to a trivial job':<40}{'ratio':>9}   target")
            for row in ROWS:
                ours, trivial = map(sum, zip(*(one_round(Path(folder), row) for _ in range(rounds))))
                tell(row.label, ours / trivial, 0.0, row.most)
            tell(f"{STORM} jobs, to the rate of {RATE:g}/s", storm(), 0.9, 1.05)
    finally:
        slurm.close()


if __name__ == "__main__":
    main()
