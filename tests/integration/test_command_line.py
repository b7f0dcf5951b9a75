"""What a newcomer types, in one shell, two or three, and every way of ending it."""

from __future__ import annotations

import json
import os
import re
import signal
import socket

import psutil
import pytest
from shell import Command, connection, controller, one_sentence, run
from support import eventually

import ipclite as ipp

READY = "engines are ready"
SCRIPT = "import ipclite as ipp; rc = ipp.Client(); print(rc.ids, rc[:].apply_sync(lambda: 6 * 7)); rc.close()"


def files(ipython_dir):
    """What a cluster has written, logs aside."""
    return sorted(p.name for p in [*ipython_dir.rglob("security/*"), *ipython_dir.parent.glob("run/*")])


def test_two_shells(ipython_dir):
    with Command("cluster", "start", "-n", "2") as cluster:
        cluster.says(f"2 {READY}")
        script = run(code=["-c", SCRIPT])
        assert script.out == "[0, 1] [42, 42]\n", script.err
        listed = run("cluster", "list").out.splitlines()
        assert listed[0].split()[:4] == ["PROFILE", "CLUSTER", "ID", "STATE"]
        assert len(listed) == 2 and re.match(r"default +'' +running +2/2 +local", listed[1]), listed
        (row,) = json.loads(run("cluster", "list", "--output-format=json").out)
        shown = [row[key] for key in ("profile", "cluster_id", "state", "engines", "engines_ready")]
        assert shown == ["default", "", "running", 2, 2]
        stopped = run("cluster", "stop")
        assert (stopped.process.returncode, stopped.out) == (0, "Stopped the default cluster.\n")
        assert cluster.wait() == 0, cluster.err
    assert files(ipython_dir) == []
    assert len(run("cluster", "list").out.splitlines()) == 1


def test_what_start_prints_can_be_typed(ipython_dir):
    with Command("cluster", "start", "-n", "1", "--profile=mine", "--cluster-id=x") as cluster:
        cluster.says(READY)
        connect = re.search(r"Connect: +(.*)", cluster.out).group(1)
        assert run(code=["-c", f"{connect}; print(rc.ids); rc.close()"]).out == "[0]\n"
        stop = re.search(r"ipcluster stop(.*)", cluster.out).group(1).split()
        assert run("cluster", "stop", *stop).process.returncode == 0
        cluster.wait()


def test_daemonize(ipython_dir):
    start = run("cluster", "start", "-n", "2", "--daemonize")
    assert start.process.returncode == 0, start.err
    assert READY in start.out
    with ipp.Client() as rc:
        assert rc.ids == [0, 1]
        assert rc[:].apply_sync(abs, -1) == [1, 1]
    assert run("cluster", "stop").process.returncode == 0
    assert files(ipython_dir) == []


def test_who_keeps_the_engines_of_a_daemonized_cluster_stays_as_long_as_it(ipython_dir):
    start = run("cluster", "start", "-n", "2", "--daemonize", "--keep-engines")
    assert start.process.returncode == 0 and READY in start.out, start.err
    with ipp.Client() as rc:
        os.kill(rc[0].apply_sync(os.getppid), signal.SIGKILL)
        eventually(lambda: len(rc.ids) == 2 and not {0, 1} & set(rc.ids), what="others in their place")
        assert rc[:].apply_sync(abs, -1) == [1, 1]
    assert run("cluster", "stop").process.returncode == 0
    assert files(ipython_dir) == []
    log, = (ipython_dir / "profile_default" / "log").glob("ipcluster-*.log")
    eventually(lambda: "stopping the rest" in log.read_text(), what="the one that stayed ends")
    assert log.read_text().count("in place of those that are gone") == 1


def test_a_daemonized_cluster_that_fails_says_so(ipython_dir):
    broken_engines(ipython_dir)
    start = run("cluster", "start", "-n", "2", "--daemonize", "--restart-controller")
    assert start.process.returncode == 1 and "exited with code 1" in start.err
    assert files(ipython_dir) == []


def broken_engines(ipython_dir, text="raise SystemExit('no license for this')"):
    folder = ipython_dir / "profile_default"
    folder.mkdir(parents=True)
    (folder / "ipengine_config.py").write_text(text)


@pytest.mark.parametrize("daemonize", [(), ("--daemonize",)])
def test_engines_that_do_not_start_fail_the_start(ipython_dir, daemonize):
    broken_engines(ipython_dir, "c = get_config()\nc.IPEngine.startup_skript = 'x'\n")
    start = run("cluster", "start", "-n", "2", *daemonize)
    assert start.process.returncode == 1, start.err
    assert "Traceback" not in start.err
    assert "exited with code 2" in start.err and "last lines of its log" in start.err
    assert "did you mean startup_script?" in start.err, start.err
    assert READY not in start.out
    assert files(ipython_dir) == []


