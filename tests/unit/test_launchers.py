"""Launchers start real processes here, but small ones: the contract, not controllers and engines."""

from __future__ import annotations

import os
import re
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from ipclite import config, launchers
from ipclite.cluster import Cluster
from ipclite.errors import ConfigError, LauncherError, NotRunning

PY = [sys.executable, "-S", "-c"]
READ = "import sys; print('up', sys.argv[1:], flush=True); "
SLEEP = READ + "import time; time.sleep(60)"
STUBBORN = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(60)"
FORKS = """
import os, signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
if os.fork() == 0:
    os.setpgid(0, 0)
    signal.signal(signal.SIGUSR1, lambda *_: print("child got it", flush=True))
    print("child up", flush=True)
while True:
    time.sleep(60)
"""


@pytest.fixture
def make(tmp_path):
    """A function that makes launchers; whatever still runs at the end is killed and told."""
    made = []

    def make_launcher(code=SLEEP, kind="controller", **options):
        found = launchers.find_launcher(kind, "local")
        more = {"n": options.pop("n")} if "n" in options else {}
        args = options.pop("args", [])
        owned = options.pop("owned", True)
        options[f"{kind}_cmd"] = PY + [code]
        made.append(found(profile_dir=tmp_path, cluster_id="x", options=options, args=args, owned=owned, **more))
        return made[-1]
    yield make_launcher
    for launcher in made:
        if launcher.running:
            launcher.options["stop_seconds_until_kill"], launcher.patience_s = 0, 0
            launcher.stop()


def eventually(condition, timeout_s=10):
    """Wait until `condition()` is true; returns it."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.005)
    return condition()


def test_life(make, tmp_path):
    launcher = make(args=["--more"], controller_args=["--configured"])
    assert launcher.state == "before" and not launcher.running and launcher.get_output() == ""
    launcher.start()
    pid = launcher.process.pid
    assert launcher.running and launcher.state == "running" and launcher.start_data == {"pid": pid}
    assert launcher.output_file == tmp_path / "log" / f"ipcontroller-x-{pid}.log"
    eventually(lambda: launcher.get_output())
    assert launcher.get_output() == "up " + str([f"--profile-dir={tmp_path}", "--cluster-id=x",
                                                 f"--parent={os.getpid()}", "--configured", "--more"])
    assert os.getsid(pid) == pid  # a session of its own
    assert not launcher.join(0)
    launcher.stop()
    assert launcher.state == "after" and not config.process_alive(pid)
    assert launcher.stop_data == {"pid": pid, "exit_code": -signal.SIGTERM, "reason": "was killed by SIGTERM"}
    launcher.stop()  # once more does nothing
    assert os.listdir(tmp_path / "log") == [launcher.output_file.name]


def test_what_ends_by_itself_tells(make):
    launcher, told = make("print('bye'); raise SystemExit(3)"), threading.Event()
    launcher.on_stop(lambda data: told.set())
    launcher.start()
    assert told.wait(10)
    assert launcher.stop_data["reason"] == "exited with code 3" and launcher.stop_data["exit_code"] == 3
    assert launcher.get_output() == "bye" and launcher.join() and not launcher.running
    late = []
    launcher.on_stop(late.append)
    assert late == [launcher.stop_data]


def test_a_stubborn_process_is_killed(make):
    launcher = make(STUBBORN, stop_seconds_until_kill=0.05)
    launcher.start()
    eventually(launcher.get_output)
    launcher.stop()
    assert launcher.stop_data["exit_code"] == -signal.SIGKILL


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="sessions are looked up in /proc")
def test_engines_get_signals_and_end_with_their_agent(make):
    launcher = make(FORKS, "engine", n=1, stop_seconds_until_kill=0.05)
    launcher.patience_s = 0
    launcher.start()
    eventually(launcher.get_output)
    child, = launchers.relatives(launcher.process.pid, "children")
    its_start = config.process_start(child)
    launcher.signal(signal.SIGUSR1)
    eventually(lambda: "child got it" in launcher.get_output())
    launcher.stop()
    eventually(lambda: not config.process_alive(child, its_start))


def test_output_is_limited(make):
    launcher = make("for i in range(500): print(i)", output_limit=3)
    launcher.start()
    launcher.join()
    assert launcher.get_output() == "497\n498\n499" and launcher.get_output(1) == "499"


def test_environment_and_directory(make, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "/existing")
    launcher = make("import os; print(os.environ['PYTHONPATH'], os.environ['A'], os.getcwd())",
                    environment={"A": 1}, work_dir=str(tmp_path))
    launcher.start()
    launcher.join()
    assert launcher.get_output() == f"{Path(launchers.__file__).parents[1]}{os.pathsep}/existing 1 {tmp_path}"


def test_to_and_from_dict(make):
    launcher = make(kind="engine", n=3, owned=False)
    assert not [arg for arg in launcher.args if arg.startswith("--parent")]
    launcher.start()
    state = launcher.to_dict()
    eventually(launcher.get_output)
    other = type(launcher).from_dict(state, {"stop_seconds_until_kill": 5})
    assert other.running and other.n == 3 and other.get_output() == launcher.get_output()
    told = threading.Event()
    other.on_stop(lambda data: told.set())
    other.stop()
    assert told.wait(10) and other.stop_data["reason"] == "has ended" and not launcher.running
    with pytest.raises(NotRunning, match="The engine, pid .* has ended. up "):
        type(launcher).from_dict(state)


def test_a_recycled_pid_is_left_alone(make):
    launcher = make()
    launcher.start()
    with pytest.raises(NotRunning):
        type(launcher).from_dict({**launcher.to_dict(), "pid_start": "another time"})
    launchers.Process(launcher.process.pid, "another time").send(signal.SIGKILL)
    assert launcher.running


def test_another_host(make):
    launcher = make()
    launcher.start()
    found = type(launcher).from_dict({**launcher.to_dict(), "host": "elsewhere"})
    assert found.running and found.to_dict()["host"] == "elsewhere"
    for act in (found.stop, lambda: found.signal(signal.SIGTERM)):
        with pytest.raises(LauncherError, match="runs on elsewhere; go there"):
            act()
    assert launcher.running


def test_what_cant_be_started(make, tmp_path):
    launcher = make()
    launcher.options["controller_cmd"] = ["/nowhere/python"]
    with pytest.raises(LauncherError, match="can't be started: /nowhere/python: No such file"):
        launcher.start()
    assert launcher.state == "before" and os.listdir(tmp_path / "log") == []
    os.rmdir(tmp_path / "log")
    (tmp_path / "log").write_text("")
    with pytest.raises(LauncherError, match="log directory .* can't be written"):
        launcher.start()


def test_wrote(make):
    import socket
    launcher = make()
    launcher.start()
    assert launcher.wrote({"pid": launcher.process.pid, "host": socket.gethostname()})
    assert not launcher.wrote({"pid": launcher.process.pid + 1, "host": socket.gethostname()})


class Mine(launchers.LocalControllerLauncher):
    """A launcher of the user's own."""


