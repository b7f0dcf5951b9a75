"""Command lines, config files, profiles, connection files: every form that is accepted, every one that is refused."""

from __future__ import annotations

import json
import logging
import os
import socket
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from ipclite import config, files
from ipclite.errors import ConfigError, ConnectionFileError, LauncherError

INFO = {"program": "ipclite", "role": "client", "url": "", "ipc": "/tmp/x", "ssh": "", "location": "here",
        "public_key": "p", "secret_key": "s", "server_key": "k", "cluster_id": "", "run_id": "ab", "protocol": 1,
        "version": "0.1.0", "pid": os.getpid(), "host": socket.gethostname(), "started": 1.0, "reuse": False}
ROOT = os.geteuid() == 0 if hasattr(os, "geteuid") else False


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """An empty $IPYTHONDIR."""
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    return tmp_path / "ipython"


@pytest.fixture
def profile(home):
    """A function that writes a config file of the default profile."""
    def write(app: str, text: str) -> Path:
        path = config.find_profile_dir(create=True) / f"ip{app}_config.py"
        path.write_text(text)
        return path
    return write


@pytest.fixture
def package_log(caplog):
    """What the package logs at warning level and above."""
    logger = config.log()
    before, logger.propagate = logger.propagate, True
    yield caplog
    logger.propagate = before


# ---------------------------------------------------------------- the table


def test_the_table_is_consistent():
    seen = set()
    for option in config.OPTIONS:
        assert option.name not in seen
        seen.add(option.name)
        assert option.kind in config.KINDS and option.help and set(option.roles) <= set(config.PROGRAMS)
        assert option.section in {"Application", *config.CHAINS, *(n for c in config.CHAINS.values() for n in c),
                                  "HeartMonitor", "TaskScheduler", "IPClusterStop", "IPClusterList", "IPClusterClean",
                                  "IPClusterLogs", "LogWatcher", "MPI", "Profile", "DictDB", "SQLiteDB", "MongoDB", "Records"}


@pytest.mark.parametrize("role", config.PROGRAMS)
def test_each_flag_of_a_role_means_one_thing_and_defaults_are_valid(role, home):
    flags = [word.partition("=")[0] for o in config.OPTIONS if role in o.roles for word in o.flags.split()]
    assert len(flags) == len(set(flags))
    settings = config.load(role, home / "profile_default")
    assert set(settings) == {o.name for o in config.OPTIONS if role in o.roles}


@pytest.mark.parametrize("role", config.PROGRAMS)
def test_help_names_every_flag_and_help_all_every_option(role, capsys):
    for flag, wanted in (("--help", [w.partition("=")[0] for o in config.OPTIONS if role in o.roles
                                     for w in o.flags.split()]),
                         ("-h", [config.PROGRAMS[role][0]]),
                         ("--help-all", [f"--{o.name}=" for o in config.OPTIONS if role in o.roles])):
        with pytest.raises(SystemExit) as e:
            config.parse(role, [flag])
        assert e.value.code == 0
        out = capsys.readouterr().out
        assert [word for word in wanted if word not in out] == []


def test_version(capsys):
    with pytest.raises(SystemExit):
        config.parse("engine", ["--version"])
    import ipclite
    assert capsys.readouterr().out.strip() == ipclite.__version__


# ---------------------------------------------------------------- command lines


@pytest.mark.parametrize("words", [["-n", "4"], ["-n4"], ["-n=4"], ["--n=4"], ["--n", "4"], ["n=4"], ["--Cluster.n=4"],
                                   ["--Cluster.n", "4"], ["--IPClusterEngines.n=4"], ["-n", "3", "-n", "4"]])
def test_forms_of_a_flag(words):
    assert config.parse("cluster start", words)["Cluster.n"] == 4


