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
    *[("controller", f"c.IPController.db_class = 'ipyparallel.controller.{name}'",
       {"IPController.db_class": f"ipyparallel.controller.{name}"})
      for name in ("dictdb.DictDB", "mongodb.MongoDB", "sqlitedb.SQLiteDB", "dictdb.NoDB")],
    ("controller", "c.MongoDB.database = 'tasks'", {"MongoDB.database": "tasks"}),
    ("controller", "c.SQLiteDB.table = 'tasks'", {"SQLiteDB.table": "tasks"}),
    ("controller", "c.MongoDB.connection_args = []", {"MongoDB.connection_args": []}),
    ("controller", "c.MongoDB.connection_kwargs = {}", {"MongoDB.connection_kwargs": {}}),
    ("cluster", "c.IPClusterEngines.n = 64", {"Cluster.n": 64}),
    ("cluster", "c.IPClusterEngines.engine_launcher_class = 'ssh'", {"Cluster.engine_launcher_class": "ssh"}),
    ("cluster", "c.IPClusterEngines.engine_launcher_class = 'ipyparallel.cluster.launcher.SSHEngineSetLauncher'",
     {"Cluster.engine_launcher_class": "ipyparallel.cluster.launcher.SSHEngineSetLauncher"}),
    ("cluster", "c.IPClusterStart.controller_launcher_class = 'ssh'", {"Cluster.controller_launcher_class": "ssh"}),
    ("cluster", "c.Cluster.engine_launcher_class = 'mpi'", {"Cluster.engine_launcher_class": "mpi"}),
    ("cluster", "c.Cluster.controller_launcher_class = 'pbs'\nc.Cluster.engine_launcher_class = 'pbs'",
     {"Cluster.controller_launcher_class": "pbs", "Cluster.engine_launcher_class": "pbs"}),
    ("cluster", "c.PBSEngineSetLauncher.batch_template_file = 'pbs.engine.template'",
     {"PBSEngineSetLauncher.batch_template_file": None}),
    ("cluster", "c.PBSControllerLauncher.batch_template_file = 'pbs.controller.template'",
     {"PBSControllerLauncher.batch_template_file": None}),
    ("cluster", "c.PBSLauncher.queue = 'veryshort.q'", {"PBSLauncher.queue": "veryshort.q"}),
    ("cluster", "import os\nc.SSHControllerLauncher.hostname = 'controller.example.com'\n"
                "c.SSHControllerLauncher.user = os.environ.get('USER','username')\n"
                "c.SSHControllerLauncher.controller_args = ['--reuse', '--ip=*', '--profile-dir=/path/to/cd']",
     {"SSHControllerLauncher.hostname": "controller.example.com", "SSHControllerLauncher.user": None,
      "SSHControllerLauncher.controller_args": ["--reuse", "--ip=*", "--profile-dir=/path/to/cd"]}),
    ("cluster", "c.SSHEngineSetLauncher.engines = { 'host1.example.com' : 2, 'host2.example.com' : 5, "
                "'host3.example.com' : (1, ['--profile-dir=/home/different/location']), "
                "'host4.example.com' : {'n': 3, 'engine_args': ['--profile-dir=/away/location'], "
                "'engine_cmd': ['/home/venv/bin/python', '-m', 'ipyparallel.engine']}, 'host5.example.com' : 8 }",
     {"SSHEngineSetLauncher.engines": None}),
    ("cluster", "c.SSHEngineSetLauncher.engine_args = ['--profile-dir=/path/to/profile_ssh']",
     {"SSHEngineSetLauncher.engine_args": ["--profile-dir=/path/to/profile_ssh"]}),
    ("cluster", "c.SSHLauncher.to_send = []\nc.SSHLauncher.to_fetch = []",
     {"SSHLauncher.to_send": [], "SSHLauncher.to_fetch": []}),
    ("engine", "c.MPI.use = 'mpi4py'", {"MPI.use": "mpi4py"}),
    ("engine", "c.MPI.init_script = 'from mpi4py import MPI'", {"MPI.init_script": "from mpi4py import MPI"}),
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
        assert (values[name] if value is None else values[name] == value), (name, values[name])
        assert origins[name].startswith("c.") and str(path) in origins[name]
    assert err == "", "it is understood, every word of it"


