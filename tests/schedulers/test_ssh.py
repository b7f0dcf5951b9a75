"""The ssh launchers, by real sshd: two on this host, and three hosts in network namespaces."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from networks import SBIN, Hosts, Sshd, needs_sshd
from shell import ROOT, Command, controller, one_sentence, run, security
from support import MARK, command_line, eventually, need, our_processes
from tasks import die, hold, report_and_hold

import ipclite as ipp
from ipclite import hosts as far_hosts
from ipclite import launchers, outpost
from ipclite.cluster import clean_cluster_files
from ipclite.errors import ConfigError, EngineError, LauncherError

SOON_S = 15


@pytest.fixture(scope="module")
def sshd(_mark):
    """Two ssh servers; what runs in their sessions carries the mark of this test run."""
    needs_sshd()
    server = Sshd(options=f"SetEnv {MARK}={os.environ[MARK]}")
    yield server
    server.close()


@pytest.fixture
def home(sshd, tmp_path, monkeypatch):
    """A home directory whose ~/.ssh calls the two servers node1 and node2."""
    return sshd.make_home(tmp_path, monkeypatch, {"node1": "127.0.0.1", "node2": "127.0.0.2"})


def settings(engines=None, **more):
    """Settings of the ssh launchers for a cluster; the Python there is ours."""
    return {"SSHLauncher": {"remote_python": sys.executable, **more},
            "SSHEngineSetLauncher": {"engines": engines or {"node1": 1, "node2": 2}}}


def cluster(engines=None, config=None, n=None, **more):
    return ipp.Cluster(n=n, engines="ssh", config=config or settings(engines, **more))


def folders(ipython_dir):
    """What launchers keep on the hosts, which share this file system."""
    return list(ipython_dir.glob("profile_*/security/ssh-*"))


def lines_of(word):
    """Command lines of our processes with this word."""
    return [line for line in map(command_line, our_processes().values()) if word in line]


def refused(*words, **options):
    """The sentence with which a cluster does not start; nothing is left."""
    with pytest.raises((LauncherError, ConfigError)) as caught:
        cluster(**options).start_cluster_sync()
    text = str(caught.value)
    for word in words:
        assert word in text, (word, text)
    assert "\n" not in text and "Traceback" not in text
    return text


# --- what works


def test_engines_on_two_hosts(ipython_dir, home, sshd):
    before = sshd.logins(), sshd.logins("127.0.0.2")
    with cluster() as rc:
        one = rc.cluster
        assert one.n == one.size == one.engine_set.n == 3 and rc.ids == [0, 1, 2]
        assert sorted(rc[:].map_sync(pow, range(9), [2] * 9)) == [i * i for i in range(9)]
        agents = [job["id"].rpartition(":")[2] for job in one.engine_set.status()["jobs"]]
        assert sorted(map(str, set(rc[:].apply_sync(os.getppid)))) == sorted(agents)
        assert (sshd.logins() - before[0], sshd.logins("127.0.0.2") - before[1]) == (1, 1)
        assert one.engine_set.running and one.engine_set.status()["state"] == "running"
        assert len(folders(ipython_dir)) == 2
        for folder in folders(ipython_dir):
            assert folder.stat().st_mode & 0o077 == 0 and (folder / "engine.json").stat().st_mode & 0o077 == 0
        key = json.loads((folders(ipython_dir)[0] / "engine.json").read_text())["secret_key"]
        for process in our_processes().values():
            with contextlib.suppress(psutil.Error):
                assert key not in " ".join(process.cmdline()) and key not in str(process.environ())
    assert folders(ipython_dir) == []
    assert len(list(ipython_dir.rglob("ipengine*-*.log"))) >= 5  # logs stay: of three engines and two agents


def test_hosts_are_told_in_three_ways(ipython_dir, home, tmp_path):
    (tmp_path / "profile").mkdir()
    engines = {"node1": 1, "root@node2": (1, [f"--profile-dir={tmp_path / 'profile'}"]),
               "127.0.0.1": {"n": 2, "engine_args": ["-c", "y = 7"],
                             "engine_cmd": [sys.executable, "-m", "ipyparallel.engine"]}}
    with cluster(engines) as rc:
        assert len(rc.ids) == 4
        rc[:].execute("z = globals().get('y', 0)").get(SOON_S)
        assert sum(rc[:].pull("z", block=True)) == 14
        assert list((tmp_path / "profile/log").glob("ipengine*.log"))


def test_n_is_the_limit(ipython_dir, home):
    with cluster(n=2) as rc:
        assert [job["n"] for job in rc.cluster.engine_set.status()["jobs"]] == [1, 1]
        assert len(rc.ids) == 2
        rc.cluster.start_engines_sync(1)
        rc.wait_for_engines(3, timeout=30)
        rc.cluster.stop_engines_sync("1")
        eventually(lambda: len(rc.ids) == 2, SOON_S)


def test_signals_and_output(ipython_dir, home, tmp_path):
    with cluster() as rc:
        running = rc[:].apply_async(report_and_hold, str(tmp_path / "pids"), str(tmp_path / "never"))
        eventually(lambda: (tmp_path / "pids").exists() and len((tmp_path / "pids").read_text().split()) == 3)
        rc.cluster.signal_engines_sync(signal.SIGINT)
        with pytest.raises(ipp.CompositeError) as caught:
            running.get(SOON_S)
        assert [error.ename for error in caught.value.elist] == ["KeyboardInterrupt"] * 3
        rc[:].apply_sync(lambda: __import__("os").write(2, b"hello from an engine\n"))
        text = rc.cluster.engine_set.get_output()
        assert text.count("hello from an engine") == 3 and "==> node1 <==" in text and "==> node2 <==" in text


def test_logs_are_shown_from_there(ipython_dir, home, tmp_path):
    with ipp.Cluster(engines="ssh", config=settings(remote_profile_dir=str(tmp_path / "far")), cluster_id="") as rc:
        rc[:].apply_sync(lambda: __import__("os").write(2, b"hello from an engine\n"))
        shown = run("cluster", "logs", "1")
        assert "==> engine 1 <==\nhello from an engine" in shown.out, shown.err
        shown = run("cluster", "logs")
        assert shown.out.count("hello from an engine") == 3 and "controller started" in shown.out, shown.err


def test_an_engine_and_a_host_that_end_are_reported(ipython_dir, home):
    with cluster() as rc:
        told = []
        rc.cluster.engine_set.on_part_stop(told.append)
        with pytest.raises(EngineError, match="SIGKILL"):
            rc[0].apply_async(die).get(SOON_S)
        eventually(lambda: len(rc.ids) == 2, SOON_S)
        jobs = {job["nodes"]: job for job in rc.cluster.engine_set.status()["jobs"]}
        node = "node1" if jobs["node1"]["state"] != "running" else "node2"
        rest = "node2" if node == "node1" else "node1"
        os.kill(int(jobs[rest]["id"].rpartition(":")[2]), signal.SIGKILL)
        eventually(lambda: any(rest in data["reason"] and "SIGKILL" in data["reason"] for data in told), SOON_S)
        state = {job["nodes"]: job["state"] for job in rc.cluster.engine_set.status()["jobs"]}
        assert state[rest] == "failed"


def test_engines_come_back_after_a_restart(ipython_dir, home):
    with cluster() as rc:
        before = set(rc[:].apply_sync(os.getpid))
        rc.cluster.restart_engines_sync()
        rc.wait_for_engines(3, timeout=30)
        eventually(lambda: len(rc.ids) == 3, SOON_S)
        assert not before & set(rc[:].apply_sync(os.getpid))


@pytest.mark.keeps_files
@pytest.mark.parametrize("controller", ["local", "ssh"])
def test_controller_is_restarted(ipython_dir, home, controller):
    config = {**settings(), "SSHControllerLauncher": {"hostname": "node1"}}
    with ipp.Cluster(engines="ssh", controller=controller, config=config, controller_args=["--reuse"]) as rc:
        before = set(rc[:].apply_sync(os.getpid))
        rc.cluster.restart_controller_sync()
        with rc.cluster.connect_client_sync() as again:
            again.wait_for_engines(3, timeout=60)
            assert set(again[:].apply_sync(os.getpid)) == before


def test_a_lost_connection_is_made_again(ipython_dir, home, sshd, tmp_path):
    with cluster() as rc:
        engines = rc.cluster.engine_set
        running = rc[:].apply_async(hold, str(tmp_path / "go"), 7)
        sshd.kill_sessions("127.0.0.1")
        eventually(lambda: [site.state for site in engines.sites][0] == "unreachable", SOON_S)
        assert engines.running
        eventually(lambda: [site.state for site in engines.sites] == ["running"] * 2, SOON_S)
        (tmp_path / "go").touch()
        assert running.get(SOON_S) == [7] * 3
        engines.signal(signal.SIGINT)
        sshd.kill_sessions("127.0.0.2")  # stopping makes the connection again


def test_from_another_process(ipython_dir, home):
    flags = [f"--SSHLauncher.remote_python={sys.executable}", "--SSHEngineSetLauncher.engines={'node1': 1, 'node2': 1}"]
    started = run("cluster", "start", "--engines=ssh", "--daemonize", *flags, timeout=60)
    assert started.process.returncode == 0 and "2 engines are ready" in started.out, started.err
    listed = run("cluster", "list")
    assert "running  2/2" in listed.out and " ssh " in listed.out, listed.out + listed.err
    other = ipp.Cluster.from_file()
    assert other.engine_set.n == 2 and other.running and other.engine_set.status()["state"] == "running"
    with ipp.Client() as rc:
        assert rc.load_balanced_view().map_sync(abs, range(-3, 0)) == [3, 2, 1]
    assert run("cluster", "stop", timeout=60).process.returncode == 0
    assert folders(ipython_dir) == []


def test_engines_for_a_controller_that_runs_already(ipython_dir, home):
    flags = [f"--SSHLauncher.remote_python={sys.executable}", "--SSHEngineSetLauncher.engines={'node1': 1, 'node2': 1}"]
    with controller(ipython_dir):
        started = run("cluster", "engines", "--engines=ssh", "--daemonize", *flags, timeout=60)
        assert started.process.returncode == 0 and "2 engines are ready" in started.out, started.err
        with ipp.Client() as rc:
            assert rc[:].apply_sync(abs, -1) == [1, 1]
            assert run("cluster", "stop", timeout=60).process.returncode == 0
            eventually(lambda: rc.ids == [], SOON_S)
    assert folders(ipython_dir) == []


def test_starter_is_killed(ipython_dir, home):
    code = f"import ipclite as ipp; c = ipp.Cluster(engines='ssh', cluster_id='', config={settings()!r}); c.__enter__(); " \
           "print('up', flush=True); import time; time.sleep(600)"
    with Command(code=["-c", code]) as starter:
        starter.says("up", 60)
        starter.stop(signal.SIGKILL)
    eventually(lambda: not lines_of("engine"), 30, "engines end")
    eventually(lambda: not list(ipython_dir.rglob("engine.json")), SOON_S, "secrets are gone")
    eventually(lambda: folders(ipython_dir) == [], SOON_S, "their folders are gone")


def test_controller_on_another_host(ipython_dir, home, tmp_path):
    config = settings(remote_profile_dir=str(tmp_path / "far"))
    config["SSHControllerLauncher"] = {"location": "root@node1", "controller_args": ["--log-level=DEBUG"]}
    with ipp.Cluster(engines="ssh", controller="ssh", config=config, cluster_id="") as rc:
        assert len(rc.ids) == 3 and sorted(rc[:].apply_sync(abs, -1)) == [1, 1, 1]
        own = json.loads((security(ipython_dir) / "ipcontroller-client.json").read_text())
        theirs = json.loads((tmp_path / "far/security/ipcontroller-client.json").read_text())
        assert own == theirs and own["url"].startswith("tcp://0.0.0.0:") | own["url"].startswith("tcp://")
        assert "controller started" in rc.cluster.controller.get_output()
        other = ipp.Cluster.from_file()
        assert other.controller.running and other.controller.wrote(own)
        with pytest.raises(ipp.AlreadyRunning):
            ipp.Cluster(engines="ssh", controller="ssh", config=config, cluster_id="").start_cluster_sync()
        os.kill(own["pid"], 0)
    assert not list((tmp_path / "far").rglob("*.json")) and not list(ipython_dir.rglob("*.json"))


def test_controller_that_is_killed_leaves_nothing(ipython_dir, home, tmp_path):
    config = settings(remote_profile_dir=str(tmp_path / "far"))
    config["SSHControllerLauncher"] = {"hostname": "node1", "user": "root"}
    one = ipp.Cluster(n=1, engines="ssh", controller="ssh", config=config)
    with one as rc:
        os.kill(rc.connection_info["pid"] if hasattr(rc, "connection_info") else one.controller.sites[0].pid, signal.SIGKILL)
        eventually(lambda: not one.controller.running, SOON_S)
        assert "SIGKILL on root@node1" in one.controller.stop_data["reason"]
    assert not list((tmp_path / "far").rglob("*.json")) and not list(ipython_dir.rglob("*.json"))


def test_controller_that_does_not_start(ipython_dir, home):
    config = settings()
    config["SSHControllerLauncher"] = {"hostname": "node1", "controller_args": ["--no-such-flag"]}
    with pytest.raises(LauncherError, match="(?s)on node1 exited with code 2.*unknown flag --no-such-flag"):
        ipp.Cluster(engines="ssh", controller="ssh", config=config).start_cluster_sync()
    assert folders(ipython_dir) == []


def test_owned_controller_ends_when_nobody_comes_back(ipython_dir, home, monkeypatch):
    code = "import ipclite as ipp; from ipclite import launchers; launchers.SSHControllerLauncher.lease_s = 2; " \
           f"c = ipp.Cluster(n=1, engines='ssh', controller='ssh', config={{**{settings()!r}, 'SSHControllerLauncher': " \
           "{'hostname': 'node1'}}); c.__enter__(); print('up', flush=True); import time; time.sleep(600)"
    with Command(code=["-c", code]) as starter:
        starter.says("up", 60)
        starter.stop(signal.SIGKILL)
    eventually(lambda: not lines_of("ipclite"), 40, "all ends")
    eventually(lambda: folders(ipython_dir) == [], SOON_S, "their folders are gone")
    clean_cluster_files()


def test_engines_by_ipcluster_there(ipython_dir, home, tmp_path):
    config = settings(remote_profile_dir=str(tmp_path / "far"))
    config["SSHProxyEngineSetLauncher"] = {"hostname": "node1"}
    with ipp.Cluster(n=2, engines="sshproxy", config=config) as rc:
        assert sorted(rc[:].apply_sync(abs, -1)) == [1, 1]
        launcher = rc.cluster.engine_set
        (ipcluster,) = [psutil.Process(site.pid) for site in launcher.sites]
        assert "engines" in ipcluster.cmdline()
        running = rc[:].apply_async(report_and_hold, str(tmp_path / "pids"), str(tmp_path / "never"))
        eventually(lambda: (tmp_path / "pids").exists() and len((tmp_path / "pids").read_text().split()) == 2, SOON_S)
        launcher.signal(signal.SIGINT)
        with pytest.raises(ipp.CompositeError):
            running.get(SOON_S)
        assert (tmp_path / "far/security").exists() and list((tmp_path / "far/security").glob("ipcontroller*.json"))
    assert not list((tmp_path / "far").rglob("*.json"))


def test_files_are_sent_and_fetched(ipython_dir, home, tmp_path):
    data = tmp_path / "data"
    data.write_bytes(os.urandom(3 << 20))
    name = "ipcontroller-engine.json"
    engine = str(security(ipython_dir) / name)
    config = settings(to_send=[(engine, str(tmp_path / "far/security" / name)), (str(data), str(tmp_path / "far/data"))],
                      remote_profile_dir=str(tmp_path / "far"))
    with ipp.Cluster(engines="ssh", config=config, cluster_id="") as rc:
        assert len(rc.ids) == 3
        assert (tmp_path / "far/data").read_bytes() == data.read_bytes()
        assert (tmp_path / "far/security" / name).stat().st_mode & 0o077 == 0
    assert (tmp_path / "far/data").exists() and not (tmp_path / "far/security" / name).exists()


def test_a_shared_file_system_needs_no_files_moved(ipython_dir, home):
    config = settings(to_send=[], to_fetch=[])
    config["SSHControllerLauncher"] = {"hostname": "node1"}
    with ipp.Cluster(n=2, engines="ssh", controller="ssh", config=config) as rc:
        assert len(rc.ids) == 2
        assert not list(ipython_dir.rglob("engine.json"))


# --- what goes wrong is named


def test_bad_hosts_among_good_ones(ipython_dir, home, sshd, caplog):
    engines = {"node1": 1, "no-such-host.invalid": 2, "127.0.0.1:1": 1, "nobody@node2": 1}
    with cluster(engines) as rc:
        assert len(rc.ids) == 1 == rc.cluster.size and rc.cluster.n == 5
        jobs = {job["nodes"]: job for job in rc.cluster.engine_set.status()["jobs"]}
        assert jobs["node1"]["state"] == "running"
        assert "can't be looked up" in jobs["no-such-host.invalid"]["reason"]
        assert "refused the connection" in jobs["127.0.0.1:1"]["reason"]
        assert "did not let us in" in jobs["nobody@node2"]["reason"]
        assert {job["state"] for host, job in jobs.items() if host != "node1"} == {"failed"}
        rc.cluster.restart_engines_sync()
        assert [site.server for site in rc.cluster.engine_set.sites] == ["node1"]


def test_all_hosts_are_bad(ipython_dir, home):
    refused("no-such-host.invalid: ", "can't be looked up", "127.0.0.1:1: ", "refused the connection",
            engines={"no-such-host.invalid": 2, "127.0.0.1:1": 1})


def a_venv(path, *modules):
    """A Python that has nothing but these modules."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(path)], check=True)
    (site,) = (path / "lib").glob("python*/site-packages")
    for module in modules:
        origin = Path(__import__(module).__file__).parent
        for folder in (origin, origin.with_name(origin.name.replace("zmq", "pyzmq") + ".libs")):
            if folder.exists():
                (site / folder.name).symlink_to(folder)
    return str(path / "bin/python")


