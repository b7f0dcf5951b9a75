"""`ipcluster`, `ipcontroller` and `ipengine` as people run them: real processes, from the shell's side."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from support import cluster_files, eventually, our_ports, our_processes

import ipclite as ipp

ROOT = Path(ipp.__file__).parents[1]


def command(*words):
    """A command line of the package, started in a shell's way."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen([sys.executable, "-m", *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            env=env, start_new_session=True)


def run(*words):
    """(exit code, stdout, stderr) of a command that ends by itself."""
    with command(*words) as process:
        out, err = process.communicate(timeout=60)
    return process.returncode, out, err


def ipcluster(*words):
    return run("ipclite.cluster", *words)


@contextlib.contextmanager
def foreground(*words):
    """`ipcluster start` in a terminal of its own, ready."""
    with command("ipclite.cluster", "start", *words) as process:
        try:
            line = process.stdout.readline()
            assert "engines are ready" in line, process.communicate(timeout=10)
            yield process
        finally:
            if process.poll() is None:
                process.terminate()


@pytest.fixture
def daemon(ipython_dir):
    """A function that starts a cluster with --daemonize; it is stopped in the end."""
    ids = []

    def start(*words, cluster_id=""):
        code, out, err = ipcluster("start", "--daemonize", f"--cluster-id={cluster_id}", *words)
        assert code == 0, err
        ids.append(cluster_id)
        return out
    yield start
    for cluster_id in ids:
        if (ipython_dir / "profile_default" / "security" / f"cluster-{cluster_id}.json").exists():
            assert ipcluster("stop", cluster_id)[0] in (0, 11)


def test_one_terminal_and_a_script():
    with foreground("-n", "2") as process:
        with ipp.Client() as rc:
            assert rc.ids == [0, 1]
            assert rc[:].apply_sync(pow, 2, 5) == [32, 32]
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    assert process.returncode == 0 and "Got SIGINT, stopping." in out and "Traceback" not in err


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGHUP])
def test_other_signals_stop_it_too(signum, ipython_dir):
    before = set(our_processes())
    with foreground("-n", "2") as process:
        process.send_signal(signum)
        assert process.wait(30) == 0
    assert set(our_processes()) == before and not cluster_files(ipython_dir)


def test_interrupted_while_it_starts(ipython_dir):
    with command("ipclite.cluster", "start", "-n", "2") as process:
        eventually(lambda: list(ipython_dir.glob("*/security/cluster-.json")))
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=30)
        assert process.returncode in (0, 128 + signal.SIGINT)


def test_daemonize_list_engines_stop(daemon):
    ports = our_ports()
    out = daemon("-n", "2")
    assert "2 engines are ready" in out
    assert our_ports() == ports  # a local cluster opens none
    with ipp.Client() as rc:
        assert rc.ids == [0, 1]
        assert rc[0].apply_sync(os.getppid) != os.getppid()
    rows = json.loads(ipcluster("list", "-o", "json")[1])
    assert [(r["state"], r["engines_ready"], r["engines"]) for r in rows] == [("running", 2, 2)]
    code, out, err = ipcluster("engines", "-n", "1", "--daemonize")
    assert code == 0, err
    assert json.loads(ipcluster("list", "-o", "json")[1])[0]["engines_ready"] == 3
    code, _, err = ipcluster("start", "-n", "1")
    assert code == 10 and err == err.splitlines()[0] + "\n" and "already running" in err
    assert ipcluster("stop") == (0, "Stopped the default cluster.\n", "")
    code, _, err = ipcluster("stop")
    assert code == 12 and "There is no cluster file" in err


def test_several_clusters_of_a_profile(daemon):
    daemon("-n", "1", cluster_id="a")
    daemon("-n", "1", cluster_id="b")
    with ipp.Client(cluster_id="a") as a, ipp.Client(cluster_id="b") as b:
        assert a[0].apply_sync(os.getpid) != b[0].apply_sync(os.getpid)
    assert ipcluster("stop", "--all")[:2] == (0, "Stopped cluster 'a'.\nStopped cluster 'b'.\n")


def test_stop_from_another_terminal():
    with foreground("-n", "2") as process:
        assert ipcluster("stop")[0] == 0
        out, err = process.communicate(timeout=30)
    assert process.returncode == 0, err
    assert "stopping the rest" in out


def test_a_killed_controller_is_told(ipython_dir):
    with foreground("-n", "2") as process:
        with ipp.Client() as rc:
            assert rc.ids == [0, 1]
        os.kill(ipp.Cluster.from_file().controller.process.pid, signal.SIGKILL)
        out, err = process.communicate(timeout=30)
    assert process.returncode == 1
    assert "The controller was killed by SIGKILL" in err and "engine 1 connected" in err
    assert not cluster_files(ipython_dir)