# What `ipython profile create --parallel` of IPython Parallel writes, without the # before each line, and what older
# versions wrote.
OLD_PROFILE = {
    "cluster": """
c = get_config()
c.Application.log_datefmt = '%Y-%m-%d %H:%M:%S'
c.Application.log_format = '[%(name)s]%(highlevel)s %(message)s'
c.Application.log_level = 30
c.Application.logging_config = {}
c.Application.show_config = False
c.Application.show_config_json = False
c.BaseIPythonApplication.add_ipython_dir_to_sys_path = False
c.BaseIPythonApplication.auto_create = False
c.BaseIPythonApplication.copy_config_files = False
c.BaseIPythonApplication.extra_config_file = ''
c.BaseIPythonApplication.ipython_dir = ''
c.BaseIPythonApplication.overwrite = False
c.BaseIPythonApplication.profile = 'default'
c.BaseIPythonApplication.verbose_crash = False
c.BaseParallelApplication.clean_logs = False
c.BaseParallelApplication.cluster_id = ''
c.BaseParallelApplication.log_to_file = False
c.BaseParallelApplication.work_dir = '.'
c.IPClusterEngines.daemonize = False
c.IPClusterEngines.early_shutdown = 30
c.IPClusterEngines.engine_launcher_class = 'local'
c.IPClusterEngines.n = 3
c.IPClusterStart.auto_create = True
c.IPClusterStart.clean_logs = True
c.IPClusterStart.controller_ip = ''
c.IPClusterStart.controller_launcher_class = 'LocalControllerLauncher'
c.IPClusterStart.controller_location = ''
c.IPClusterStart.delay = 0.5
c.Cluster.cluster_file = ''
c.Cluster.controller_args = []
c.Cluster.controller_launcher_class = 'local'
c.Cluster.delay = 1.0
c.Cluster.engine_launcher_class = 'ipyparallel.cluster.launcher.LocalEngineSetLauncher'
c.Cluster.engine_timeout = 60
c.Cluster.load_profile = True
c.Cluster.send_engines_connection_env = True
c.Cluster.shutdown_atexit = True
c.ProfileDir.location = ''
c.BaseLauncher.output_limit = 100
c.BaseLauncher.stop_timeout = 60
c.BaseLauncher.work_dir = '.'
c.ControllerLauncher.connection_info_timeout = 60
c.LocalControllerLauncher.controller_args = []
c.LocalEngineLauncher.engine_args = []
c.LocalEngineSetLauncher.delay = 0.1
c.LocalProcessLauncher.poll_seconds = 30
c.LocalProcessLauncher.stop_seconds_until_kill = 5
c.MPILauncher.mpi_args = []
c.MPILauncher.mpi_cmd = ['mpiexec']
c.MPIExecLauncher.mpi_args = ['--verbose']
c.MPIEngineSetLauncher.stop_seconds_until_kill = 5
c.SSHLauncher.hostname = ''
c.SSHLauncher.location = ''
c.SSHLauncher.poll_seconds = 60
c.SSHLauncher.remote_profile_dir = ''
c.SSHLauncher.remote_python = 'python3'
c.SSHLauncher.scp_args = []
c.SSHLauncher.scp_cmd = ['scp']
c.SSHLauncher.ssh_args = []
c.SSHLauncher.ssh_cmd = ['ssh']
c.SSHLauncher.to_fetch = []
c.SSHLauncher.to_send = []
c.SSHLauncher.user = ''
c.SSHControllerLauncher.controller_args = []
c.SSHEngineSetLauncher.engines = {'a': 1, 'b': (2, ['--quiet']), 'c': {'n': 3, 'engine_args': []}}
c.SSHProxyEngineSetLauncher.ipcluster_args = []
c.SSHProxyEngineSetLauncher.ipcluster_cmd = ['ipcluster']
c.BatchSystemLauncher.batch_file_name = 'batch_script'
c.BatchSystemLauncher.batch_template = ''
c.BatchSystemLauncher.batch_template_file = ''
c.BatchSystemLauncher.delete_command = ['']
c.BatchSystemLauncher.job_id_regexp = ''
c.BatchSystemLauncher.job_id_regexp_group = 0
c.BatchSystemLauncher.namespace = {}
c.BatchSystemLauncher.output_file = ''
c.BatchSystemLauncher.queue = ''
c.BatchSystemLauncher.signal_command = ['']
c.BatchSystemLauncher.submit_command = ['']
c.PBSEngineSetLauncher.batch_file_name = 'pbs_engines'
c.SGELauncher.queue = 'short'
c.SGEControllerLauncher.batch_template = ''
c.SlurmLauncher.account = ''
c.SlurmLauncher.options = ''
c.SlurmLauncher.qos = ''
c.SlurmLauncher.timelimit = ''
c.LSFLauncher.queue = ''
c.HTCondorEngineSetLauncher.batch_file_name = 'htcondor_engines'
c.WindowsHPCLauncher.job_cmd = 'job'
""",
    "controller": """
c.BaseParallelApplication.log_to_file = False
c.HubFactory.ip = '127.0.0.1'
c.IPControllerApp.reuse_files = False
c.IPController.auto_create = True
c.IPController.broadcast_scheduler_depth = 1
c.IPController.client_ip = ''
c.IPController.client_json_file = 'ipcontroller-client.json'
c.IPController.client_ports = []
c.IPController.client_transport = 'tcp'
c.IPController.control = (0, 0)
c.IPController.curve_publickey = b''
c.IPController.curve_secretkey = b''
c.IPController.db_class = 'DictDB'
c.IPController.enable_curve = False
c.IPController.engine_ip = ''
c.IPController.engine_json_file = 'ipcontroller-engine.json'
c.IPController.engine_ports = []
c.IPController.engine_ssh_server = ''
c.IPController.engine_transport = 'tcp'
c.IPController.hb = (0, 0)
c.IPController.iopub = (0, 0)
c.IPController.ip = '127.0.0.1'
c.IPController.location = ''
c.IPController.mon_port = 0
c.IPController.monitor_ip = ''
c.IPController.monitor_transport = 'tcp'
c.IPController.mux = (0, 0)
c.IPController.notifier_port = 0
c.IPController.ports = []
c.IPController.registration_timeout = 0
c.IPController.regport = 0
c.IPController.restore_engines = False
c.IPController.reuse_files = False
c.IPController.ssh_server = ''
c.IPController.task = (0, 0)
c.IPController.transport = 'tcp'
c.IPController.use_threads = False
c.HeartMonitor.debug = False
c.HeartMonitor.max_heartmonitor_misses = 10
c.HeartMonitor.period = 3000
c.TaskScheduler.hwm = 1
c.TaskScheduler.scheme_name = 'leastload'
c.DictDB.cull_fraction = 0.1
c.DictDB.record_limit = 1024
c.DictDB.size_limit = 1073741824
c.SQLiteDB.filename = 'tasks.db'
c.SQLiteDB.location = ''
c.SQLiteDB.table = 'ipython-tasks'
c.MongoDB.connection_args = []
c.MongoDB.connection_kwargs = {}
c.MongoDB.database = 'ipython-tasks'
c.Session.buffer_threshold = 1024
c.Session.key = b''
c.Session.signature_scheme = 'hmac-sha256'
c.Session.username = 'me'
c.ProfileDir.location = ''
""",
    "engine": """
c.EngineFactory.timeout = 5.0
c.IPEngineApp.work_dir = '.'
c.IPEngine.auto_create = False
c.IPEngine.connection_info_env = ''
c.IPEngine.curve_publickey = b''
c.IPEngine.curve_secretkey = b''
c.IPEngine.curve_serverkey = b''
c.IPEngine.display_hook_factory = 'ipykernel.displayhook.ZMQDisplayHook'
c.IPEngine.enable_nanny = True
c.IPEngine.id = None
c.IPEngine.init_mpi = ''
c.IPEngine.location = ''
c.IPEngine.max_heartbeat_misses = 50
c.IPEngine.mpi_registration_delay = 0.02
c.IPEngine.out_stream_factory = 'ipykernel.iostream.OutStream'
c.IPEngine.paramiko = False
c.IPEngine.registration_url = ''
c.IPEngine.sshkey = ''
c.IPEngine.sshserver = ''
c.IPEngine.startup_command = ''
c.IPEngine.startup_script = ''
c.IPEngine.timeout = 5.0
c.IPEngine.url_file = ''
c.IPEngine.url_file_name = 'ipcontroller-engine.json'
c.IPEngine.use_mpi = False
c.IPEngine.wait_for_url_file = 10.0
c.MPI.init_script = ''
c.MPI.use = ''
c.IPKernelApp.exec_lines = []
c.IPKernelApp.extensions = []
c.InteractiveShellApp.exec_files = []
c.InteractiveShellApp.matplotlib = None
c.InteractiveShell.autocall = 0
c.ZMQInteractiveShell.colors = 'Neutral'
c.ConnectionFileMixin.ip = ''
c.Session.key = b''
c.ProfileDir.location = ''
""",
}


