"""A running cluster from Python and the shell: single engines, restarts, what queues and logs say, what stays of it."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import threading

import psutil
import pytest
from shell import Command, connection, controller, one_sentence, run, security
from support import eventually

import ipclite as ipp
from ipclite import config


class Mine(ipp.Cluster):
    """A subclass, as users make them."""


@pytest.fixture
def cluster(ipython_dir):
    """A cluster of two engines, and its client."""
    one = ipp.Cluster(n=2, cluster_id="")
    with one as rc:
        yield one, rc


# --- single engines


def test_one_engine_is_stopped(cluster):
    c, rc = cluster
    c.stop_engine_sync(0)
    eventually(lambda: rc.ids == [1])
    assert rc[1].apply_sync(abs, -1) == 1
    with pytest.raises(IndexError, match="no engine 7"):
        c.stop_engine_sync(7)


def test_one_engine_is_restarted(cluster):
    c, rc = cluster
    rc[:]["x"] = 1
    before = rc[:].apply_sync(os.getpid)
    c.restart_engine_sync(1)
    eventually(lambda: rc.ids == [0, 1] and rc[1].apply_sync(os.getpid) != before[1])
    assert rc[0]["x"] == 1 and rc[0].apply_sync(os.getpid) == before[0]
    assert rc[1].apply_sync(lambda: "x" in globals()) is False


def test_one_engine_is_interrupted(cluster):
    c, rc = cluster

    def wait():
        import time
        print("up", flush=True)
        time.sleep(60)
    running = [rc[i].apply_async(wait) for i in (0, 1)]
    eventually(lambda: all("up" in str(ar.stdout) for ar in running))
    c.signal_engine_sync(signal.SIGINT, 1)
    with pytest.raises(ipp.RemoteError):
        running[1].get(10)
    assert not running[0].done()
    rc.abort(running[0], interrupt=True)


def test_as_coroutines(cluster):
    c, rc = cluster

    async def work():
        await c.signal_engine(signal.SIGCONT, 0)
        await c.restart_engine(0)
        await c.stop_engine(1)
    asyncio.run(work())
    eventually(lambda: rc.ids == [0])


# --- the controller


@pytest.mark.keeps_files
def test_the_controller_is_restarted_and_the_engines_stay(ipython_dir):
    c = ipp.Cluster(n=2, controller_args=["--reuse", "--ping=300"], cluster_id="x").start_cluster_sync()
    try:
        with c.connect_client_sync() as rc:
            rc.wait_for_engines(2, timeout=20)
            pids = sorted(rc[:].apply_sync(os.getpid))
            rc[:]["kept"] = 5
        before = connection(ipython_dir, cluster_id="x")
        c.restart_controller_sync()
        after = connection(ipython_dir, cluster_id="x")
        assert before["pid"] != after["pid"] and before["secret_key"] == after["secret_key"]
        with c.connect_client_sync() as rc:
            rc.wait_for_engines(2, timeout=30)
            assert sorted(rc[:].apply_sync(os.getpid)) == pids and rc[:]["kept"] == [5, 5]
        assert ipp.Cluster.from_file(cluster_id="x").controller is not None
    finally:
        c.stop_cluster_sync()


def test_the_controller_is_restarted_with_new_engines(cluster):
    c, rc = cluster
    rc.close()
    c.restart_controller_sync()
    with c.connect_client_sync() as again:
        again.wait_for_engines(2, timeout=20)
        assert again[:].apply_sync(abs, -1) == [1, 1]


def test_callbacks(ipython_dir):
    c = ipp.Cluster(n=1)
    ended = threading.Event()
    told = []
    with c as rc:
        c.engine_set.on_stop(lambda data: (told.append(data), ended.set()))
        os.kill(c.engine_set.process.pid, signal.SIGKILL)
        assert ended.wait(20)
        assert "SIGKILL" in told[0]["reason"]
        eventually(lambda: rc.ids == [])


def test_arguments(ipython_dir):
    import logging

    lines = []
    log = logging.Logger("mine")
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    log.addHandler(handler)
    c = ipp.Cluster(n=1, send_engines_connection_env=True, delay=0.01, log=log, cluster_id="x",
                    config={"EngineLauncher": {"engine_args": ["--IPEngine.startup_command=x = 'by config'"]}})
    with c as rc:
        assert rc[0]["x"] == "by config"
        env = rc[0].apply_sync(lambda: json.loads(os.environ["IPP_CONNECTION_INFO"])["cluster_id"])
        assert env == "x"
        assert rc[0].apply_sync(os.getenv, "IPP_CLUSTER_ID") == "x"
        assert rc[0].apply_sync(os.getenv, "IPP_PROFILE_DIR") == str(c.profile_dir)
        assert any("Started the controller" in line for line in lines)
        text = (security(ipython_dir) / "cluster-x.json").read_text()
        assert connection(ipython_dir, cluster_id="x")["secret_key"] not in text, "no secret in the cluster file"


def test_from_file(ipython_dir):
    with pytest.raises(FileNotFoundError, match="There is no cluster file"):
        ipp.Cluster.from_file(cluster_id="nope")
    with Mine(n=1, cluster_id="x") as rc:
        found = ipp.Cluster.from_file(cluster_id="x")
        assert type(found).__name__ == "Mine" and found.running and not found.shutdown_atexit
        assert rc.ids == [0]


def test_manager_with_defaults(ipython_dir):
    for name in ("a", "b"):
        config.make_profile_dir(ipython_dir / f"profile_{name}")
    with ipp.Cluster(n=1, profile="a", cluster_id="x"):
        found = ipp.ClusterManager().load_clusters(init_default_clusters=True)
        assert sorted(found) == ["a:x", "b:"]
        assert found["a:x"].running and not found["b:"].running


# --- the shell


def test_signals_are_relayed(ipython_dir):
    listen = "import signal; got = []; signal.signal(signal.SIGUSR1, lambda *_: got.append('USR1'))"
    with Command("cluster", "start", "-n", "2") as started:
        started.says("2 engines are ready")
        with ipp.Client() as rc:
            rc[:].execute(listen, block=True)
            os.kill(started.pid, signal.SIGUSR1)
            eventually(lambda: rc[:]["got"] == [["USR1"]] * 2)


def test_status(ipython_dir, cluster):
    _, rc = cluster

    def wait():
        import time
        time.sleep(60)
    running = rc[0].apply_async(wait)
    waiting = rc[0].apply_async(abs, -1)
    rc[1].apply_sync(abs, -1)

    def rows():
        found = json.loads(run("cluster", "status", "--json").out)
        return {row["engine"]: row for row in found["engines"]}
    eventually(lambda: rows()[0]["tasks"] + rows()[0]["queue"] == 2)
    assert rows()[1]["completed"] == 1
    assert rows()[0]["host"] == socket.gethostname() and psutil.pid_exists(rows()[0]["pid"])
    lines = run("cluster", "status").out.splitlines()
    assert lines[0].split() == ["ENGINE", "HOST", "PID", "QUEUE", "TASKS", "COMPLETED"]
    assert len(lines) == 4 and re.match(r"0 tasks wait", lines[3])
    rc.abort([running, waiting], interrupt=True)
    one_sentence(run("cluster", "status", "--cluster-id=nope"), 12, "no controller of cluster 'nope' runs", "ipcluster list")


def test_logs(ipython_dir, cluster):
    _, rc = cluster

    def say(text):
        os.write(2, text.encode())
    rc[0].apply_sync(say, "one\ntwo\nthree\n")
    rc[1].apply_sync(say, "other\n")
    engine = run("cluster", "logs", "0", "-n", "2").out.splitlines()
    assert engine[0].startswith("==> engine 0: ") and engine[1:] == ["two", "three"]
    everything = run("cluster", "logs", "-n", "0").out
    assert all(text in everything for text in ("controller started", "one\ntwo", "other", "==> controller, pid "))
    with Command("cluster", "logs", "0", "1", "-f") as tail:
        tail.says("three")
        rc[1].apply_sync(say, "news\n")
        tail.says("[engine 1] news")
        assert tail.stop(signal.SIGINT) == 130
    one_sentence(run("cluster", "logs", "7"), 2, "There is no engine 7; there are 0, 1.")
    one_sentence(run("cluster", "logs", "--cluster-id=nope"), 12, "There are no logs of cluster 'nope'")


def test_a_cluster_of_another_host_is_listed(ipython_dir):
    assert run("cluster", "start", "-n", "1", "--daemonize").process.returncode == 0
    path = security(ipython_dir) / "cluster-.json"
    here = path.read_text()
    try:
        path.write_text(here.replace(json.dumps(socket.gethostname()), '"elsewhere"'))
        (row,) = json.loads(run("cluster", "list", "--json").out)
        assert (row["host"], row["engines"]) == ("elsewhere", 1)
        one_sentence(run("cluster", "stop"), 1, "runs on elsewhere; go there")
    finally:
        path.write_text(here)
        assert run("cluster", "stop").process.returncode == 0


def test_owner_and_controller_are_killed(ipython_dir):
    code = ("import ipclite as ipp, os, signal, sys\nrc = ipp.Cluster(n=1, cluster_id='x').start_and_connect_sync()\n"
            "print(rc.cluster.controller.process.pid, rc.cluster.engine_set.process.pid, flush=True)\nsignal.pause()")
    with Command(code=["-c", code]) as owner:
        pids = [int(pid) for pid in eventually(lambda: owner.out).split()]
        left = psutil.Process(pids[1])
        for pid in (owner.pid, *pids):
            os.kill(pid, signal.SIGKILL)
        owner.wait()
    eventually(lambda: not left.is_running() or left.status() == psutil.STATUS_ZOMBIE)
    assert {path.name for path in security(ipython_dir).iterdir()} == {
        "cluster-x.json", "ipcontroller-x-client.json", "ipcontroller-x-engine.json"}
    assert list((ipython_dir.parent / "run").iterdir())
    assert run("cluster", "clean").process.returncode == 0
    assert list(security(ipython_dir).iterdir()) == []
    assert list((ipython_dir.parent / "run").iterdir()) == []
    assert list((ipython_dir / "profile_default" / "log").iterdir()) == []


def test_a_killed_owner_leaves_no_cluster_file_anywhere(ipython_dir, tmp_path):
    code = ("import ipclite as ipp, signal, sys\nrc = ipp.Cluster(n=1, cluster_file=sys.argv[1]).start_and_connect_sync()\n"
            "print('ready', flush=True)\nsignal.pause()")
    with Command(code=["-c", code, str(tmp_path / "own.json")]) as owner:
        owner.says("ready")
        assert (tmp_path / "own.json").exists()
        owner.stop(signal.SIGKILL)
    eventually(lambda: not list(tmp_path.iterdir()), what="its controller removes it")


def test_engines_that_stay_are_found_again(ipython_dir):
    """`ipcluster engines --daemonize`, for a controller started by hand, and as one more set of a cluster."""
    def engines(n, *words):
        done = run("cluster", "engines", "-n", str(n), "--daemonize", *words)
        assert done.process.returncode == 0, done.err

    with controller(ipython_dir):
        engines(2)
        engines(1)
        (row,) = json.loads(run("cluster", "list", "--json").out)
        assert (row["engines"], row["engines_ready"], row["state"]) == (3, 3, "running"), row
        one_sentence(run("cluster", "start", "-n", "1"), 10, "already serves")
        with ipp.Client() as rc:
            assert len(rc.ids) == 3, "the start that failed did them no harm"
            assert run("cluster", "stop").out == "Stopped the default cluster.\n"
            eventually(lambda: not rc.ids)
        one_sentence(run("cluster", "stop"), 12, "There is no cluster file")
    assert run("cluster", "start", "-n", "1", "--daemonize", "--cluster-id=x").process.returncode == 0
    engines(2, "--cluster-id=x")
    (row,) = json.loads(run("cluster", "list", "--json").out)
    assert (row["engines"], row["engines_ready"]) == (3, 3), row
    assert len(json.loads((security(ipython_dir) / "cluster-x.json").read_text())["engines"]["sets"]) == 2
    assert run("cluster", "stop", "x", "--signal=SIGKILL").process.returncode == 0


def test_clean_spares_what_runs(ipython_dir):
    with Command("controller", "--cluster-id=dead") as boss:
        boss.says("controller started")
        boss.stop(signal.SIGKILL)
    with controller(ipython_dir, "--cluster-id=live"):
        connection(ipython_dir, cluster_id="live")
        assert run("cluster", "clean").process.returncode == 0
        assert sorted(path.name for path in security(ipython_dir).iterdir()) == [
            "ipcontroller-live-client.json", "ipcontroller-live-engine.json"]
        with ipp.Client(cluster_id="live") as rc:
            assert rc.ids == []


# --- two at once


def test_a_lock_of_a_dead_process_is_broken(ipython_dir):
    folder = ipython_dir / "profile_default" / "security"
    folder.mkdir(parents=True, mode=0o700)
    dead = {"host": socket.gethostname(), "pid": 2**22 - 1, "pid_start": "1"}
    (folder / "ipcontroller-lock").write_text(json.dumps(dead))
    with controller(ipython_dir):
        assert {path.name for path in folder.iterdir()} == {"ipcontroller-client.json", "ipcontroller-engine.json"}


def test_a_controller_on_another_host_is_left_alone(ipython_dir):
    with controller(ipython_dir, "--transport=tcp"):
        for role in ("client", "engine"):
            path = security(ipython_dir) / f"ipcontroller-{role}.json"
            path.write_text(json.dumps({**json.loads(path.read_text()), "host": "elsewhere"}))
        one_sentence(run("controller"), 10, "on elsewhere) already serves", "--cluster-id")
    with controller(ipython_dir):
        assert connection(ipython_dir)["host"] == socket.gethostname()


def test_many_at_once(ipython_dir):
    starts = [Command("cluster", "start", "-n", "1", "--daemonize") for _ in range(3)]
    starts += [Command("controller", "--cluster-id=by-hand", "--transport=ipc") for _ in range(3)]
    try:
        codes = sorted(start.wait() for start in starts[:3])
        assert codes == [0, 10, 10], [start.err for start in starts]
        eventually(lambda: sum(start.running() for start in starts[3:]) == 1)
        assert ipp.Cluster.from_file().running, "the file is the winner's"
    finally:
        for start in starts:
            start.stop()
        run("cluster", "stop")
    assert list(security(ipython_dir).iterdir()) == []


def test_open_files(ipython_dir):
    limited = ("import resource; resource.setrlimit(resource.RLIMIT_NOFILE, "
               "(64, resource.getrlimit(resource.RLIMIT_NOFILE)[1])); "
               "from ipclite.controller import main; main(['--transport=ipc'])")
    with Command(code=["-c", limited]) as boss:
        boss.says("controller started")
        hard = psutil.Process().rlimit(psutil.RLIMIT_NOFILE)[1]
        assert psutil.Process(boss.pid).rlimit(psutil.RLIMIT_NOFILE) == (hard, hard)
        assert f"open files up to {hard}" in boss.err