def test_python_and_pyzmq_are_all_that_is_needed(ipython_dir, home, tmp_path):
    bare = a_venv(tmp_path / "bare", "zmq")
    asked = subprocess.run([bare, "-c", "import zmq, cloudpickle"], capture_output=True, text=True, cwd="/")
    assert "No module named 'cloudpickle'" in asked.stderr, asked
    with cluster({"node1": {"n": 2, "remote_python": bare}}) as rc:
        assert {str(path) for path in rc[:].apply_sync(lambda: __import__("sys").executable)} == {bare}
        assert rc[:].apply_sync(lambda x: x + 1, 1) == [2, 2]
        (folder,) = folders(ipython_dir)
        assert (folder / "lib/ipclite/engine.py").exists() and (folder / "lib/cloudpickle").exists()
    assert folders(ipython_dir) == []


def test_no_pyzmq_there(ipython_dir, home, tmp_path):
    bare = a_venv(tmp_path / "bare")
    text = refused("node1: ", f"{bare} lacks pyzmq", "-m pip install pyzmq", "remote_python",
                   engines={"node1": {"n": 1, "remote_python": bare}})
    assert len(text) < 400
    assert folders(ipython_dir) == []


def test_no_python_there(ipython_dir, home, tmp_path):
    refused("node1: there is no /nowhere/python3", "install Python 3.9 or newer", "remote_python",
            engines={"node1": {"n": 1, "remote_python": "/nowhere/python3"}})
    old = tmp_path / "old"
    old.write_text(f"#!/bin/sh\nexec {sys.executable} -c 'import sys; sys.version_info = (3, 6, 8); "
                   "exec(sys.stdin.readline())'\n")
    old.chmod(0o755)
    refused("is Python 3.6 there", "3.9 or newer", engines={"node1": {"n": 1, "remote_python": str(old)}})


