"""What every launcher keeps to: one contract, tried in each place. Fixtures look for what is left behind: processes, ports,
files, and jobs in the queue."""

from __future__ import annotations

import os
import signal
import threading

import pytest
from shell import Command, run
from support import eventually, is_running
from tasks import die, report_and_hold

import ipclite as ipp
from ipclite.errors import EngineError

SOON_S = 15  # much sooner than a heartbeat's or a grace period's end


def test_engines_are_ready_and_work(cluster):
    c, rc = cluster
    assert rc.ids == [0, 1, 2]
    assert len(set(rc[:].apply_sync(os.getpid))) == 3
    assert rc.load_balanced_view().map_sync(pow, range(20), [2] * 20) == [i * i for i in range(20)]
    assert c.engine_set.n == 3 and c.engine_set.running and c.running
    eventually(lambda: c.engine_set.status()["state"] == "running", SOON_S)
    again = ipp.Cluster.from_file(c.cluster_file).engine_set
    assert again.n == 3 and again.status()["state"] == "running"


def test_an_engine_that_dies_is_reported_and_the_others_work(place, cluster):
    c, rc = cluster
    with pytest.raises(EngineError, match="SIGKILL|signal 9|KILLED" if place.is_world else "SIGKILL"):
        rc[1].apply_async(die).get(SOON_S)
    if place.is_world:
        eventually(lambda: rc.ids == [] and not c.engine_set.running, SOON_S)
        return
    eventually(lambda: rc.ids == [0, 2], SOON_S)
    assert rc.load_balanced_view().map_sync(abs, [-1, 2, -3]) == [1, 2, 3]
    assert c.engine_set.running
    eventually(lambda: "SIGKILL" in c.engine_set.get_output(), SOON_S)


def test_engines_that_are_ended_from_outside_leave_at_once(place, cluster, tmp_path):
    c, rc = cluster
    told, ended = [], threading.Event()
    c.engine_set.on_stop(lambda data: (told.append(data), ended.set()))
    pids = rc[:].apply_sync(os.getpid)
    running = rc[0].apply_async(report_and_hold, str(tmp_path / "pid"), str(tmp_path / "never"))
    eventually((tmp_path / "pid").exists)
    place.cancel(c)
    with pytest.raises(EngineError):
        running.get(SOON_S)
    eventually(lambda: rc.ids == [], SOON_S)
    assert ended.wait(SOON_S) and place.says in told[0]["reason"]
    eventually(lambda: not any(map(_alive, pids)), SOON_S)
    with pytest.raises(ipp.LauncherError, match=place.says):
        c.wait_for_engines(rc, 3)


def _alive(pid):
    import psutil

    try:
        return is_running(psutil.Process(pid))
    except psutil.NoSuchProcess:
        return False


def test_a_signal_interrupts_what_runs(cluster, tmp_path):
    c, rc = cluster
    running = rc[:].apply_async(report_and_hold, str(tmp_path / "pids"), str(tmp_path / "never"))
    eventually(lambda: (tmp_path / "pids").exists() and len((tmp_path / "pids").read_text().split()) == 3)
    c.signal_engines_sync(signal.SIGINT)
    with pytest.raises(ipp.CompositeError) as e:
        running.get(SOON_S)
    assert [error.ename for error in e.value.elist] == ["KeyboardInterrupt"] * 3
    assert rc[:].apply_sync(abs, -1) == [1, 1, 1]


def test_output(cluster):
    c, rc = cluster

    def write(word):
        import os
        os.write(2, f"{word}, past Python\n".encode())
        print(word)

    ar = rc[1].apply_async(write, "hello")
    ar.get(SOON_S)
    assert ar.stdout == "hello\n"
    logs = c.profile_dir / "log"  # of each process one, in a file system that all hosts have
    eventually(lambda: any("hello, past Python" in path.read_text() for path in logs.iterdir()), SOON_S)


def test_engines_are_restarted(cluster):
    c, rc = cluster
    before = set(rc[:].apply_sync(os.getpid))
    c.restart_engines_sync()
    eventually(lambda: not any(map(_alive, before)), SOON_S)
    eventually(lambda: len(rc.ids) == 3 and not before & {row["pid"] for row in rc.engine_info().values()}, 30)
    assert rc[:].apply_sync(abs, -1) == [1, 1, 1]


def test_a_second_set_is_started_and_stopped(place, cluster):
    c, rc = cluster
    name = c.start_engines_sync(2)
    rc.wait_for_engines(5, timeout=60)
    c.stop_engines_sync(name)
    eventually(lambda: len(rc.ids) == 3, SOON_S)
    assert sorted(rc[:].apply_sync(abs, -1)) == [1, 1, 1]


def test_stopped_by_another_process_after_the_first_was_killed(place, ipython_dir):
    config = [f"--{section}.{key}={value}" for section, rows in place.config.items() for key, value in rows.items()]
    first = Command("cluster", "start", f"--engines={place.launcher}", "-n", "2", *config).says("2 engines are ready", 60)
    first.stop(signal.SIGKILL)
    run("cluster", "stop", timeout=60)  # some end by themselves, so that there may be nothing to stop
    assert "running" not in run("cluster", "list").out
