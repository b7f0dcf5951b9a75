"""What a host or job lets us have, as its environment and files tell."""

from __future__ import annotations

import os

import pytest

from ipclite import allocation
from ipclite.allocation import Cpus, available_cpus, cgroup_quota, gpus_of, job_end, thread_limits, visible_gpus

AFFINITY = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def group(root, lines, **files):
    """A /proc and /sys with the control groups of these lines; `files` are {"folder__file": content} below /sys/fs/cgroup."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text("".join(f"{line}\n" for line in lines))
    for name, content in files.items():
        path = root / "sys/fs/cgroup" / name.replace("__", "/").replace("_max", ".max").replace("cpu_cfs", "cpu.cfs")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return str(root)


def test_slurm_says_how_many_cpus_come_first(tmp_path):
    root = group(tmp_path, ["0::/"], cpu_max="50000 100000")
    assert available_cpus({"SLURM_CPUS_PER_TASK": "7"}, root) == Cpus(7, "SLURM_CPUS_PER_TASK")


def test_without_slurm_the_affinity_counts(tmp_path):
    assert available_cpus({}, str(tmp_path)).n == AFFINITY
    assert available_cpus({"SLURM_CPUS_PER_TASK": "x"}, str(tmp_path)).n == AFFINITY


def test_a_quota_below_the_affinity_counts(tmp_path):
    root = group(tmp_path, ["0::/job"], job__cpu_max="50000 100000")
    assert available_cpus({}, root) == Cpus(1, "the CPU quota of the control group")


@pytest.mark.parametrize("lines, files, quota", [
    ([], {}, None),
    (["0::/a/b"], {"cpu_max": "max 100000"}, None),
    (["0::/a/b"], {"a__cpu_max": "150000 100000", "a__b__cpu_max": "max 100000"}, 1.5),
    (["0::/a/b"], {"a__cpu_max": "150000 100000", "a__b__cpu_max": "300000 100000"}, 1.5),
    (["3:cpu,cpuacct:/a", "2:memory:/x"], {"cpu__a__cpu_cfs_quota_us": "250000\n", "cpu__a__cpu_cfs_period_us": "100000\n"}, 2.5),
    (["3:cpu,cpuacct:/a"], {"cpu__a__cpu_cfs_quota_us": "-1\n", "cpu__a__cpu_cfs_period_us": "100000\n"}, None),
    (["0::/a"], {"a__cpu_max": "garbage"}, None),
])
def test_the_quota_of_control_groups(tmp_path, lines, files, quota):
    assert cgroup_quota(group(tmp_path, lines, **files)) == quota


def test_no_control_groups(tmp_path):
    assert cgroup_quota(str(tmp_path)) is None


def test_threads_that_the_user_has_set_stay():
    limits = thread_limits(3, {"OMP_NUM_THREADS": "8"})
    assert "OMP_NUM_THREADS" not in limits and limits["MKL_NUM_THREADS"] == "3"


def test_gpus_are_those_that_we_may_see(monkeypatch):
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": "2, GPU-abc"}) == ["2", "GPU-abc"]
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": ""}) == []
    monkeypatch.setattr(allocation, "GPU_QUERY", ("echo", "GPU 0: x\nGPU 1: y"))
    assert visible_gpus({}) == ["0", "1"]
    monkeypatch.setattr(allocation, "GPU_QUERY", ("no-such-command",))
    assert visible_gpus({}) == []


@pytest.mark.parametrize("rank, each, gpus, seen", [
    (0, 1, ["4", "5"], "4"), (1, 1, ["4", "5"], "5"), (2, 1, ["4", "5"], "4"),
    (1, 2, ["0", "1", "2", "3"], "2,3"), (1, 2, ["0", "1", "2"], "2,0"), (0, 3, ["0"], "0"), (0, 1, [], ""),
])
def test_gpus_of_an_engine(rank, each, gpus, seen):
    assert gpus_of(rank, each, gpus) == seen


@pytest.mark.parametrize("lifetime, environ, end", [
    (0, {}, None), (60, {}, 1060), (0, {"SLURM_JOB_END_TIME": "1500"}, 1500), (60, {"SLURM_JOB_END_TIME": "1500"}, 1060),
    (0, {"PBS_WALLTIME": "30"}, 1030), (0, {"IPP_JOB_END_TIME": "1200", "SLURM_JOB_END_TIME": "1500"}, 1200),
    (0, {"SLURM_JOB_END_TIME": "Unknown"}, None), (0, {"SLURM_JOB_END_TIME": "0"}, None),
])
def test_the_end_of_the_job(lifetime, environ, end):
    assert job_end(lifetime, environ, 1000.0) == end