def test_engines_that_crash_fail_the_start(ipython_dir, tmp_path):
    (tmp_path / "cloudpickle.py").write_text("raise SystemExit('no license for this')\n")
    start = run("cluster", "start", "-n", "2", "--daemonize", env={"PYTHONPATH": str(tmp_path)})
    assert start.process.returncode == 1
    assert "no license for this" in start.err, start.err
    assert files(ipython_dir) == []


def test_engines_that_take_too_long_fail_the_start(ipython_dir, tmp_path):
    (tmp_path / "cloudpickle.py").write_text("import time; time.sleep(60)\n")
    start = run("cluster", "start", "-n", "2", "--daemonize", "--timeout=2", env={"PYTHONPATH": str(tmp_path)})
    assert start.process.returncode == 1
    assert "0 of 2 engines were ready after 2 s" in start.err, start.err
    assert files(ipython_dir) == []


def test_three_shells(ipython_dir):
    with Command("engine", "-n", "2") as engines:  # it waits for the controller's file
        engines.says("waiting: There is no file")
        with controller(ipython_dir):
            with ipp.Client(timeout=20) as rc:
                rc.wait_for_engines(2, timeout=20)
                assert rc[:].apply_sync(os.getppid) == [engines.pid] * 2
        assert engines.wait() == 0, engines.err  # nobody is left to serve
    assert files(ipython_dir) == []


def test_many_clusters_of_a_profile(ipython_dir):
    ids = ("", "one", "two")
    with Command("cluster", "start", "-n", "1") as a, Command("cluster", "start", "-n", "1", "--cluster-id=one") as b, \
            Command("cluster", "start", "-n", "1", "--cluster-id=two") as c:
        for command in (a, b, c):
            command.says(READY)
        pids = set()
        for cluster_id in ids:
            with ipp.Client(cluster_id=cluster_id) as rc:
                pids.add(rc[0].apply_sync(os.getpid))
        assert len(pids) == 3
        assert run("cluster", "stop", "one").out == "Stopped cluster 'one'.\n"
        b.wait()
        with ipp.Client(cluster_id="two") as rc:
            assert rc.ids == [0]
        assert run("cluster", "stop", "--all").process.returncode == 0
        a.wait(), c.wait()
    assert files(ipython_dir) == []


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_end_everything(ipython_dir, signum):
    with Command("cluster", "start", "-n", "2") as cluster:
        cluster.says(READY)
        assert cluster.stop(signum) == 0, cluster.err
        assert f"Got {signum.name}, stopping." in cluster.out
        assert "Traceback" not in cluster.err
    assert files(ipython_dir) == []
    with controller(ipython_dir) as boss, Command("engine", "-n", "2") as engines:
        engines_up(boss, 2)
        assert engines.stop(signum) == 0, engines.err
        assert "Traceback" not in engines.err
        assert psutil.Process(boss.pid).is_running()
    with Command("controller") as boss:
        boss.says("controller started")
        assert boss.stop(signum) == 0
        assert "Traceback" not in boss.err
    assert files(ipython_dir) == []


def engines_up(boss, n):
    with ipp.Client(timeout=20) as rc:
        rc.wait_for_engines(n, timeout=20)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_while_starting(ipython_dir, signum):
    with Command("cluster", "start", "-n", "2") as cluster:
        eventually(lambda: psutil.Process(cluster.pid).children(), what="something was started")
        assert cluster.stop(signum) == 128 + signum, cluster.err  # what was asked for did not come about
        assert "Traceback" not in cluster.err
    assert files(ipython_dir) == []
    with Command("engine", "-n", "2") as engines:
        engines.says("waiting")
        code = engines.stop(signum)
        assert code in (0, 130, -signum), (code, engines.err)
        assert "Traceback" not in engines.err


def test_a_controller_that_dies_ends_the_cluster(ipython_dir):
    with Command("cluster", "start", "-n", "1") as cluster:
        cluster.says(READY)
        os.kill(connection(ipython_dir)["pid"], signal.SIGKILL)
        assert cluster.wait() == 1
        assert "The controller was killed by SIGKILL; stopping the rest." in cluster.err
        assert "last lines of its log" in cluster.err and "controller started" in cluster.err
        assert "Traceback" not in cluster.err
    assert files(ipython_dir) == []


def test_a_killed_cluster_is_listed_and_cleaned(ipython_dir):
    assert run("cluster", "start", "-n", "1", "--daemonize").process.returncode == 0
    pid = connection(ipython_dir)["pid"]
    os.kill(pid, signal.SIGKILL)
    eventually(lambda: not psutil.pid_exists(pid))
    (row,) = json.loads(run("cluster", "list", "--output-format=json").out)
    assert row["state"] == "stopped" and f"pid {pid}" in row["reason"]
    one_sentence(run("cluster", "stop"), 11, "not running any more")
    assert files(ipython_dir) == []


