"""What this host, or the job that we run in, lets us have: CPUs, threads, GPUs and time.

    environment, /proc, /sys ──► available_cpus() ──► how many engines
                             └─► thread_limits(), gpus_of() ──► the environment of each engine
                             └─► job_end() ──► until when an engine takes tasks

Rules that hold here: what the user has set already stays; each answer says where it comes from.
"""

from __future__ import annotations

import math
import os
import subprocess
import time
from pathlib import Path
from typing import Mapping, NamedTuple, Optional

# Threads of the libraries that numerical code calls.
THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "BLIS_NUM_THREADS", "NUMEXPR_NUM_THREADS",
                    "VECLIB_MAXIMUM_THREADS", "RAYON_NUM_THREADS")
# When the job ends, in s since the epoch: what our batch scripts say, and what Slurm does.
END_VARIABLES = ("IPP_JOB_END_TIME", "SLURM_JOB_END_TIME")
WALLTIME_VARIABLES = ("PBS_WALLTIME",)  # s that the job may run, from about now
# The batch job that we run in.
JOB_VARIABLES = {"SLURM_JOB_ID": "Slurm", "PBS_JOBID": "PBS", "LSB_JOBID": "LSF", "JOB_ID": "Grid Engine"}
GPU_QUERY = ("nvidia-smi", "-L")
GPU_QUERY_S = 10.0


class Cpus(NamedTuple):
    """How many CPUs, and what says so."""

    n: int
    source: str


def available_cpus(environ: Mapping[str, str] = os.environ, root: str = "/") -> Cpus:
    """The CPUs that we may use: what Slurm gave each task, else our CPU affinity within the quota of our control group.

    Args:
        root: where /proc and /sys are.
    """
    given = environ.get("SLURM_CPUS_PER_TASK", "")
    if given.isdigit() and int(given):
        return Cpus(int(given), "SLURM_CPUS_PER_TASK")
    if hasattr(os, "sched_getaffinity"):
        cpus = Cpus(len(os.sched_getaffinity(0)), "the CPU affinity")
    else:
        cpus = Cpus(os.cpu_count() or 1, "the number of CPUs")
    quota = cgroup_quota(root)
    if quota is not None and quota < cpus.n:
        return Cpus(max(1, math.floor(quota)), "the CPU quota of the control group")
    return cpus


def cgroup_quota(root: str = "/") -> Optional[float]:
    """The CPUs that our control group, or one above it, may use in all; None if there is no limit (man 7 cgroups)."""
    limits = []
    try:
        lines = Path(root, "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        top = Path(root, "sys/fs/cgroup", "cpu" if controllers else "")
        folder = top / path.lstrip("/")
        for place in (folder, *folder.parents):
            limit = _quota_in(place)
            if limit is not None:
                limits.append(limit)
            if place == top:
                break
    return min(limits, default=None)


def _quota_in(folder: Path) -> Optional[float]:
    """The limit that one folder of a control group sets: `cpu.max` of version 2, or the two files of version 1."""
    try:
        if (folder / "cpu.max").exists():
            quota, period = (folder / "cpu.max").read_text().split()
        else:
            quota, period = ((folder / f"cpu.cfs_{name}_us").read_text().strip() for name in ("quota", "period"))
        return float(quota) / float(period) if quota not in ("max", "-1") else None
    except (OSError, ValueError, ZeroDivisionError):
        return None


def thread_limits(threads: int, environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """What to set so that numerical libraries use so many threads; what is set already stays."""
    return {name: str(threads) for name in THREAD_VARIABLES if name not in environ}


def visible_gpus(environ: Mapping[str, str] = os.environ) -> list[str]:
    """The GPUs that we may use, as `CUDA_VISIBLE_DEVICES` names them; all that the driver knows if it is not set."""
    if "CUDA_VISIBLE_DEVICES" in environ:
        return [name.strip() for name in environ["CUDA_VISIBLE_DEVICES"].split(",") if name.strip()]
    try:
        found = subprocess.run(GPU_QUERY, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=GPU_QUERY_S, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return [str(i) for i, line in enumerate(found.stdout.splitlines()) if line.startswith(b"GPU ")]


def gpus_of(rank: int, each: int, gpus: list[str]) -> str:
    """`CUDA_VISIBLE_DEVICES` of an engine: `each` of the GPUs, beginning anew when there are not enough for all.

    Args:
        rank: its number among the engines of this host, from 0.
    """
    return ",".join(dict.fromkeys(gpus[(rank * each + i) % len(gpus)] for i in range(each))) if gpus else ""


def job_name(environ: Mapping[str, str] = os.environ) -> str:
    """What to call the batch job that we run in, as in "Slurm job 12"; "" if it is none."""
    return next((f"{title} job {environ[name]}" for name, title in JOB_VARIABLES.items() if environ.get(name)), "")


def job_end(lifetime_s: float, environ: Mapping[str, str] = os.environ, now: Optional[float] = None) -> Optional[float]:
    """When our time is over, in s since the epoch: after `lifetime_s` (0: not limited) or with the job, whatever comes
    first; None if nobody says."""
    now = time.time() if now is None else now
    ends = [now + lifetime_s] if lifetime_s else []
    for names, start in ((END_VARIABLES, 0.0), (WALLTIME_VARIABLES, now)):
        ends += [start + float(environ[name]) for name in names if environ.get(name, "").isdigit() and int(environ[name])]
    return min(ends, default=None)