def test_a_whole_profile_of_ipython_parallel(ipython_dir):
    """It loads unchanged, says in warnings what has no effect, and a cluster starts with it."""
    for app, text in OLD_PROFILE.items():
        write(ipython_dir, app, text)
    values, _, err = shown("cluster start")
    assert (values["Cluster.n"], values["Cluster.delay"], values["BaseLauncher.output_limit"]) == (3, 1.0, 100)
    assert "c.IPClusterEngines.early_shutdown" in err and "Traceback" not in err
    assert err.count("\n") <= 2, "one line for all that is not needed, one for what is absent"
    values, _, err = shown("controller")
    assert (values["HeartMonitor.max_heartmonitor_misses"], values["TaskScheduler.hwm"]) == (10, 1)
    assert values["IPController.transport"] == "tcp" and "c.IPController.use_threads" in err
    values, _, err = shown("engine")
    assert values["IPEngine.timeout"] == 5.0 and "c.IPEngine.enable_nanny" in err
    with Command("cluster", "start", "--quiet", "-n", "1") as cluster:
        cluster.says("1 engines are ready")
        with ipp.Client() as rc:
            assert rc[0].apply_sync(abs, -1) == 1


def test_the_whole_page_at_once(ipython_dir):
    for app in ("controller", "cluster", "engine"):
        write(ipython_dir, app, "\n".join(text for its_app, text, _ in SEED if its_app == app))
    for role in ("controller", "cluster start", "engine"):
        _, _, err = shown(role)
        assert err == ""