def test_no_such_directory_there(ipython_dir, home, tmp_path):
    refused("node1: there is no directory /nowhere/to/work", "work_dir", engines={"node1": {"n": 1, "work_dir": "/nowhere/to/work"}})
    (tmp_path / "file").touch()
    refused(f"{tmp_path / 'file'}", "Not a directory", "remote_profile_dir",
            engines={"node1": {"n": 1, "remote_profile_dir": str(tmp_path / "file/a")}})


def test_command_that_is_not_there(ipython_dir, home):
    refused("node1: ", "/nowhere/ipengine: No such file or directory; correct the command",
            engines={"node1": {"n": 1, "engine_cmd": ["/nowhere/ipengine"]}})


def test_engines_that_end_at_once(ipython_dir, home):
    with pytest.raises(LauncherError, match="(?s)exited with code 2 on node1.*unknown flag --no-such-flag"):
        cluster({"node1": (1, ["--no-such-flag"])}).start_and_connect_sync()


@pytest.mark.parametrize("engines, words", [
    ({}, "On which hosts"), ({"a": "2"}, "needs a number"), ({"a": {"n": 1, "engine_arg": []}}, "did you mean engine_args"),
    ({"a": (1, "x", 2)}, "needs a number"), ({"a": {"n": 1, "engine_args": 3}}, "needs a list"), ({3: 1}, "needs a number"),
])
def test_engines_that_can_not_be_understood(ipython_dir, engines, words):
    with pytest.raises(ConfigError, match=words):
        ipp.Cluster(n=1, engines="ssh", config={"SSHEngineSetLauncher": {"engines": engines}}).start_cluster_sync()