@pytest.mark.parametrize("role, words, name, value", [
    ("controller", ["--ip=*"], "IPController.ip", "*"),
    ("controller", ["--IPController.ip=*"], "IPController.ip", "*"),
    ("controller", ["--HubFactory.ip=*"], "IPController.ip", "*"),
    ("controller", ["--reuse"], "IPController.reuse_files", True),
    ("controller", ["--reuse=False"], "IPController.reuse_files", False),
    ("controller", ["--IPController.reuse_files=True"], "IPController.reuse_files", True),
    ("controller", ["--debug"], "Application.log_level", logging.DEBUG),
    ("controller", ["--quiet"], "Application.log_level", logging.ERROR),
    ("controller", ["--log-level=warning"], "Application.log_level", logging.WARNING),
    ("controller", ["--log_level=15"], "Application.log_level", 15),
    ("controller", ["--ports=10-12,20"], "IPController.ports", [10, 11, 12, 20]),
    ("controller", ["--ping=500"], "HeartMonitor.period", 500),
    ("controller", ["--hwm=0"], "TaskScheduler.hwm", 0),
    ("controller", ["--scheme=lru"], "TaskScheduler.scheme_name", "lru"),
    ("controller", [], "TaskScheduler.scheme_name", "leastload"),
    ("controller", [], "TaskScheduler.hwm", None),
    ("cluster start", ["--daemonize"], "Cluster.daemonize", True),
    ("cluster start", ["--Cluster.controller_args=['--reuse']"], "Cluster.controller_args", ["--reuse"]),
    ("engine", ["-c", "import os; n = -1"], "IPEngine.startup_command", "import os; n = -1"),
    ("engine", ["--timeout=2.5"], "IPEngine.timeout", 2.5),
    ("engine", ["--file=x.json"], "IPEngine.url_file", os.path.abspath("x.json")),
    ("cluster list", ["-o", "json"], "IPClusterList.output_format", "json"),
])
def test_values(role, words, name, value):
    assert config.parse(role, words)[name] == value


def test_arguments_and_the_rest():
    assert config.parse("cluster stop", ["a", "b", "--all"]).args == ["a", "b"]
    assert config.parse("cluster start", ["-n", "2", "--", "--ping=5", "x"]).rest == ["--ping=5", "x"]


@pytest.mark.parametrize("role, words, message", [
    ("engine", ["--foo"], "unknown flag --foo for ipengine. See --help"),
    ("engine", ["--tiemout=3"], "unknown flag --tiemout for ipengine; did you mean --timeout? See --help"),
    ("engine", ["-x"], "unknown flag -x for ipengine"),
    ("cluster start", ["-n", "0"], "-n needs a whole number above 0, not '0'."),
    ("cluster start", ["-n", "x"], "-n needs a whole number above 0, not 'x'."),
    ("cluster start", ["-n"], "-n needs a whole number above 0"),
    ("cluster start", ["-n", "--debug"], "-n needs a whole number above 0"),
    ("cluster start", ["--n=1.5"], "--n needs a whole number"),
    ("cluster start", ["four"], "unexpected argument 'four' for ipcluster start"),
    ("engine", ["--", "x"], "unexpected argument 'x' for ipengine"),
    ("engine", ["--timeout=nan"], "--timeout needs a number of seconds"),
    ("controller", ["--log-level=loud"], "--log-level needs DEBUG"),
    ("controller", ["--reuse=maybe"], "--reuse needs True or False"),
    ("controller", ["--debug=1"], "--debug takes no value"),
    ("controller", ["--ports=5-x"], "--ports needs ports like"),
    ("controller", ["--ports=70000"], "--ports needs ports like"),
    ("controller", ["--transport=carrier"], "--transport needs auto, ipc or tcp"),
    ("controller", ["--cluster-id=../x"], "--cluster-id needs a name without slashes"),
    ("controller", ["--IPControler.ip=x"], "unknown section in --IPControler.ip; did you mean IPController?"),
    ("controller", ["--IPController.locaton=x"], "unknown key in --IPController.locaton; did you mean location?"),
    ("cluster start", ["--Cluster.controller_args=[1"], "--Cluster.controller_args needs a list"),
    ("cluster start", ["--LocalEngineSetLauncher.environment=[]"], "needs a dict"),
])
def test_what_is_wrong_is_one_sentence(role, words, message):
    with pytest.raises(ConfigError) as e:
        config.parse(role, words)
    assert message in str(e.value) and "\n" not in str(e.value)
    assert e.value.exit_code == 2


