"""Engines that are told how long they have, and what share of their host: they leave in time, and nothing is lost."""

from __future__ import annotations

import logging
import os
import signal
import sys
import time

import pytest
import tasks
from support import eventually

import ipclite as ipp
from ipclite.allocation import available_cpus

LEAVES_S = 2.0  # after its start
LIFETIME = f"--lifetime={LEAVES_S + 5:g}"  # engines leave 5 s before their end


def lines_of(path):
    return path.read_text().split() if path.exists() else []


def nap(seconds):
    time.sleep(seconds)
    return os.getpid()


def add(rc, *args):
    """Start another engine, with arguments; returns its id."""
    before = set(rc.ids)
    rc.cluster.start_engines_sync(1, engine_args=list(args))
    return eventually(lambda: set(rc.ids) - before, what="another engine").pop()


def test_engines_leave_before_their_time_is_over_and_their_work_goes_elsewhere(start):
    rc = start(n=1)
    leaving = add(rc, LIFETIME)
    view = rc.load_balanced_view()
    ars = []

    def has_left():
        ars.append(view.apply_async(nap, 0.02))
        return leaving not in rc.ids

    eventually(has_left, what="it leaves")
    assert len({ar.get(20) for ar in ars}) == 2
    assert {ar.attempt for ar in ars if ar.engine_id == leaving} == {1}
    view.apply_async(abs, -1).get(20)
    launcher = rc.cluster.engines["1"]
    assert launcher.join(20) and launcher.stop_data["exit_code"] == 0


def test_a_task_that_would_take_too_long_is_not_given_to_an_engine_that_leaves(start):
    rc = start(n=1)
    view = rc.load_balanced_view()
    view.apply_sync(nap, LEAVES_S)  # now it is known how long it takes
    pid = rc[0].apply_sync(os.getpid)
    add(rc, LIFETIME)
    assert view.map_sync(nap, [0.2] * 3) == [pid] * 3


def test_a_task_that_runs_when_the_job_ends_runs_again_elsewhere(start, tmp_path):
    report, flag = tmp_path / "report", tmp_path / "flag"
    rc = start(n=1, config={"EngineLauncher": {"engine_args": ["--lifetime=6.5", "--drain=1"]}})
    ar = rc.load_balanced_view().apply_async(tasks.report_and_hold, report, flag, "value")
    eventually(lambda: lines_of(report), what="it runs")
    add(rc, "--lifetime=0")
    eventually(lambda: lines_of(report)[1:], what="it runs again")
    flag.touch()
    assert ar.get(20) == "value" and ar.attempt == 2


@pytest.mark.parametrize("name", ["SIGUSR1", "SIGUSR2", "SIGXCPU"])
def test_engines_that_are_warned_of_preemption_finish_what_they_run_and_leave(start, tmp_path, name):
    report, flag = tmp_path / "report", tmp_path / "flag"
    rc = start(n=2)
    pids = rc[:].apply_sync(tasks.family)
    ar = rc[0].apply_async(tasks.report_and_hold, report, flag, "value")
    eventually(lambda: lines_of(report), what="it runs")
    for pid in {pid for pair in pids for pid in pair}:  # a batch system sends it to the whole job
        os.kill(pid, getattr(signal, name))
    eventually(lambda: rc.ids == [0], what="the idle one leaves")
    flag.touch()
    assert ar.get(20) == "value"
    eventually(lambda: rc.ids == [], what="the other one leaves")


def environment_of(rc, *names):
    return rc[:].apply_sync(lambda wanted: [os.environ.get(name) for name in wanted], names)


def test_each_engine_gets_its_share_of_threads_and_gpus(start, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "99")  # of one task, but the engines share what there is
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("MKL_NUM_THREADS", "9")
    rc = start(n=2, config={"EngineLauncher": {"engine_args": ["--gpus-per-engine=1"]}})
    threads = str(max(1, available_cpus({}).n // 2))
    assert sorted(environment_of(rc, "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "MKL_NUM_THREADS")) == [
        ["3", threads, "9"], ["5", threads, "9"]]


def test_threads_can_be_chosen_and_left_alone(start, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    rc = start(n=1, config={"EngineLauncher": {"engine_args": ["--threads=5"]}})
    add(rc, "--threads=0")
    assert environment_of(rc, "OMP_NUM_THREADS") == [["5"], [None]]


def test_a_cluster_has_as_many_engines_as_the_job_has_cpus_and_says_so(ipython_dir, monkeypatch, caplog):
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "3")
    caplog.set_level("INFO", "mine")
    with ipp.Cluster(log=logging.getLogger("mine")) as rc:
        assert len(rc) == 3
    assert "as many as SLURM_CPUS_PER_TASK allows" in caplog.text


def test_engines_that_leave_are_replaced_when_they_are_to_be_kept(start):
    rc = start(n=2, keep_engines=True, config={"EngineLauncher": {"engine_args": [LIFETIME]}})
    first = set(rc.ids)
    view = rc.load_balanced_view()
    ar = view.map_async(nap, [0.05] * 200)
    eventually(lambda: len(rc.ids) == 2 and not first & set(rc.ids), 40, "others in their place")
    assert len(ar.get(60)) == 200 and rc.cluster.size == 2
    assert len({rc.metadata[msg_id].engine_id for msg_id in ar.msg_ids}) > 2


def test_engines_that_are_killed_are_replaced_when_they_are_to_be_kept(start):
    rc = start(n=1, keep_engines=True)
    (engine, agent), = rc[:].apply_sync(tasks.family)
    os.kill(agent, signal.SIGKILL)
    eventually(lambda: rc.ids and 0 not in rc.ids, what="another in its place")
    assert rc[:].apply_sync(os.getpid) != [engine]


def test_engines_that_fail_at_once_are_not_replaced_for_ever(ipython_dir, caplog, monkeypatch):
    monkeypatch.setattr(ipp.cluster, "FAILURES_MAX", 1)
    caplog.set_level("INFO", "mine")
    cluster = ipp.Cluster(n=1, keep_engines=True, log=logging.getLogger("mine"), engine_timeout=20,
                          config={"EngineLauncher": {"engine_cmd": [sys.executable, "-c", "raise SystemExit(3)"]}})
    with pytest.raises(ipp.LauncherError, match="exited with code 3"):
        cluster.start_and_connect_sync()
    assert "not started again" in caplog.text
