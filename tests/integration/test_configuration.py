"""Config files: every line of the documents that people start from, and how files, flags and defaults come together."""

from __future__ import annotations

import json
import os
import socket

import pytest
from shell import Command, connection, controller, one_sentence, run

import ipclite as ipp


def write(ipython_dir, app, text, profile="default", kind="py"):
    folder = ipython_dir / f"profile_{profile}"
    folder.mkdir(exist_ok=True)
    path = folder / f"ip{app}_config.{kind}"
    path.write_text(text)
    return path


def shown(role, *words):
    """{"Section.key": value} and {"Section.key": origin}, as `--show-config-json` prints them; and the warnings."""
    done = run(*role.split(), *words, "--show-config-json")
    assert done.process.returncode == 0, done.err
    table = json.loads(done.out)
    return {k: row["value"] for k, row in table.items()}, {k: row["from"] for k, row in table.items()}, done.err


SEED = [
    ("controller", "c.IPController.ip = '*'", {"IPController.ip": "*"}),
    ("controller", "c.IPController.location = 'controllerhost.tld'", {"IPController.location": "controllerhost.tld"}),
    ("controller", "c.IPController.location = '10.0.1.5'", {"IPController.location": "10.0.1.5"}),
    ("controller", "import socket\nhostname = socket.gethostname()\n"
                   "ex_ip = socket.gethostbyname_ex(hostname)[-1][-1]\nc.IPController.location = ex_ip",
     {"IPController.location": None}),
    ("controller", "c.IPController.ssh_server = 'login.mycluster.net'",
     {"IPController.ssh_server": "login.mycluster.net"}),
    *[("controller", f"c.IPController.db_class = 'ipyparallel.controller.{name}'", {})
      for name in ("dictdb.DictDB", "mongodb.MongoDB", "sqlitedb.SQLiteDB", "dictdb.NoDB")],
    ("controller", "c.MongoDB.database = 'tasks'", {}),
    ("controller", "c.SQLiteDB.table = 'tasks'", {}),
    ("controller", "c.MongoDB.connection_args = []", {}),
    ("controller", "c.MongoDB.connection_kwargs = {}", {}),
    ("cluster", "c.IPClusterEngines.n = 64", {"Cluster.n": 64}),
    ("cluster", "c.IPClusterEngines.engine_launcher_class = 'ssh'", {"Cluster.engine_launcher_class": "ssh"}),
    ("cluster", "c.IPClusterEngines.engine_launcher_class = 'ipyparallel.cluster.launcher.SSHEngineSetLauncher'",
     {"Cluster.engine_launcher_class": "ipyparallel.cluster.launcher.SSHEngineSetLauncher"}),
    ("cluster", "c.IPClusterStart.controller_launcher_class = 'ssh'", {"Cluster.controller_launcher_class": "ssh"}),
    ("cluster", "c.Cluster.engine_launcher_class = 'mpi'", {"Cluster.engine_launcher_class": "mpi"}),
    ("cluster", "c.Cluster.controller_launcher_class = 'pbs'\nc.Cluster.engine_launcher_class = 'pbs'",
     {"Cluster.controller_launcher_class": "pbs", "Cluster.engine_launcher_class": "pbs"}),
    ("cluster", "c.PBSEngineSetLauncher.batch_template_file = 'pbs.engine.template'", {}),
    ("cluster", "c.PBSControllerLauncher.batch_template_file = 'pbs.controller.template'", {}),
    ("cluster", "c.PBSLauncher.queue = 'veryshort.q'", {}),
    ("cluster", "import os\nc.SSHControllerLauncher.hostname = 'controller.example.com'\n"
                "c.SSHControllerLauncher.user = os.environ.get('USER','username')\n"
                "c.SSHControllerLauncher.controller_args = ['--reuse', '--ip=*', '--profile-dir=/path/to/cd']", {}),
    ("cluster", "c.SSHEngineSetLauncher.engines = { 'host1.example.com' : 2, 'host2.example.com' : 5, "
                "'host3.example.com' : (1, ['--profile-dir=/home/different/location']), "
                "'host4.example.com' : {'n': 3, 'engine_args': ['--profile-dir=/away/location'], "
                "'engine_cmd': ['/home/venv/bin/python', '-m', 'ipyparallel.engine']}, 'host5.example.com' : 8 }", {}),
    ("cluster", "c.SSHEngineSetLauncher.engine_args = ['--profile-dir=/path/to/profile_ssh']", {}),
    ("cluster", "c.SSHLauncher.to_send = []\nc.SSHLauncher.to_fetch = []", {}),
    ("engine", "c.MPI.use = 'mpi4py'", {}),
    ("engine", "c.MPI.init_script = 'from mpi4py import MPI'", {}),
    ("engine", "c.IPEngine.startup_script = u'/path/to/my/startup.py'",
     {"IPEngine.startup_script": "/path/to/my/startup.py"}),
    ("engine", "c.IPEngine.startup_command = 'import numpy, scipy, mpi4py'",
     {"IPEngine.startup_command": "import numpy, scipy, mpi4py"}),
    ("engine", "c.IPEngine.work_dir = u'/path/to/scratch/'", {"Application.work_dir": "/path/to/scratch"}),
]