def test_two_starts_race_for_one_id(ipython_dir):
    starts = [Command("cluster", "start", "-n", "1", "--daemonize") for _ in range(3)]
    codes = sorted(start.wait() for start in starts)
    try:
        assert codes == [0, 10, 10], [start.err for start in starts]
        with ipp.Client() as rc:
            assert rc.ids == [0]
    finally:
        run("cluster", "stop")
    assert files(ipython_dir) == []


def test_two_controllers_race_for_one_id(ipython_dir):
    rivals = [Command("controller") for _ in range(3)]
    try:
        eventually(lambda: sum(rival.running() for rival in rivals) == 1, what="one has won")
        winner = next(rival for rival in rivals if rival.running())
        winner.says("controller started")
        assert connection(ipython_dir)["pid"] == connection(ipython_dir, "engine")["pid"] == winner.pid
        for rival in rivals:
            if rival is not winner:
                one_sentence(rival, 10, "already serves")
    finally:
        for rival in rivals:
            rival.stop()
    assert files(ipython_dir) == []


def test_all_addresses(ipython_dir):
    with controller(ipython_dir, "--ip=*"), Command("engine"):
        info = connection(ipython_dir)
        assert info["url"].startswith(f"tcp://{socket.gethostname()}:")
        engines_up(None, 1)


def test_chosen_ports(ipython_dir):
    ports = []
    for _ in range(2):
        with socket.create_server(("127.0.0.1", 0)) as probe:
            ports.append(probe.getsockname()[1])
    with controller(ipython_dir, "--ip=127.0.0.1", f"--ports={ports[0]},{ports[1]}",
                    "--transport=tcp"), Command("engine"):
        urls = {connection(ipython_dir, role)["url"] for role in ("client", "engine")}
        assert urls == {f"tcp://127.0.0.1:{port}" for port in ports}
        engines_up(None, 1)


@pytest.mark.keeps_files
@pytest.mark.parametrize("flags", [("--ip=127.0.0.1", "--transport=tcp"), ("--transport=ipc",)])
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_engines_come_back_to_a_restarted_controller(ipython_dir, flags, how):
    with Command("controller", "--reuse", "--ping=500", *flags) as first, Command("engine", "-n", "2") as engines:
        first.says("controller started")
        engines_up(first, 2)
        keys = ("public_key", "secret_key", "server_key", "url")
        before = [connection(ipython_dir, role)[key] for role in ("client", "engine") for key in keys]
        first.stop(how)
        with Command("controller", "--reuse", "--ping=500", *flags) as second:
            second.says("controller started")
            assert [connection(ipython_dir, role)[key] for role in ("client", "engine") for key in keys] == before
            with ipp.Client(timeout=20) as rc:
                try:
                    rc.wait_for_engines(2, timeout=30)
                except TimeoutError as e:
                    logs = [path.read_text() for path in ipython_dir.rglob("ipengine-*.log")]
                    pytest.fail("\n".join([str(e), second.err, engines.err, *logs]))
                assert rc[:].apply_sync(os.getppid) == [engines.pid] * 2


@pytest.mark.parametrize("role", ["", "controller", "engine", "cluster", "cluster start", "cluster stop",
                                  "cluster list", "cluster engines", "cluster clean"])
def test_help_and_version(ipython_dir, role):
    for flag in ("--help", "-h"):
        shown = run(*role.split(), flag)
        assert (shown.process.returncode, shown.err) == (0, "")
        assert "usage: " in shown.out
    shown = run(*role.split(), "--version")
    assert (shown.process.returncode, shown.out, shown.err) == (0, f"{ipp.__version__}\n", "")
    assert list(ipython_dir.iterdir()) == [], "asking for help writes nothing"


def test_engines_alone(ipython_dir):
    with controller(ipython_dir), Command("cluster", "engines", "-n", "2") as more:
        more.says(READY)
        with ipp.Client() as rc:
            assert len(rc.ids) == 2
        assert more.stop(signal.SIGINT) == 0, more.err
        with ipp.Client() as rc:
            eventually(lambda: not rc.ids, what="its engines are gone")


def test_a_list_that_nobody_reads_to_its_end(ipython_dir):
    shown = run(code=["-c", "import os, subprocess, sys\nr, w = os.pipe(); os.close(r)\n"
                      "p = subprocess.run([sys.executable, '-m', 'ipclite', 'cluster', 'list'], stdout=w, stderr=-1)\n"
                      "print(p.returncode, p.stderr)"])
    assert "Traceback" not in shown.out and "Exception" not in shown.out, shown.out