def test_paramiko_is_absent(ipython_dir, home, tmp_path):
    (tmp_path / "absent").mkdir()
    (tmp_path / "absent/paramiko.py").write_text("raise ImportError('no module of that name')")
    command = run("cluster", "start", "--engines=ssh", "--SSHEngineSetLauncher.engines={'node1': 1}",
                  env={"PYTHONPATH": str(tmp_path / "absent")})
    line = one_sentence(command, 1, "node1: ssh needs paramiko", "pip install paramiko")
    assert line.startswith("ipcluster: ")


def test_the_settings_of_the_page(ipython_dir):
    """As they are written there; what they lead to is seen without starting anything."""
    folder = ipython_dir / "profile_ssh"
    folder.mkdir()
    (folder / "ipcluster_config.py").write_text("""
c = get_config()
c.IPClusterEngines.engine_launcher_class = 'ipyparallel.cluster.launcher.SSHEngineSetLauncher'
c.IPClusterStart.controller_launcher_class = 'ssh'
c.SSHControllerLauncher.hostname = 'controller.example.com'
c.SSHControllerLauncher.user = 'me'
c.SSHControllerLauncher.controller_args = ['--reuse', '--ip=*', '--profile-dir=/path/to/cd']
c.SSHEngineSetLauncher.engines = {
    'host1.example.com': 2, 'host3.example.com': (1, ['--profile-dir=/home/different/location']),
    'host4.example.com': {'n': 3, 'engine_args': ['--profile-dir=/away/location'],
                          'engine_cmd': ['/home/venv/bin/python', '-m', 'ipyparallel.engine']}}
c.SSHEngineSetLauncher.engine_args = ['--profile-dir=/path/to/profile_ssh']
c.SSHLauncher.to_send = []
c.SSHLauncher.to_fetch = []
""")
    one = ipp.Cluster(profile="ssh")
    assert one.n == 6
    text = one.job_script("controller")
    assert "# on me@controller.example.com\npython3 -m ipclite.controller" in text and "--reuse" in text
    rows = dict(zip(*[iter(one.job_script().splitlines())] * 2))
    assert [" -n 2 ", " -n 1 ", " -n 3 "] == [word for row, word in zip(rows.values(), (" -n 2 ", " -n 1 ", " -n 3 ")) if word in row]
    assert "--profile-dir=/path/to/profile_ssh" in rows["# on host1.example.com"]
    assert "--profile-dir=/home/different/location" in rows["# on host3.example.com"]
    assert rows["# on host4.example.com"].startswith("/home/venv/bin/python -m ipclite.engine -n 3 --profile-dir=/away/location")
    assert "--file" not in one.job_script()