def test_a_dead_daemon_is_listed_with_the_reason_and_replaced(daemon, ipython_dir):
    daemon("-n", "1")
    found = ipp.Cluster.from_file()
    os.kill(found.engine_set.process.pid, signal.SIGTERM)
    os.kill(found.controller.process.pid, signal.SIGTERM)
    eventually(lambda: not found.running)
    row, = json.loads(ipcluster("list", "-o", "json")[1])
    assert row["state"] == "stopped" and "it got SIGTERM" in row["reason"]
    daemon("-n", "1")
    assert json.loads(ipcluster("list", "-o", "json")[1])[0]["state"] == "running"


@pytest.mark.parametrize("words, reason", [
    (["--", "--ping=0"], "--ping needs a whole number above 0, not '0'."),
    (["--", "--nonsense"], "unknown flag --nonsense for ipcontroller"),
    (["--EngineLauncher.engine_args=['--nonsense']"], "unknown flag --nonsense for ipengine"),
    (["--EngineLauncher.engine_args=['-s', '/nowhere.py']"], "/nowhere.py"),
    (["--EngineLauncher.engine_cmd=['/nowhere/python']"], "/nowhere/python: No such file"),
])
def test_daemonize_tells_why_it_failed(words, reason, ipython_dir):
    code, out, err = ipcluster("start", "-n", "1", "--daemonize", "--quiet", *words)
    assert code == 1 and out == ""
    assert err.startswith("ipcluster: ") and reason in err and "Traceback" not in err
    assert not cluster_files(ipython_dir)


def test_a_port_in_use(ipython_dir):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        code, _, err = ipcluster("start", "-n", "1", "--daemonize", "--quiet", "--", f"--ports={port}")
    assert code == 1 and str(port) in err and "Traceback" not in err


def test_a_log_directory_that_cant_be_written(ipython_dir):
    (ipython_dir / "profile_default").mkdir()
    (ipython_dir / "profile_default" / "log").write_text("")
    code, _, err = ipcluster("start", "-n", "1", "--daemonize")
    assert code == 2 and "log can't be written" in err and err.count("\n") == 1


def test_the_config_file_opens_the_ports_that_it_asks_for(daemon, ipython_dir):
    (ipython_dir / "profile_default").mkdir()
    (ipython_dir / "profile_default" / "ipcontroller_config.py").write_text("c.IPController.ip = '127.0.0.1'")
    before = our_ports()
    daemon("-n", "1")
    assert len(our_ports() - before) == 2


def test_a_manual_controller_and_engines():
    with command("ipclite", "controller") as controller, command("ipclite", "engine", "-n", "2") as engines:
        try:
            with ipp.Client(timeout=30) as rc:
                rc.wait_for_engines(2, timeout=30)
                assert sorted(rc[:].apply_sync(os.getppid)) == [engines.pid] * 2
        finally:
            engines.terminate()
            engines.communicate(timeout=30)
            controller.terminate()
            controller.communicate(timeout=30)
    assert (engines.returncode, controller.returncode) == (0, 0)


def test_two_controllers_on_one_id():
    with command("ipclite.controller") as first:
        try:
            eventually(lambda: "controller started" in first.stderr.readline())
            code, _, err = run("ipclite.controller")
            assert code == 10 and "Traceback" not in err
            code, _, err = ipcluster("start", "-n", "1")
            assert code == 10 and f"pid {first.pid}" in err
        finally:
            first.terminate()
            first.communicate(timeout=30)


def test_a_vendored_copy_starts_its_own(tmp_path, ipython_dir):
    shutil.copytree(ROOT / "ipclite", tmp_path / "proj" / "_vendor" / "parallel")
    for folder in ("proj", "proj/_vendor"):
        (tmp_path / folder / "__init__.py").write_text("")
    (tmp_path / "script.py").write_text(
        "from proj._vendor import parallel as ipp\n"
        "def where():\n    import sys\n"
        "    return [m for m in sys.modules if m.endswith('.wire') or m.startswith('ipclite')]\n"
        "with ipp.Cluster(n=1) as rc:\n    print(rc[0].apply_sync(where))\n")
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "script.py"], cwd=tmp_path, env=env, capture_output=True, text=True,
                          timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, "['proj._vendor.parallel.wire']\n"), done.stderr
    started = subprocess.run([sys.executable, "-m", "proj._vendor.parallel.cluster", "start", "-n1", "--daemonize"], cwd=tmp_path,
                             env=env, capture_output=True, text=True, timeout=60, check=False)
    assert started.returncode == 0, started.stderr
    stop = started.stdout.splitlines()[-1].partition(":")[2].split()
    assert stop == ["python", "-m", "proj._vendor.parallel.cluster", "stop"]
    subprocess.run([sys.executable, *stop[1:]], cwd=tmp_path, env=env, timeout=60, check=True, stdout=subprocess.DEVNULL)


def test_roles_of_the_package():
    code, out, _ = run("ipclite")
    assert code == 1 and all(role in out for role in ("cluster", "controller", "engine"))
    code, _, err = run("ipclite", "nonsense")
    assert code == 2 and "unknown role 'nonsense'" in err
    assert run("ipclite", "cluster", "--version")[:2] == (0, ipp.__version__ + "\n")
    code, out, _ = run("ipclite", "engine", "--help")
    assert code == 0 and "--file" in out
