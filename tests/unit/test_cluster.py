"""`Cluster` and `ipcluster` with launchers that start nothing: what is passed on, noted, refused and cleaned up."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket

import pytest

import ipclite as ipp
from ipclite import config, errors, launchers
from ipclite import ipcluster as module
from ipclite.cluster import Cluster, ClusterManager, clean_cluster_files, main

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
alive: set = set()  # of fake processes
history: list = []  # what was done to them


class Fake(launchers.BaseLauncher):
    """A launcher of nothing."""

    name = "local"

    def start(self):
        """Pretend."""
        self.key = f"{self.role}-{len(history)}"
        alive.add(self.key)
        history.append(("start", self.role))
        self.notify_start({})

    def stop(self):
        """Pretend."""
        history.append(("stop", self.role))
        alive.discard(self.key)
        self.notify_stop({"reason": "was stopped"})

    def signal(self, signum):
        """Pretend."""
        history.append(("signal", self.key, signum))

    def poll(self):
        """Has nobody pretended that it ended?"""
        if self.key not in alive:
            self.notify_stop({"reason": "was killed by SIGKILL", "exit_code": -9})
        return self.key in alive

    def join(self, timeout_s=None):
        """It never ends by itself."""
        return not self.poll()

    def get_output(self, lines=None):
        """Something to recognise."""
        return f"last words of the {self.role}"

    def to_dict(self):
        """With the key."""
        return {**super().to_dict(), "key": self.key}

    @classmethod
    def from_dict(cls, state, options=None):
        """The same fake process."""
        more = {"n": state["n"]} if "n" in state else {}
        self = cls(profile_dir=state["profile_dir"], cluster_id=state["cluster_id"], owned=False, **more)
        self.key = state["key"]
        if self.key not in alive:
            raise errors.NotRunning("It has ended. it was killed")
        self.notify_start({})
        return self


class FakeController(Fake, launchers.ControllerLauncher):
    """Writes the connection files that a controller would write."""

    ready = True

    def start(self):
        """Write the files."""
        super().start()
        for role in ("client", "engine") if self.ready else ():
            config.write_json(config.connection_file(self.profile_dir, self.cluster_id, role), {
                "program": "ipclite", "role": role, "url": "", "ipc": "/nowhere/s", "run_id": "ab", "protocol": 1,
                "pid": os.getpid(), "host": socket.gethostname(), "pid_start": config.process_start(os.getpid()),
                "secret_key": "tell nobody"})

    def wrote(self, info):
        """Every file is ours."""
        return True

    def stop(self):
        """Remove the files."""
        super().stop()
        for role in ("client", "engine"):
            path = config.connection_file(self.profile_dir, self.cluster_id, role)
            if path.exists():
                path.unlink()


class FakeEngines(Fake, launchers.EngineLauncher):
    """Engines."""


class FakeClient:
    """A client that sees the engines at once, or never."""

    engines = 2
    closed = 0

    def __init__(self, path, cluster=None, timeout=None):
        self.cluster, self.ids = cluster, list(range(self.engines))

    def wait_for_engines(self, n, timeout=None):
        """Are there enough?"""
        if n > len(self.ids):
            if self.cluster._engines_ended():
                raise ipp.EngineError("the engines ended")
            raise TimeoutError

    def close(self):
        """Count."""
        FakeClient.closed += 1

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.close()


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """Fakes in place of launchers and client, and an empty $IPYTHONDIR."""
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    handlers = {signum: signal.getsignal(signum) for signum in (*SIGNALS, signal.SIGUSR1, signal.SIGUSR2)}
    monkeypatch.setattr(launchers, "LAUNCHERS", {("controller", "local"): FakeController,
                                                 ("engine", "local"): FakeEngines})
    monkeypatch.setattr("ipclite.client.Client", FakeClient)
    monkeypatch.setattr(FakeClient, "closed", 0)
    alive.clear()
    history.clear()
    yield tmp_path
    for signum, handler in handlers.items():
        signal.signal(signum, handler)
    assert not alive


def files(home):
    """Names of what is in security/ of all profiles."""
    return sorted(path.name for path in home.glob("*/security/*"))


def dead(cluster):
    """Let the processes of a cluster die, all of a sudden."""
    alive.clear()
    for role in ("client", "engine"):
        path = config.connection_file(cluster.profile_dir, cluster.cluster_id, role)
        config.write_json(path, {**config.read_json(path), "pid_start": "long ago"})


# ---------------------------------------------------------------- making


def test_defaults(home):
    c = Cluster()
    assert c.n == len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    assert c.profile_dir == home / "profile_default" and c.engine_timeout == 60
    assert c.cluster_id != Cluster().cluster_id and c.cluster_file.name == f"cluster-{c.cluster_id}.json"
    assert not list(home.iterdir())  # nothing is made before it starts
    assert Cluster(cluster_id="").cluster_file.name == "cluster-.json" and Cluster(cluster_file="").cluster_file is None


def test_the_profile_is_read_and_arguments_win():
    (config.find_profile_dir("x", create=True) / "ipcluster_config.py").write_text(
        "c.Cluster.n = 7\nc.Cluster.controller_args = ['--reuse']\nc.BaseLauncher.environment = {'A': 'b'}")
    c = Cluster(profile="x", controller_args=["--ping=9"])
    assert c.n == 7 and c.controller_args == ["--ping=9"]
    assert Cluster(profile="x", n=3).n == 3 and Cluster(profile="x", load_profile=False).n != 7
    c.start_engines_sync(1, environment={"C": "d"})
    assert c.engine_set.options["environment"] == {"A": "b", "C": "d"}, "it adds to the profile's"
    c.start_engines_sync(1)
    assert c.engines["1"].options["environment"] == {"A": "b"}
    c.stop_engines_sync()


@pytest.mark.parametrize("arguments, error, message", [
    ({"n": 0}, ipp.ConfigError, "n needs a whole number above 0, not 0."),
    ({"n": "x"}, ipp.ConfigError, "n needs a whole number above 0, not 'x'."),
    ({"engines": "nope"}, ipp.ConfigError, "There is no engine launcher 'nope'; choose from local"),
    ({"engines": "local", "engine_launcher_class": "local"}, TypeError, "engines and engine_launcher_class are"),
    ({"controller": "local", "controller_launcher_class": "local"}, TypeError, "controller and controller_launcher"),
    ({"dealy": 1}, TypeError, "dealy"),
    ({"delay": -1}, ipp.ConfigError, "delay needs a number of seconds, not -1."),
    ({"config": {"Cluster": {"dealy": 3}}}, ipp.ConfigError, "c.Cluster.dealy in config; did you mean delay"),
    ({"profile": "a/b"}, ipp.ConfigError, "name has no slashes"),
])
def test_wrong_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        Cluster(**arguments)


@pytest.mark.parametrize("arguments, text, flags", [
    ({}, "", ["--transport=ipc"]),
    ({"controller_ip": "*"}, "", ["--ip=*"]),
    ({"controller_location": "there"}, "", ["--location=there"]),
    ({"controller_args": ["--ip=1.2.3.4"]}, "", ["--ip=1.2.3.4"]),
    ({"controller_args": ["--ping=5"]}, "", ["--transport=ipc", "--ping=5"]),
    ({}, "c.IPController.ip = '*'", []),
    ({}, "c.HubFactory.location = 'x'", []),
    ({}, "c.HeartMonitor.period = 9", ["--transport=ipc"]),
])
def test_a_local_cluster_opens_no_port_unless_asked_to(arguments, text, flags):
    (config.find_profile_dir(create=True) / "ipcontroller_config.py").write_text(text)
    assert Cluster(**arguments)._controller_flags() == flags


# ---------------------------------------------------------------- life


def test_life(home):
    c = Cluster(n=2, cluster_id="x", log_level=None)
    assert c.start_cluster_sync() is c and c.running
    assert files(home) == ["cluster-x.json", "ipcontroller-x-client.json", "ipcontroller-x-engine.json"]
    assert "tell nobody" not in c.cluster_file.read_text()
    assert c.start_engines_sync(3) == "1" and c.start_engines_sync(1, "mine") == "mine"
    assert {name: launcher.n for name, launcher in c.engines.items()} == {"0": 2, "1": 3, "mine": 1}
    assert set(json.loads(c.cluster_file.read_text())["engines"]["sets"]) == {"0", "1", "mine"}
    assert repr(c).startswith("<Cluster(cluster_id='x', ") and "engines[mine]=1 running" in repr(c)
    c.stop_engines_sync("1")
    assert set(json.loads(c.cluster_file.read_text())["engines"]["sets"]) == {"0", "mine"}
    assert c.start_engines_sync(1) == "1"
    with pytest.raises(KeyError, match="no engine set 'nope'"):
        c.stop_engines_sync("nope")
    c.stop_cluster_sync()
    assert [what for what in history if what[0] == "stop"][-1] == ("stop", "controller")
    assert c.controller is None and not c.engines and not c.running and files(home) == []
    c.stop_cluster_sync()


def test_signals_and_restart():
    c = Cluster(n=2).start_cluster_sync()
    c.start_engines_sync(1)
    first, second = c.engines.values()
    c.signal_engines_sync(signal.SIGINT)
    c.signal_engines_sync(signal.SIGUSR1, "1")
    assert [what[1:] for what in history if what[0] == "signal"] == [
        (first.key, signal.SIGINT), (second.key, signal.SIGINT), (second.key, signal.SIGUSR1)]
    c.restart_engines_sync("0")
    assert c.engines["1"] is second and c.engines["0"] is not first and c.engines["0"].n == 2
    c.restart_engines_sync()
    assert {name: launcher.n for name, launcher in c.engines.items()} == {"0": 2, "1": 1}
    c.stop_cluster_sync()


def test_with(home):
    c = Cluster(n=2)
    with c as rc:
        assert rc.cluster is c and c.running
    assert FakeClient.closed == 1 and files(home) == []
    with pytest.raises(KeyboardInterrupt):
        with c:
            raise KeyboardInterrupt
    assert FakeClient.closed == 2 and not alive


def test_coroutines(home):
    async def run():
        async with Cluster(n=2) as rc:
            assert rc.cluster.running
        c = await Cluster(n=1).start_cluster()
        name = await c.start_engines(1)
        await c.signal_engines(signal.SIGUSR1, name)
        await c.restart_engines(name)
        await c.stop_engines(name)
        client = await c.connect_client()
        client.close()
        await c.stop_cluster()
        client = await c.start_and_connect()
        await c.stop_controller()
        await c.stop_cluster()
    asyncio.run(run())
    assert FakeClient.closed == 2 and files(home) == []
    for name in dir(Cluster):
        if name.endswith("_sync"):
            assert asyncio.iscoroutinefunction(getattr(Cluster, name[: -len("_sync")]))


def test_ownership():
    c = Cluster(n=1).start_cluster_sync()
    detached = Cluster(n=1, shutdown_atexit=False).start_cluster_sync()
    assert c.controller.owned and c.engine_set.owned
    assert not detached.controller.owned and not detached.engine_set.owned
    c._pid += 1  # as in a forked child, whose exit must not stop the cluster
    c._at_exit()
    assert c.running
    c._pid -= 1
    c._at_exit()
    assert not c.running
    detached.stop_cluster_sync()


# ---------------------------------------------------------------- what goes wrong


def test_already_running(home):
    c = Cluster(n=1, cluster_id="x").start_cluster_sync()
    before = files(home)
    for again in (c, Cluster(n=1, cluster_id="x")):
        with pytest.raises(ipp.AlreadyRunning, match="cluster 'x'") as e:
            again.start_cluster_sync()
        assert e.value.exit_code == 10
    assert files(home) == before and c.running
    c.stop_cluster_sync()


def test_a_controller_started_by_hand_is_in_the_way():
    c = Cluster(n=1, cluster_id="")
    by_hand = FakeController(profile_dir=c.profile_dir)
    by_hand.start()
    with pytest.raises(ipp.AlreadyRunning, match="already serves the default cluster"):
        c.start_cluster_sync()
    by_hand.stop()


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"cluster": {}}', '{"cluster": 1}', "\x00",
                                  '{"cluster": {"n": 0, "cluster_id": "x"}}'])
def test_an_unreadable_cluster_file_is_replaced(home, text):
    c = Cluster(n=1, cluster_id="x")
    config.make_profile_dir(c.profile_dir)
    c.cluster_file.write_text(text)
    with pytest.raises(ipp.ConnectionFileError, match="cluster-x.json"):
        Cluster.from_file(cluster_id="x")
    c.start_cluster_sync()
    assert Cluster.from_file(cluster_id="x").running
    c.stop_cluster_sync()
    assert files(home) == []


def test_a_dead_cluster_is_replaced(home):
    c = Cluster(n=1, cluster_id="x").start_cluster_sync()
    dead(c)
    again = Cluster(n=1, cluster_id="x").start_cluster_sync()
    assert again.running
    again.stop_cluster_sync()
    assert files(home) == []


def test_the_file_of_a_later_run_is_left_alone(home):
    old = Cluster(n=1, cluster_id="x").start_cluster_sync()
    stopped_by = Cluster.from_file(cluster_id="x")
    stopped_by.stop_cluster_sync()
    new = Cluster(n=1, cluster_id="x").start_cluster_sync()
    text = new.cluster_file.read_text()
    old.stop_engines_sync()
    assert new.cluster_file.read_text() == text
    old.remove_cluster_file()
    assert new.cluster_file.read_text() == text
    new.stop_cluster_sync()
    assert old.start_cluster_sync().cluster_file.exists()
    old.stop_cluster_sync()
    assert files(home) == []


def test_leftover_engines_of_a_dead_controller_are_stopped(home):
    c = Cluster(n=1, cluster_id="x").start_cluster_sync()
    engines = c.engine_set.key
    dead(c)
    alive.add(engines)
    again = Cluster(n=1, cluster_id="x").start_cluster_sync()
    assert engines not in alive
    again.stop_cluster_sync()


@pytest.mark.parametrize("ends, what", [(FakeController, "controller"), (FakeEngines, "engines")])
def test_what_ends_too_early_is_told_and_nothing_is_left(home, monkeypatch, ends, what):
    monkeypatch.setattr(FakeController, "ready", False)

    def start(self):
        Fake.start(self)
        alive.discard(self.key)
    monkeypatch.setattr(ends, "start", start)
    with pytest.raises(ipp.LauncherError, match=f"(?s)The {what} of cluster 'x' was killed by SIGKILL.*last words"):
        Cluster(n=1, cluster_id="x").start_cluster_sync()
    assert files(home) == [] and not alive


def test_a_controller_that_writes_no_file(home, monkeypatch):
    monkeypatch.setattr(FakeController, "ready", False)
    with pytest.raises(ipp.LauncherError, match="not ready in 0.01 s: There is no file"):
        Cluster(n=1, engine_timeout=0.01).start_cluster_sync()
    assert files(home) == [] and not alive


def test_engines_that_do_not_come(home):
    with pytest.raises(ipp.LauncherError, match="(?s)2 of 3 engines were ready after 60 s.*last words of the engine"):
        Cluster(n=3).start_and_connect_sync()
    assert files(home) == [] and not alive and FakeClient.closed == 1


def test_engines_that_end_while_waited_for(home, monkeypatch):
    def start(self):
        Fake.start(self)
        if len(history) > 2:
            alive.discard(self.key)
    monkeypatch.setattr(FakeEngines, "start", start)
    c = Cluster(n=1).start_cluster_sync()
    client = c.connect_client_sync()
    c.start_engines_sync(2)
    with pytest.raises(ipp.LauncherError, match="(?s)engines .* was killed by SIGKILL.*last words of the engine"):
        c.wait_for_engines(client, 3)
    c.stop_cluster_sync()


# ---------------------------------------------------------------- cluster files


def test_from_file_and_dict(home):
    c = Cluster(n=2, cluster_id="", engine_timeout=9).start_cluster_sync()
    found = Cluster.from_file()
    assert found.running and found.n == 2 and found.engine_timeout == 9 and not found.shutdown_atexit
    assert found.to_dict() == c.to_dict() == json.loads(c.cluster_file.read_text())
    assert Cluster.from_file(c.cluster_file).running and Cluster.from_dict(c.to_dict()).running
    found.stop_cluster_sync()
    assert not c.running and files(home) == []
    with pytest.raises(ipp.NoCluster, match="no cluster file .*cluster-.json") as e:
        Cluster.from_file()
    assert e.value.exit_code == 12


def test_manager():
    manager = ClusterManager()
    key, c = manager.new_cluster(n=1, cluster_id="a", profile="p")
    assert key == "p:a" and manager.get_cluster(key) is c
    with pytest.raises(KeyError, match="already"):
        manager.new_cluster(cluster_id="a", profile="p")
    c.start_cluster_sync()
    b = Cluster(n=1, cluster_id="b").start_cluster_sync()
    other = ClusterManager()
    assert set(other.load_clusters()) == {"p:a", "default:b"}
    assert set(other.load_clusters(profile="p")) == set(other.load_clusters(profiles=["p"])) == {"p:a"}
    assert set(other.load_clusters(profile_dirs=[b.profile_dir])) == {"default:b"}
    other.remove_cluster("default:b")
    with pytest.raises(KeyError):
        other.get_cluster("default:b")
    for cluster in (b, c):
        cluster.stop_cluster_sync()
    assert other.load_clusters() == {}


def test_clean(home):
    live = Cluster(n=1, cluster_id="live").start_cluster_sync()
    gone = Cluster(n=1, cluster_id="gone", profile="p").start_cluster_sync()
    alive.discard(gone.controller.key)
    alive.discard(gone.engine_set.key)
    for role in ("client", "engine"):
        path = config.connection_file(gone.profile_dir, "gone", role)
        config.write_json(path, {**config.read_json(path), "pid_start": "long ago"})
    (gone.profile_dir / "log" / "old.log").write_text("")
    with pytest.raises(ipp.AlreadyRunning, match="--force"):
        clean_cluster_files()
    clean_cluster_files([gone.profile_dir])
    assert files(home) == ["cluster-live.json", "ipcontroller-live-client.json", "ipcontroller-live-engine.json"]
    assert not list(gone.profile_dir.glob("log/*"))
    clean_cluster_files(force=True)
    assert files(home) == [] and not live.running


# ---------------------------------------------------------------- ipcluster


@pytest.mark.parametrize("argv, code, message", [
    (["strat"], 2, "unknown command 'strat'; choose from start, engines, stop, list, status, logs, clean."),
    (["start", "-n", "0"], 2, "-n needs a whole number above 0, not '0'."),
    (["start", "--foo"], 2, "unknown flag --foo for ipcluster start"),
    (["start", "--engines=nope"], 2, "There is no engine launcher 'nope'"),
    (["list", "--profile=nope"], 2, "There is no profile"),
    (["stop"], 12, "There is no cluster file"),
    (["stop", "x", "y"], 12, "cluster-x.json"),
    (["stop", "--all"], 12, "There is no cluster in"),
    (["list", "-o", "xml"], 2, "-o needs text or json"),
])
def test_what_is_wrong_is_one_sentence(argv, code, message, capsys):
    assert main(argv) == code
    err = capsys.readouterr().err
    assert err.startswith("ipcluster: ") and message in err and err.count("\n") == 1


def test_help(capsys):
    assert main([]) == 1
    first = capsys.readouterr().out
    assert all(f"\n  {command} " in first for command in module.COMMANDS)
    assert main(["--help"]) == 0 and capsys.readouterr().out == first
    assert main(["--version"]) == 0 and capsys.readouterr().out == ipp.__version__ + "\n"


def test_daemonize_list_stop(home, capsys):
    assert main(["start", "-n", "2", "--daemonize", "--cluster-id=x", "--", "--ping=77"]) == 0
    out = capsys.readouterr().out
    assert [text for text in ("2 engines are ready", "ipp.Client(cluster_id='x')", "ipcluster stop --cluster-id=x")
            if text not in out] == []
    found = Cluster.from_file(cluster_id="x")
    assert found.controller_args == ["--ping=77"] and not found.controller.owned
    assert main(["start", "-n", "2", "--cluster-id=x"]) == 10
    assert "cluster 'x' is already running" in capsys.readouterr().err
    assert main(["list"]) == 0
    table = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert table[0][:4] == ["PROFILE", "CLUSTER", "ID", "STATE"]
    assert table[1][:6] == ["default", "x", "running", "2/2", "local", socket.gethostname()]
    assert main(["list", "-o", "json"]) == 0
    row, = json.loads(capsys.readouterr().out)
    assert (row["engines_ready"], row["engines"], row["state"], row["cluster_id"]) == (2, 2, "running", "x")
    assert main(["stop", "x"]) == 0 and capsys.readouterr().out == "Stopped cluster 'x'.\n"
    assert files(home) == []
    assert main(["list", "-o", "json"]) == 0 and capsys.readouterr().out == "[]\n"


def test_a_dead_cluster_is_listed_with_the_reason(home, capsys):
    c = Cluster(n=2, cluster_id="x").start_cluster_sync()
    dead(c)
    assert main(["list"]) == 0
    assert "stopped  0/2" in (out := capsys.readouterr().out) and "it was killed" in out
    assert main(["stop", "x"]) == 11
    assert "cluster 'x' is not running any more" in capsys.readouterr().err
    assert "cluster-x.json" not in files(home)
    assert main(["clean"]) == 0 and files(home) == []


def test_stop_all(home, capsys):
    for name in ("a", "b"):
        Cluster(n=1, cluster_id=name).start_cluster_sync()
    assert main(["stop", "--all"]) == 0
    assert capsys.readouterr().out == "Stopped cluster 'a'.\nStopped cluster 'b'.\n"
    assert files(home) == []


def test_daemonize_fails_with_the_reason(home, capsys):
    assert main(["start", "-n", "3", "--daemonize", "--timeout=7"]) == 1
    err = capsys.readouterr().err
    assert "2 of 3 engines were ready after 7 s" in err and "last words of the engine" in err
    assert files(home) == [] and not alive


@pytest.mark.parametrize("role, code", [("controller", 1), ("engine", 1)])
def test_foreground_tells_what_ended(home, capsys, monkeypatch, role, code):
    def tell(cluster, settings):
        launcher = cluster.controller if role == "controller" else cluster.engine_set
        alive.discard(launcher.key)
        launcher.poll()
    monkeypatch.setattr(module, "_tell_ready", tell)
    assert main(["start", "-n", "2"]) == code
    assert f"last words of the {role}" in capsys.readouterr().err
    assert files(home) == [] and not alive


@pytest.mark.parametrize("signum", SIGNALS)
def test_a_signal_stops_everything(home, capsys, monkeypatch, signum):
    monkeypatch.setattr(module, "_stay", lambda cluster: os.kill(os.getpid(), signum))
    assert main(["start", "-n", "2"]) == 0
    assert f"Got {signum.name}, stopping." in capsys.readouterr().out
    assert files(home) == [] and not alive


def test_engines_for_a_controller_that_runs(capsys, monkeypatch):
    c = Cluster(n=2, cluster_id="").start_cluster_sync()
    waited = []
    monkeypatch.setattr(FakeClient, "wait_for_engines", lambda self, n, timeout: waited.append(n))
    assert main(["engines", "-n", "3", "--daemonize"]) == 0
    found = Cluster.from_file()
    assert waited == [5] and [launcher.n for launcher in found.engines.values()] == [2, 3]
    found.stop_cluster_sync()
    assert not alive and not c.running