def test_which_host(ipython_dir):
    for role in ("controller", "engines"):
        with pytest.raises(ConfigError, match="On which host"):
            ipp.Cluster(n=1, **{role: {"controller": "ssh", "engines": "sshproxy"}[role]}).start_cluster_sync()


# --- hosts of their own


@pytest.fixture(scope="module")
def hosts(_mark):
    need(os.geteuid() == 0, "root")
    need(shutil.which("ip", path=SBIN), "ip")
    found = Hosts()
    yield found
    found.do("stop")


@pytest.fixture
def servers(hosts, tmp_path, monkeypatch):
    """An ssh server on each of the hosts b and c."""
    needs_sshd()
    with contextlib.ExitStack() as stack:
        known, found = "", []
        for name in (hosts.b, hosts.c):
            server = Sshd(hosts=(hosts.address(name),), options=f"SetEnv {MARK}={os.environ[MARK]}", via=hosts.on(name))
            stack.callback(server.close)
            known += server.known
            found.append(server)
        found[0].make_home(tmp_path, monkeypatch, {})
        (tmp_path / ".ssh/known_hosts").write_text(known)
        (tmp_path / ".ssh/config").write_text("".join(
            f"Host {name}\n  User root\n  HostName {hosts.address(name)}\n  Port {server.port}\n  IdentityFile {server.key}\n"
            for name, server in zip((hosts.b, hosts.c), found)))
        yield found