def test_find_launcher():
    local = launchers.LocalEngineSetLauncher
    assert launchers.find_launcher("engine", "local") is launchers.find_launcher("engine", "Local") is local
    assert launchers.find_launcher("engine", "LocalEngineSetLauncher") is local
    assert launchers.find_launcher("engine", "some.package.launcher.LocalEngineSetLauncher") is local
    assert launchers.find_launcher("controller", Mine) is Mine
    assert launchers.find_launcher("controller", f"{__name__}.Mine") is Mine
    assert launchers.launcher_name(local) == "local" and launchers.launcher_name(Mine) == f"{__name__}.Mine"


@pytest.mark.parametrize("name, message", [("locl", "choose from local"), ("no.such.Launcher", "can't be imported"),
                                           ("os.path.Nope", "can't be imported"),
                                           ("os.path.join", "no launcher class")])
def test_no_such_launcher(name, message):
    with pytest.raises(ConfigError, match=message):
        launchers.find_launcher("engine", name)


def test_exit_reason():
    assert [launchers.exit_reason(code) for code in (None, 0, 1, -9, -64)] == [
        "has ended", "exited with code 0", "exited with code 1", "was killed by SIGKILL",
        f"was killed by {signal.Signals(64).name}"]
    assert launchers.exit_reason(-200) == "was killed by signal 200"


def script_of(role, name, sections):
    """The job script that a cluster with these settings would submit."""
    found = Cluster(n=4, **{f"{role}s" if role == "engine" else role: name}, cluster_id="x", config=sections, load_profile=False)
    return found.job_script(role)