@pytest.mark.parametrize("name, line", [
    ("winhpc", "c.Cluster.engine_launcher_class = 'winhpc'"),
    ("ipyparallel.cluster.launcher.WindowsHPCEngineSetLauncher",
     "c.IPClusterEngines.engine_launcher_class = 'ipyparallel.cluster.launcher.WindowsHPCEngineSetLauncher'"),
])
def test_a_launcher_that_is_not_there_is_told_when_it_is_used(ipython_dir, name, line):
    write(ipython_dir, "cluster", f"{line}\nc.PBSLauncher.queue = 'short.q'\n")
    start = run("cluster", "start", "-n", "1")
    assert start.process.returncode == 2
    assert f"The engine launcher {name!r} is not in this version; choose from local" in start.err
    with Command("cluster", "start", "-n", "1", "--engines=local") as other:
        other.says("1 engines are ready")


def test_settings_of_absent_launchers_give_one_warning(ipython_dir):
    path = write(ipython_dir, "cluster", "c.WindowsHPCLauncher.scheduler = 'q'\nc.IPEngineSetJob.priority = 'Highest'\nc.Cluster.n = 2\n")
    values, _, err = shown("cluster start")
    assert values["Cluster.n"] == 2
    assert err.count("\n") == 1 and "c.WindowsHPCLauncher.scheduler, c.IPEngineSetJob.priority" in err and str(path) in err


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


@pytest.mark.parametrize("ip", ["lo", "localhost", "", "127.0.0.1"])
def test_addresses_names_and_interfaces(ipython_dir, ip):
    """A connection file holds what others can dial, whatever was typed."""
    if ip == "lo" and ip not in (name for _, name in socket.if_nameindex()):
        ip = "lo0"
    with controller(ipython_dir, f"--ip={ip}", "--transport=tcp"):
        assert connection(ipython_dir)["url"].startswith("tcp://127.0.0.1:")
        assert connection(ipython_dir)["location"] == socket.gethostname()
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