SCRIPT = """
import sys, time, pathlib, ipclite as ipp, tasks
config, go, args = eval(sys.argv[1]), sys.argv[2], eval(sys.argv[3])
c = ipp.Cluster(engines="ssh", config=config, **args)
with c as rc:
    print("up", sorted(set(e["host"] for e in rc.engine_info().values())), flush=True)
    ar = rc.load_balanced_view().map_async(tasks.hold, [go] * 6, range(6), chunksize=1)
    print("sent", flush=True)
    print("got", list(ar.get(120)), flush=True)
    rc.wait_for_engines(len(c.engine_set.sites) * 2, timeout=60)
    print("all", len(rc.ids), flush=True)
print("stopped", flush=True)
"""


def on_a(hosts, config, go, **args):
    """A script that has its engines on other hosts."""
    return Command(code=["-c", SCRIPT, repr(config), str(go), repr(args)], env={"PYTHONPATH": str(ROOT / "tests")},
                   via=hosts.on(hosts.a))


def test_cable_is_cut_and_healed_while_tasks_run(ipython_dir, hosts, servers, tmp_path):
    config = settings({hosts.b: 2, hosts.c: 2})
    with on_a(hosts, config, tmp_path / "go", controller_args=["--ping=500"]) as script:
        script.says(f"up ['{hosts.b}', '{hosts.c}']", 60).says("sent")
        hosts.do("cut", hosts.b)
        try:
            script.says("can't be reached at present", 40)
            (tmp_path / "go").touch()
            script.says("got [0, 1, 2, 3, 4, 5]", 60)
        finally:
            hosts.do("heal", hosts.b)
        script.says("all 4", 60)
        script.says("stopped", 60)
        assert script.wait() == 0
    assert folders(ipython_dir) == []