def test_run_main(capsys):
    def fail(argv):
        raise LauncherError("no luck.")

    def bug(argv):
        raise ZeroDivisionError

    def interrupted(argv):
        raise KeyboardInterrupt
    assert config.run_main("ipx", lambda argv: None, []) == 0
    assert config.run_main("ipx", fail, []) == 1
    assert capsys.readouterr().err == "ipx: no luck.\n"
    assert config.run_main("ipx", fail, ["--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err
    assert config.run_main("ipx", interrupted, []) == 130
    with pytest.raises(ZeroDivisionError):
        config.run_main("ipx", bug, [])


# ---------------------------------------------------------------- config files


def test_precedence(profile):
    profile("controller", "c = get_config()\nc.IPController.ip = '1.1.1.1'\nc.IPController.location = 'there'")
    settings = config.parse("controller", ["--ip=2.2.2.2"])
    assert settings["IPController.ip"] == "2.2.2.2"
    assert settings["IPController.location"] == "there"
    assert settings["HeartMonitor.period"] == 2000


def test_the_command_line_wins_over_a_more_specific_section_of_the_file(profile):
    profile("controller", "c.IPController.log_level = 'ERROR'")
    assert config.parse("controller", [])["Application.log_level"] == logging.ERROR
    assert config.parse("controller", ["--debug"])["Application.log_level"] == logging.DEBUG


def test_old_names_and_inheritance(profile):
    profile("cluster", "c.IPClusterEngines.n = 64\nc.IPClusterStart.controller_ip = '*'\n"
                       "c.BaseLauncher.environment = {'A': 1}\nc.LocalProcessLauncher.stop_seconds_until_kill = 1\n"
                       "c.EngineLauncher.engine_args = ['-c', 'x']\nc.LocalEngineSetLauncher.environment = {'B': 2}")
    settings = config.parse("cluster start", [])
    assert (settings["Cluster.n"], settings["Cluster.controller_ip"]) == (64, "*")
    engines, controller = settings.section("LocalEngineSetLauncher"), settings.section("LocalControllerLauncher")
    assert engines["environment"] == {"B": 2} and controller["environment"] == {"A": 1}
    assert engines["stop_seconds_until_kill"] == controller["stop_seconds_until_kill"] == 1.0
    assert engines["engine_args"] == ["-c", "x"] and "engine_args" not in controller


def test_lists_and_dicts_of_the_defaults_can_be_changed_in_place(profile):
    profile("cluster", "c.Cluster.controller_args.append('--reuse')\nc.Cluster.controller_args.extend(['-a', '-b'])\n"
                       "c.Cluster.controller_args.insert(0, 'first')\nc.BaseLauncher.environment.update({'A': 1})\n"
                       "c.LocalEngineSetLauncher.environment['B'] = 2\nif c.Cluster.n: pass")
    settings = config.parse("cluster start", [])
    assert settings["Cluster.controller_args"] == ["first", "--reuse", "-a", "-b"]
    assert settings["Cluster.n"] is None
    assert settings.section("LocalEngineSetLauncher")["environment"] == {"A": 1, "B": 2}
    assert config.load("cluster start", "/nowhere")["Cluster.controller_args"] == []


def test_load_subconfig(profile, home):
    base = config.find_profile_dir("base", ipython_dir=home, create=True)
    (base / "ipengine_config.py").write_text("c.IPEngine.startup_command = 'base'\nc.IPEngine.timeout = 7")
    (config.find_profile_dir() / "more.py").parent.mkdir(parents=True)
    (config.find_profile_dir() / "more.py").write_text("c.IPEngine.n = 3")
    profile("engine", "load_subconfig('ipengine_config.py', profile='base')\nload_subconfig('more.py')\n"
                      "c.IPEngine.startup_command = 'own'")
    settings = config.parse("engine", [])
    assert (settings["IPEngine.startup_command"], settings["IPEngine.timeout"], settings["IPEngine.n"]) == ("own", 7, 3)


@pytest.mark.parametrize("text, message", [
    ("c.IPController.ip = '*'\nc.IPController.ip = (", "ipcontroller_config.py, line 2: '(' was never closed."),
    ("\n\nimport nosuchmodule", "ipcontroller_config.py, line 3: ModuleNotFoundError"),
    ("c.IPController.pi = 1", "unknown key c.IPController.pi in"),
    ("c.IPControler.ip = '*'", "unknown section c.IPControler.ip in"),
    ("c.HeartMonitor.period = 'x'", "c.HeartMonitor.period in"),
    ("c.HeartMonitor.period = True", "needs a whole number above 0, not True"),
    ("c.IPController.ip = 3", "needs a text, not 3"),
    ("c.IPController.ip.append('x')", "has no append: it is '127.0.0.1'; assign a value."),
    ("load_subconfig('nowhere.py')", "nowhere.py can't be read"),
])
def test_what_is_wrong_in_a_config_file(profile, text, message):
    path = profile("controller", text)
    with pytest.raises(ConfigError) as e:
        config.parse("controller", [])
    if sys.version_info < (3, 10):
        message = message.replace("'(' was never closed", "unexpected EOF while parsing")
    assert message in str(e.value) and str(path.parent) in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize("text, message", [
    ("c.Session.key = b'x'", "is not needed"),
    ("c.IPController.use_threads = True", "is not needed"),
    ("c.HubFactory.regport = 1", "is not needed"),
    ("c.IPController.profile_dir = '/x'", "is not needed"),
    ("c.Cluster.n = 3", "belongs in ipcluster_config.py"),
])
def test_what_has_no_effect_is_a_warning(profile, package_log, text, message):
    profile("controller", text)
    assert config.parse("controller", [])["IPController.ip"] == "127.0.0.1"
    assert message in package_log.text and len(package_log.records) == 1


def test_layers_of_files(profile, home, tmp_path, monkeypatch):
    system = [tmp_path / "etc", tmp_path / "local"]
    monkeypatch.setattr(config, "SYSTEM_DIRS", system)
    for folder in system:
        folder.mkdir()
    (system[0] / "ipengine_config.py").write_text("c.IPEngine.n = 2\nc.IPEngine.timeout = 2\n"
                                                  "c.IPEngine.startup_command = 'etc'")
    (system[1] / "ipengine_config.py").write_text("c.IPEngine.n = 3\nc.IPEngine.timeout = 3")
    path = profile("engine", "c.IPEngine.n = 4\nc.IPEngine.startup_script = 'a.py'")
    path.with_suffix(".json").write_text('{"IPEngine": {"startup_script": "b.py"}}')
    extra = tmp_path / "x.py"
    extra.write_text("c.EngineFactory.location = 'x'")
    settings = config.parse("engine", [f"--config={extra}"])
    assert (settings["IPEngine.n"], settings["IPEngine.timeout"], settings["IPEngine.startup_command"]) == (4, 3, "etc")
    assert settings["IPEngine.startup_script"] == os.path.abspath("b.py") and settings["IPEngine.location"] == "x"
    assert settings.origins["IPEngine.timeout"] == f"c.IPEngine.timeout in {system[1] / 'ipengine_config.py'}"
    assert settings.table()["IPEngine.url_file"] == {"value": "", "from": "default"}


@pytest.mark.parametrize("words, rest", [
    (["--usethreads", "--ping=5"], 5), (["--ident", "me", "--ping=5"], 5), (["--ident=me", "--ping=5"], 5),
    (["--IPController.use_threads=True", "--ping=5"], 5), (["--Session.key=x", "--ping=5"], 5),
])
def test_flags_that_have_no_effect(words, rest, package_log):
    assert config.parse("controller", words)["HeartMonitor.period"] == rest
    assert f"{words[0].partition('=')[0]} has no effect" in package_log.text and len(package_log.records) == 1


@pytest.mark.parametrize("section, key, value", [
    ("WinHPCJobLauncher", "anything", 1), ("WindowsHPCEngineSetLauncher", "scheduler", "HEADNODE"),
])
def test_settings_of_what_is_absent(section, key, value, package_log):
    if not config.is_absent(section, key, "cluster"):
        pytest.fail("it is here now: give it its rows in OPTIONS, and this test another example")
    assert config.layer_of("cluster start", {section: {key: value}}) == {}
    assert f"c.{section}.{key} in config" in package_log.text


def test_no_row_is_absent_or_unneeded():
    for option in config.OPTIONS:
        for app in {config.app_of(role) for role in option.roles} & set(config.APPS):
            assert not config.is_absent(option.section, option.key, app), option.name
            assert not config.is_unneeded(option.section, option.key, app), option.name


# ---------------------------------------------------------------- profiles


def test_where_profiles_are(home, tmp_path, monkeypatch):
    assert config.find_profile_dir() == home / "profile_default"
    assert not home.exists()  # looking leaves nothing
    assert config.find_profile_dir(create=True) == home / "profile_default"
    assert {p.name: oct(p.stat().st_mode & 0o777) for p in (home / "profile_default").iterdir()} == {
        "security": "0o700", "pid": "0o700", "log": "0o755"}
    assert config.find_profile_dir("mpi", ipython_dir=tmp_path / "other", create=True) == tmp_path / "other/profile_mpi"
    assert config.find_profile_dir("mpi", ipython_dir=tmp_path / "other").is_dir()
    monkeypatch.chdir(tmp_path)
    assert config.find_profile_dir(profile_dir="other/profile_mpi") == tmp_path / "other/profile_mpi"
    monkeypatch.delenv("IPYTHONDIR")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert config.find_profile_dir() == tmp_path / ".ipython/profile_default"


@pytest.mark.parametrize("where", [{"profile": "nope"}, {"profile_dir": "/nowhere/at/all"}])
def test_a_named_profile_must_exist(where, home):
    with pytest.raises(ConfigError, match="There is no profile /.*ipclite profile create"):
        config.find_profile_dir(**where)
    flags = [f"--{key.replace('_', '-')}={value}" for key, value in where.items()]
    with pytest.raises(ConfigError, match="There is no profile"):
        config.parse("engine", flags)


def test_start_creates_its_profile_unless_told_not_to(home):
    assert config.parse("cluster start", ["--profile=new"]).profile_dir == home / "profile_new"
    assert (home / "profile_new" / "log").is_dir()
    with pytest.raises(ConfigError, match="There is no profile"):
        config.parse("cluster start", ["--profile=other", "--Cluster.auto_create=False"])
    assert not (home / "profile_other").exists()


def test_a_profile_is_a_name():
    with pytest.raises(ConfigError, match="--profile-dir"):
        config.find_profile_dir("../x")


def test_a_profile_directory_that_cant_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="can't be written .*choose another one"):
        config.make_profile_dir(tmp_path / "file" / "profile")


# ---------------------------------------------------------------- runtime directory


def test_runtime_dir(tmp_path, monkeypatch):
    monkeypatch.setenv("IPCLITE_RUNTIME_DIR", str(tmp_path / "run"))
    assert config.runtime_dir() == tmp_path / "run"
    assert stat.S_IMODE((tmp_path / "run").stat().st_mode) == 0o700
    assert config.runtime_dir() == tmp_path / "run"
    (tmp_path / "run").chmod(0o755)
    with pytest.raises(ConfigError, match="open to others; run `chmod 700"):
        config.runtime_dir()
    (tmp_path / "run").chmod(0o700)
    (tmp_path / "link").symlink_to(tmp_path / "run")
    monkeypatch.setenv("IPCLITE_RUNTIME_DIR", str(tmp_path / "link"))
    with pytest.raises(ConfigError, match="not a directory of yours"):
        config.runtime_dir()
    monkeypatch.setenv("IPCLITE_RUNTIME_DIR", str(tmp_path / ("x" * 70)))
    with pytest.raises(ConfigError, match="longer than 67 bytes"):
        config.runtime_dir()
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("IPCLITE_RUNTIME_DIR", str(tmp_path / "file" / "x"))
    with pytest.raises(ConfigError, match="can't be written .*set IPCLITE_RUNTIME_DIR"):
        config.runtime_dir()


@pytest.mark.skipif(not ROOT, reason="only root can give a directory away")
def test_runtime_dir_of_somebody_else(tmp_path, monkeypatch):
    (tmp_path / "run").mkdir(mode=0o700)
    os.chown(tmp_path / "run", 12345, 12345)
    monkeypatch.setenv("IPCLITE_RUNTIME_DIR", str(tmp_path / "run"))
    with pytest.raises(ConfigError, match="not a directory of yours"):
        config.runtime_dir()


def test_runtime_dir_is_short_where_tmpdir_is_long(tmp_path, monkeypatch):
    monkeypatch.delenv("IPCLITE_RUNTIME_DIR", raising=False)
    monkeypatch.setenv("TMPDIR", str(tmp_path / ("x" * 100)))
    path = config.runtime_dir()
    assert path.parent == Path("/tmp") and len(str(path)) + config.SOCKET_NAME_MAX <= config.SOCKET_PATH_MAX


# ---------------------------------------------------------------- connection files


def test_connection_file_names(tmp_path):
    assert config.connection_file(tmp_path, "", "client") == tmp_path / "security/ipcontroller-client.json"
    assert config.connection_file(tmp_path, "x", "engine") == tmp_path / "security/ipcontroller-x-engine.json"


def test_write_and_read(tmp_path):
    path = tmp_path / "security" / "c.json"
    config.write_json(path, {"old": 1})
    config.write_json(path, INFO)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600 and stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert config.read_connection(path, "client", 1) == INFO
    assert [p.name for p in path.parent.iterdir()] == ["c.json"]
    assert config.dead_run(INFO) == ""


def test_a_file_that_cant_be_written_leaves_nothing(tmp_path):
    (tmp_path / "c.json").mkdir()
    with pytest.raises(ConfigError, match="c.json can't be written"):
        config.write_json(tmp_path / "c.json", INFO)
    assert [p.name for p in tmp_path.iterdir()] == ["c.json"]
    with pytest.raises(ConfigError, match="can't be written"):
        config.write_json("/proc/nothing/c.json", INFO)


@pytest.mark.parametrize("text, message", [
    (None, "There is no file"),
    ("", "is empty"),
    ("  \n", "is empty"),
    (json.dumps(INFO)[:50], "is cut short or no JSON"),
    ("[1]", "no connection file"),
    ("{}", "of another program"),
    (json.dumps({"registration": 1, "key": "x"}), "of IPython Parallel"),
    (json.dumps({**INFO, "program": "other"}), "of another program"),
    (json.dumps({k: v for k, v in INFO.items() if k != "url"}), "lacks url"),
    (json.dumps({**INFO, "pid": "1"}), "lacks pid"),
    (json.dumps({**INFO, "role": "engine"}), "is for the role of engine, not client"),
    (json.dumps({**INFO, "protocol": 2}), "newer protocol"),
    (json.dumps({**INFO, "protocol": 0}), "older protocol"),
    (b"\xff\xfe\x00", "can't be read"),
])
def test_what_is_wrong_with_a_connection_file(tmp_path, text, message):
    path = tmp_path / "c.json"
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        path.chmod(0o600)
    with pytest.raises(ConnectionFileError) as e:
        config.read_connection(path, "client", 1)
    assert message in str(e.value) and str(path) in str(e.value) and "\n" not in str(e.value)
    assert isinstance(e.value, OSError)


def test_a_connection_file_that_others_can_read(tmp_path):
    config.write_json(tmp_path / "c.json", INFO, 0o640)
    with pytest.raises(ConnectionFileError, match="run `chmod 600 "):
        config.read_connection(tmp_path / "c.json", "client", 1)


def test_a_dead_run(tmp_path):
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    assert "is gone" in config.dead_run({**INFO, "pid": child.pid})
    assert "is gone" in config.dead_run({**INFO, "pid_start": "some other time"})
    assert config.dead_run({**INFO, "pid": child.pid, "host": "another"}) == ""


# ---------------------------------------------------------------- locks


def holder(**changes):
    """What a lock says of who holds it."""
    found = {"host": socket.gethostname(), "pid": os.getpid(), "pid_start": config.process_start(os.getpid())}
    return json.dumps({**found, **changes})


def test_a_lock_keeps_others_out(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "LOCK_PATIENCE_S", 0.05)
    path = tmp_path / "lock"
    with config.locked(path):
        assert json.loads(path.read_text()) == json.loads(holder())
        with pytest.raises(ConfigError, match="lock is held by another process; remove it"), config.locked(path):
            pytest.fail("two are in")
    assert list(tmp_path.iterdir()) == []


def test_one_of_many_gets_a_lock(tmp_path):
    inside, most = [], []

    def enter():
        for _ in range(20):
            with config.locked(tmp_path / "lock"):
                inside.append(1)
                most.append(len(inside))
                inside.pop()
    threads = [threading.Thread(target=enter) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] * 80 and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("text", [holder(pid=2**22 - 1), holder(pid_start="another time")])
def test_a_dead_holder_loses_its_lock(tmp_path, text):
    (tmp_path / "lock").write_text(text)
    with config.locked(tmp_path / "lock"):
        assert json.loads((tmp_path / "lock").read_text()) == json.loads(holder())


@pytest.mark.parametrize("text", ["", "[", "{}", holder(host="elsewhere")])
def test_a_lock_that_nobody_can_judge_grows_old(tmp_path, text, monkeypatch):
    monkeypatch.setattr(files, "LOCK_PATIENCE_S", 0.02)
    path = tmp_path / "lock"
    path.write_text(text)
    with pytest.raises(ConfigError, match="is held"), config.locked(path):
        pytest.fail("it was broken too early")
    os.utime(path, (1, 1))
    with config.locked(path):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_lock_without_hard_links(tmp_path, monkeypatch):
    def link(*_):
        raise PermissionError(1, "no hard links here")
    monkeypatch.setattr(os, "link", link)
    monkeypatch.setattr(files, "LOCK_PATIENCE_S", 0.02)
    with config.locked(tmp_path / "lock"):
        with pytest.raises(ConfigError, match="is held"), config.locked(tmp_path / "lock"):
            pytest.fail("two are in")
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------- processes and logging


def test_clean_logs(tmp_path):
    folder = tmp_path / "log"
    folder.mkdir()
    (folder / f"ipengine-x-{os.getpid()}.log").write_text("alive")
    for i in range(4):
        (folder / f"ipengine-{2**22 - 2 - i}.log").write_text("ended")
        os.utime(folder / f"ipengine-{2**22 - 2 - i}.log", (1000 + i, 1000 + i))
    assert config.clean_logs(tmp_path, keep=9) == []
    assert len(config.clean_logs(tmp_path, keep=3, age_s=10)) == 1
    assert not (folder / f"ipengine-{2**22 - 2}.log").exists()
    assert len(config.clean_logs(tmp_path)) == 3
    assert [path.name for path in folder.iterdir()] == [f"ipengine-x-{os.getpid()}.log"]


def test_young_logs_are_kept(tmp_path):
    (tmp_path / "log").mkdir()
    (tmp_path / "log" / f"ipengine-{2**22 - 2}.log").write_text("ended just now")
    assert config.clean_logs(tmp_path, keep=0, age_s=60) == []


def test_process_identity():
    started = config.process_start(os.getpid())
    assert started and config.process_alive(os.getpid()) and config.process_alive(os.getpid(), started)
    assert not config.process_alive(os.getpid(), started + "1")
    assert not config.process_alive(0) and not config.process_alive(-1)
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    its_start = config.process_start(child.pid)
    assert config.process_alive(child.pid, its_start)
    child.stdin.close()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert not config.process_alive(child.pid, its_start)  # a zombie
    child.wait()
    assert config.process_start(child.pid) is None and not config.process_alive(child.pid)


def test_memory_limit():
    assert 1 << 20 < config.memory_limit() <= 1 << 62


def test_logging(tmp_path, capfd):
    logger = config.log()
    before = logger.handlers[:], logger.level, logger.propagate
    try:
        logger.handlers = []
        config.setup_logging("role", "INFO").info("to stderr")
        config.log("other").debug("hidden")
        log = config.setup_logging("role 3", logging.DEBUG, tmp_path / "log" / "x.log")
        log.debug("to file")
        assert len(logger.handlers) == 1
        err = capfd.readouterr().err
        assert err.endswith("[role] INFO: to stderr\n") and err.count("\n") == 1
        assert (tmp_path / "log" / "x.log").read_text().endswith("[role 3] DEBUG: to file\n")
        with pytest.raises(ConfigError, match="log file .* can't be written"):
            config.setup_logging("role", "INFO", tmp_path / "log" / "x.log" / "y.log")
    finally:
        for handler in logger.handlers:
            handler.close()
        logger.handlers, logger.level, logger.propagate = before


def test_log_file_of_settings(home):
    assert config.parse("controller", []).log_file is None
    path = config.parse("controller", ["--log-to-file", "--cluster-id=x"]).log_file
    assert path == home / f"profile_default/log/ipcontroller-x-{os.getpid()}.log"


def test_work_dir(tmp_path, monkeypatch):
    monkeypatch.chdir("/")
    monkeypatch.setattr(sys, "path", sys.path[:])
    config.enter_work_dir(tmp_path)
    assert os.getcwd() == str(tmp_path) == sys.path[0]
    with pytest.raises(ConfigError, match="working directory .* can't be entered"):
        config.enter_work_dir(tmp_path / "nope")


def test_import_is_cheap():
    code = "import sys; before = set(sys.modules); import ipclite.config; print(*set(sys.modules) - before)"
    loaded = subprocess.run([sys.executable, "-S", "-c", code], stdout=subprocess.PIPE, check=True,
                            cwd=Path(config.__file__).parents[1]).stdout.decode().split()
    assert "ipclite.config" in loaded
    assert not {"asyncio", "argparse", "subprocess", "tempfile", "inspect", "multiprocessing"} & set(loaded)


def test_a_connection_file_that_vanishes_while_it_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "read_json", lambda path: INFO)
    assert config.read_connection(tmp_path / "c.json", "client", 1)["run_id"] == INFO["run_id"]