@pytest.mark.parametrize("name", ["pbs", "PBS", "PBSEngineSetLauncher", "ipyparallel.cluster.launcher.PBSEngineSetLauncher"])
def test_settings_of_batch_systems_are_inherited(name):
    controller = name.replace("EngineSet", "Controller")
    for section in ("PBSLauncher", "BatchSystemLauncher"):
        for role, its_name in (("engine", name), ("controller", controller)):
            assert "#PBS -q veryshort.q" in script_of(role, its_name, {section: {"queue": "veryshort.q"}})
    both = {"BatchSystemLauncher": {"queue": "a"}, "PBSLauncher": {"queue": "b"}, "PBSEngineSetLauncher": {"queue": "c"}}
    assert "-q c" in script_of("engine", name, both) and "-q b" in script_of("controller", controller, both)
    assert "-q" not in script_of("engine", name, {"SlurmLauncher": {"queue": "d"}, "PBSControllerLauncher": {"queue": "e"}})


@pytest.mark.parametrize("name", ["pbs", "sge", "slurm", "lsf", "htcondor", "batch"])
def test_each_batch_system_has_its_classes(name):
    for role, kind in (("controller", "Controller"), ("engine", "EngineSet")):
        found = launchers.find_launcher(role, name)
        assert found is getattr(launchers, found.__name__) and found.role == role and found.remote and found.queued
        assert launchers.launcher_name(found) == name and found.__name__.endswith(f"{kind}Launcher")
        assert issubclass(found, launchers.BatchSystemLauncher)
        assert config.known_names("cluster")[found.__name__]["queue"].section == "BatchSystemLauncher"


def test_settings_of_batch_systems_take_what_people_write(caplog):
    text = script_of("engine", "slurm", {"SlurmLauncher": {
        "gpus": 2, "engines_per_node": 2, "options": "--exclusive\n--nice=100", "prologue": "module load python"}})
    for line in ("#SBATCH --gres=gpu:2", "#SBATCH --exclusive\n#SBATCH --nice=100\n", "\nmodule load python\n"):
        assert line in text
    assert "#SBATCH --mem-per-cpu=4G" in script_of("engine", "slurm", {"BatchSystemLauncher": {"memory": "4G"}})
    with caplog.at_level("WARNING"):
        script_of("controller", "pbs", {"PBSControllerLauncher": {"connection_info_timeout": 60},
                                        "PBSLauncher": {"job_id_regexp": re.compile(r"\d+")}})
    assert "connection_info_timeout in config is not needed" in caplog.text
    with pytest.raises(ConfigError, match="submit_rate in config needs a number above 0"):
        script_of("engine", "slurm", {"SlurmLauncher": {"submit_rate": 0}})


@pytest.mark.parametrize("said, name", [("echo pbs_version = 23.06.06", "pbs"), ("echo Version: 6.1.2 >&2", "torque"),
                                        ("echo 'Unknown option: version' >&2; exit 1", "torque"), (None, "pbs")])
def test_torque_is_told_from_pbs_pro(said, name, tmp_path, monkeypatch):
    if said:
        (tmp_path / "qstat").write_text(f"#!/bin/sh\n{said}\n")
        (tmp_path / "qstat").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert launchers.PBSEngineSetLauncher(n=1, profile_dir=tmp_path).dialect.name == name


def test_a_batch_system_that_is_not_known():
    with pytest.raises(ConfigError, match="set submit_command, delete_command and batch_template"):
        script_of("engine", "batch", {})
    text = script_of("engine", "batch", {"BatchSystemLauncher": {
        "submit_command": ["put"], "delete_command": ["drop"], "batch_template": "run {n//2} {program}"}})
    assert "# put " in text and "run 2 " in text


def test_commands_in_the_form_of_ipython_parallel():
    launcher = launchers.SlurmEngineSetLauncher(n=1, profile_dir="/", options={
        "submit_command": ["sbatch", "--parsable"], "delete_command": ["kill-it"], "signal_command": ["signal-it", "-s"]})
    assert launcher.dialect.submit == ("sbatch", "--parsable") and launcher.dialect.delete == ("kill-it", "IDS")
    assert launcher.dialect.signal == ("signal-it", "-s", "{signal}", "IDS")


def test_a_launcher_has_its_role():
    with pytest.raises(ConfigError, match="is a controller launcher"):
        launchers.find_launcher("engine", launchers.LocalControllerLauncher)