def test_controller_that_listens_on_its_own_host_only(ipython_dir, hosts, servers, tmp_path):
    with on_a(hosts, settings({hosts.b: 1}), tmp_path / "go", controller_ip="127.0.0.1") as script:
        script.wait(60)
        assert f"engines there can't reach the controller, which listens on {hosts.a} only" in script.err
        assert "--ip=*" in script.err and "--enginessh" in script.err
    assert folders(ipython_dir) == []


def test_controller_on_another_host_is_reached_from_here(ipython_dir, hosts, servers, tmp_path):
    (tmp_path / "go").touch()
    config = {**settings({hosts.c: 2}, remote_profile_dir=str(tmp_path / "far")),
              "SSHControllerLauncher": {"hostname": hosts.b}}
    with on_a(hosts, config, tmp_path / "go", controller="ssh") as script:
        script.says(f"up ['{hosts.c}']", 60).says("all 2", 60).says("stopped", 60)
    config["SSHEngineSetLauncher"]["engines"] = {hosts.b: 2}  # engines there, clients through ssh
    with on_a(hosts, config, tmp_path / "go", controller="ssh", controller_ip="127.0.0.1") as script:
        script.says(f"up ['{hosts.b}']", 60).says("all 2", 60).says("stopped", 60)


@pytest.mark.keeps_files
def test_keys_and_ports_of_a_controller_on_another_host_are_kept(ipython_dir, hosts, servers, tmp_path):
    (tmp_path / "go").touch()
    config = {**settings({hosts.b: 2}, remote_profile_dir=str(tmp_path / "far")),
              "SSHControllerLauncher": {"hostname": hosts.b, "controller_args": ["--reuse"]}}
    found = []
    for _ in range(2):
        with on_a(hosts, config, tmp_path / "go", controller="ssh", cluster_id="") as script:
            script.says("all 2", 60).says("stopped", 60)
        info = json.loads((security(ipython_dir) / "ipcontroller-client.json").read_text())
        assert info == json.loads((tmp_path / "far/security/ipcontroller-client.json").read_text())
        assert info["location"] == hosts.address(hosts.b)
        found.append((info["url"], info["secret_key"]))
    assert found[0] == found[1]