@pytest.mark.parametrize("app, text, wanted", SEED, ids=[text.splitlines()[-1][:60] for _, text, _ in SEED])
def test_a_line_of_the_page(ipython_dir, app, text, wanted):
    path = write(ipython_dir, app, text)
    values, origins, err = shown("cluster start" if app == "cluster" else app)
    for name, value in wanted.items():
        assert values[name] == value if value is not None else values[name], (name, values[name])
        assert origins[name].startswith("c.") and str(path) in origins[name]
    assert len(err.splitlines()) <= 1, "at most one warning"


def test_the_whole_page_at_once(ipython_dir):
    for app in ("controller", "cluster", "engine"):
        write(ipython_dir, app, "\n".join(text for its_app, text, _ in SEED if its_app == app))
    for role in ("controller", "cluster start", "engine"):
        _, _, err = shown(role)
        assert "Traceback" not in err


@pytest.mark.parametrize("name, line", [
    ("pbs", "c.Cluster.engine_launcher_class = 'pbs'"),
    ("ipyparallel.cluster.launcher.SSHEngineSetLauncher",
     "c.IPClusterEngines.engine_launcher_class = 'ipyparallel.cluster.launcher.SSHEngineSetLauncher'"),
])
def test_a_launcher_that_is_not_there_is_told_when_it_is_used(ipython_dir, name, line):
    write(ipython_dir, "cluster", f"{line}\nc.PBSLauncher.queue = 'short.q'\n")
    start = run("cluster", "start", "-n", "1")
    assert start.process.returncode == 2
    assert f"The engine launcher {name!r} is not in this version; choose from local." in start.err
    with Command("cluster", "start", "-n", "1", "--engines=local") as other:
        other.says("1 engines are ready")


def test_settings_of_absent_launchers_give_one_warning(ipython_dir):
    path = write(ipython_dir, "cluster", "c.PBSLauncher.queue = 'q'\nc.SSHLauncher.to_send = []\nc.Cluster.n = 2\n")
    values, _, err = shown("cluster start")
    assert values["Cluster.n"] == 2
    assert err.count("\n") == 1 and "c.PBSLauncher.queue, c.SSHLauncher.to_send" in err and str(path) in err


def test_a_line_that_lacks_its_c(ipython_dir):
    write(ipython_dir, "controller", "IPController.ip = '192.168.1.16'\n")
    one_sentence(run("controller"), 2, "line 1", "NameError", "write c.IPController.")


def test_who_wins(ipython_dir, tmp_path):
    write(ipython_dir, "controller", "c.HeartMonitor.period = 111\nc.IPController.ip = '127.0.0.1'\n"
                                     "c.IPController.location = 'py'\n")
    extra = tmp_path / "extra.py"
    extra.write_text("c.IPController.location = 'extra'\nc.TaskScheduler.hwm = 7\n")
    values, origins, _ = shown("controller", f"--config={extra}", "--hwm=9")
    names = ("HeartMonitor.period", "IPController.location", "TaskScheduler.hwm")
    assert [values[name] for name in names] == [111, "extra", 9]
    assert (origins["TaskScheduler.hwm"], origins["IPController.transport"]) == ("--hwm", "default")
    assert origins["IPController.location"] == f"c.IPController.location in {extra}"
    text = run("controller", "--show-config").out
    assert "HeartMonitor.period = 111  (c.HeartMonitor.period in " in text
    assert "IPController.transport = 'auto'  (default)" in text
    one_sentence(run("controller", "--config=/nowhere.py"), 2, "There is no config file /nowhere.py")