# --- details


@pytest.mark.parametrize("args, options, dropped", [
    ([], {}, []), (["-p", "22", "-lme"], {"port": "22", "user": "me"}, []),
    (["-i", "a", "-i", "b", "-tt"], {"identityfile": ["a", "b"]}, []),
    (["-o", "Port=3", "-oProxyJump x", "-o", "BatchMode=yes"], {"port": "3", "proxyjump": "x"}, []),
    (["-A", "-L", "1:a:2", "-o", "Ciphers=x"], {}, ["-A", "-L 1:a:2", "-o Ciphers=x"]),
])
def test_arguments_of_the_ssh_program(args, options, dropped):
    assert far_hosts.ssh_options(args) == (options, dropped)


def test_what_would_be_run(ipython_dir, home):
    text = cluster({"node1": 1, "me@node2": {"n": 2, "remote_python": "python3.12"}}, remote_profile_dir="far").job_script()
    first, one, second, two = text.splitlines()
    assert (first, second) == ("# on node1", "# on me@node2")
    assert one.startswith(f"{sys.executable} -m ipclite.engine -n 1 --profile-dir=far") and two.startswith("python3.12 ")
    assert "--file=far/security/ssh-RANDOM/engine.json" in two


def test_paths_there(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert far_hosts.path_there("/home/me/.ipython/profile_x") == ".ipython/profile_x"
    assert far_hosts.path_there("/home/me2/x") == "/home/me2/x" and far_hosts.path_there("/data") == "/data"
    assert outpost.absolute("~/x") == outpost.absolute("x") == "/home/me/x"


def test_names_of_launchers():
    for name in ("ssh", "SSHEngineSetLauncher", "ipyparallel.cluster.launcher.SSHEngineSetLauncher"):
        assert launchers.find_launcher("engine", name) is launchers.SSHEngineSetLauncher
    assert launchers.find_launcher("controller", "ssh") is launchers.SSHControllerLauncher
    proxy = launchers.find_launcher("engine", "ipyparallel.cluster.launcher.SSHProxyEngineSetLauncher")
    assert proxy is launchers.find_launcher("engine", "sshproxy") is launchers.SSHProxyEngineSetLauncher


def test_ssh_is_imported_only_when_asked_for():
    done = subprocess.run([sys.executable, "-c", "import sys, ipclite.cluster; print([m for m in sys.modules if 'paramiko' in m])"],
                          cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done


def test_folders_of_dead_starts_are_swept(tmp_path):
    first = outpost.open_folder(str(tmp_path))
    outpost._write_state(first, {"pid": 1, "start": "never", "host": "elsewhere"})
    second = outpost.open_folder(str(tmp_path))
    outpost._write_state(second, {"pid": 2 ** 22 + 1, "start": "never", "host": os.uname().nodename})
    for folder in (first, second):
        os.utime(folder, (1, 1))
    third = outpost.open_folder(str(tmp_path))
    assert sorted(os.listdir(tmp_path / "security")) == sorted(map(os.path.basename, (first, third)))