def test_showing_the_config_writes_nothing(ipython_dir):
    for role in ("controller", "engine", "cluster start", "cluster engines", "cluster list"):
        assert run(*role.split(), "--show-config").process.returncode == 0
    assert list(ipython_dir.iterdir()) == []


def test_json_config(ipython_dir):
    write(ipython_dir, "engine", json.dumps({"IPEngine": {"n": 3, "timeout": 5}, "version": 1}), kind="json")
    values, origins, _ = shown("engine")
    assert (values["IPEngine.n"], values["IPEngine.timeout"]) == (3, 5.0)
    assert origins["IPEngine.n"].endswith("ipengine_config.json")
    path = write(ipython_dir, "engine", '{"IPEngine": {"n": 3,}}', kind="json")
    one_sentence(run("engine"), 2, f"{path}, line 1")
    write(ipython_dir, "engine", "[1]", kind="json")
    one_sentence(run("engine"), 2, "needs the form")
    write(ipython_dir, "engine", '{"IPEngine": {"m": 3}}', kind="json")
    one_sentence(run("engine"), 2, "unknown key c.IPEngine.m")


def test_flags_of_old_scripts(ipython_dir):
    for words in (["--usethreads"], ["--secure"], ["--ident=me"], ["--ident", "me"], ["--Session.key=x"]):
        _, _, err = shown("controller", *words)
        assert f"{words[0].partition('=')[0]} has no effect" in err


def test_the_settings_are_those_that_are_used(ipython_dir):
    """What --show-config says is what the controller does."""
    ports = []
    for _ in range(2):
        with socket.create_server(("127.0.0.1", 0)) as probe:
            ports.append(probe.getsockname()[1])
    write(ipython_dir, "controller", f"c.IPController.client_ports = {ports[0]}\n"
                                     f"c.IPController.engine_ports = [{ports[1]}]\nc.IPController.transport = 'tcp'\n")
    with controller(ipython_dir) as boss:
        urls = [connection(ipython_dir, role)["url"] for role in ("client", "engine")]
        assert urls == [f"tcp://127.0.0.1:{port}" for port in ports]
        for told in (f"listening for clients on tcp://127.0.0.1:{ports[0]}", "database DictDB",
                     "heartbeat every 2000 ms", "scheduler leastload", "wrote connection file ", "profile directory "):
            assert told in boss.err, boss.err
        with Command("engine"):
            boss.says("engine 0 connected (pid ")


def test_two_addresses(ipython_dir):
    with controller(ipython_dir, "--IPController.client_ip=127.0.0.2", "--transport=tcp"):
        assert connection(ipython_dir)["url"].startswith("tcp://127.0.0.2:")
        assert connection(ipython_dir, "engine")["url"].startswith("tcp://127.0.0.1:")
        with ipp.Client() as rc:
            assert rc.ids == []


def test_clean_logs(ipython_dir):
    folder = ipython_dir / "profile_default" / "log"
    folder.mkdir(parents=True)
    (folder / "ipengine-999999999.log").write_text("old")
    mine = folder / f"ipengine-{os.getpid()}.log"
    mine.write_text("its process lives")
    with controller(ipython_dir, "--transport=ipc"):
        assert (folder / "ipengine-999999999.log").exists(), "nobody asked, and it is young"
    with Command("controller", "--transport=ipc", "--clean-logs", "--log-to-file") as boss:
        connection(ipython_dir)
        own = folder / f"ipcontroller-{boss.pid}.log"
        assert sorted(folder.iterdir()) == sorted([mine, own])
        assert "wrote connection file" in own.read_text()
