"""What a person can get wrong is answered with one sentence and the right exit code, and leaves nothing behind."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import socket
import subprocess
import sys

import pytest
from shell import ROOT, Command, connection, controller, one_sentence, run, security
from support import eventually, need

import ipclite as ipp

NOBODY = 65534


@pytest.fixture
def cluster(ipython_dir):
    with ipp.Cluster(n=2, engine_timeout=30) as rc:
        yield rc


# --- the command line


@pytest.mark.parametrize("words,hints", [
    (("cluster", "start", "--engine=2"), ("unknown flag --engine", "did you mean --engines?")),
    (("cluster", "stop", "--frobnicate"), ("unknown flag --frobnicate", "--help")),
    (("controller", "--prots=5"), ("unknown flag --prots", "did you mean --ports?")),
    (("engine", "--clusterid=x"), ("unknown flag --clusterid", "did you mean --cluster-id?")),
    (("engine", "--IPEngine.tiemout=3"), ("--IPEngine.tiemout", "did you mean timeout?")),
    (("engine", "--IPEngin.timeout=3"), ("--IPEngin.timeout", "did you mean IPEngine?")),
    (("cluster", "start", "extra"), ("unexpected argument 'extra'",)),
    (("engine", "--profile=nope"), ("There is no profile", "profile_nope", "starting a cluster")),
    (("cluster", "stop", "--profile=nope"), ("There is no profile",)),
    (("cluster", "list", "--profile=nope"), ("There is no profile",)),
    (("engine", "--profile=a/b"), ("a/b", "--profile-dir")),
    (("cluster", "start", "-n", "0"), ("-n needs a whole number above 0", "'0'")),
    (("cluster", "start", "-n", "x"), ("-n needs a whole number above 0", "'x'")),
    (("cluster", "start", "-n", "-3"), ("-n needs a whole number above 0", "'-3'")),
    (("cluster", "start", "-n", "1.5"), ("-n needs a whole number above 0",)),
    (("cluster", "start", "-n"), ("-n needs a whole number above 0",)),
    (("engine", "-n", "0"), ("-n needs a whole number above 0",)),
    (("engine", "-n", "x"), ("-n needs a whole number above 0",)),
    (("controller", "--ping=0"), ("--ping needs a whole number above 0",)),
    (("controller", "--ports=70000"), ("--ports needs ports like",)),
    (("controller", "--ports=a-b"), ("--ports needs ports like",)),
    (("controller", "--ports=20-10"), ("--ports needs ports like",)),
    (("controller", "--transport=carrier-pigeon"), ("--transport needs auto, ipc or tcp",)),
    (("controller", "--ip=203.0.113.7", "--transport=tcp"), ("203.0.113.7", "--ip")),
    (("controller", "--ip=no.such.host.invalid", "--transport=tcp"), ("'no.such.host.invalid'", "looked up", "--ip")),
    (("controller", "--log-level=LOUD"), ("--log-level needs",)),
    (("engine", "--url=10.0.0.1"), ("--url needs the address of a controller", "tcp://")),
    (("engine", "-s", "/does/not/exist.py"), ("/does/not/exist.py", "No such file")),
    (("engine", "--IPKernelApp.exec_files=['/does/not/exist.py']"), ("/does/not/exist.py", "No such file")),
    (("cluster", "stop", "--signal=SIGNOPE"), ("--signal needs a signal's name or number",)),
    (("cluster", "start", "--cluster-id=a/b"), ("--cluster-id needs a name without slashes",)),
    (("cluster", "start", "--timeout=soon"), ("--timeout needs a number of seconds",)),
    (("cluster", "start", "--engines=slrum"), ("There is no engine launcher 'slrum'", "choose from")),
    (("cluster", "start", "--work-dir=/does/not/exist"), ("/does/not/exist", "can't be entered")),
    (("cluster", "list", "--output-format=xml"), ("needs text or json",)),
    (("cluster", "start", "--queue=long", "--dry-run"), ("--queue is for the jobs of a batch system", "--engines=slurm")),
    (("cluster", "start", "--hwm=1"), ("--hwm is a flag of ipcontroller", "ipcluster start -- --hwm")),
    (("cluster", "sart"), ("unknown command 'sart'", "start")),
    (("enigne",), ("unknown role 'enigne'", "engine")),
])
def test_a_wrong_word(ipython_dir, words, hints):
    one_sentence(run(*words), 2, *hints)


def test_a_wrong_config_file(ipython_dir):
    folder = ipython_dir / "profile_default"
    folder.mkdir()
    path = folder / "ipcontroller_config.py"
    for text, hints in (("c = get_config(\n", ("ipcontroller_config.py, line 1",)),
                        ("1/0\n", ("line 1: ZeroDivisionError",)),
                        ("c.IPController.ipp = '*'\n", ("did you mean ip?",)), ("c.IPController.ports = 'x'\n",
                                                                                ("needs ports like",))):
        path.write_text(text)
        one_sentence(run("controller"), 2, *hints)


def test_a_cluster_that_runs_already(ipython_dir):
    with Command("cluster", "start", "-n", "1") as first:
        first.says("engines are ready")
        one_sentence(run("cluster", "start", "-n", "1"), 10, "already running", "stop it")
        one_sentence(run("controller"), 10, "already serves", "--cluster-id")
        with pytest.raises(ipp.AlreadyRunning, match="already running.*stop it"):
            ipp.Cluster(n=1, cluster_id="").start_cluster_sync()
        with ipp.Client() as rc:
            assert rc[:].apply_sync(abs, -2) == [2], "the first is not disturbed"
        assert run("cluster", "stop").out == "Stopped the default cluster.\n", "nor its file"


def test_no_cluster_to_stop(ipython_dir):
    one_sentence(run("cluster", "stop"), 12, "ipcluster list", "ipcluster start")
    one_sentence(run("cluster", "stop", "nope"), 12, "nope")
    one_sentence(run("cluster", "stop", "--all"), 12, "There is no cluster")
    with pytest.raises(ipp.NoCluster):
        ipp.Cluster.from_file(cluster_id="nope")


def test_wrong_arguments_in_python(ipython_dir):
    for arguments in ({"n": 0}, {"n": "x"}, {"engine_timeout": -1}, {"profile": "a/b"}, {"engines": "slrum"},
                      {"controller_args": 5}):
        with pytest.raises(ipp.ConfigError) as caught:
            ipp.Cluster(**arguments)
        assert "\n" not in str(caught.value) and len(str(caught.value)) > 20
    with pytest.raises(ipp.LauncherError, match="unknown flag --rubbish"):
        ipp.Cluster(n=1, controller_args=["--rubbish"]).start_cluster_sync()
    with pytest.raises(ipp.LauncherError, match="1 of 1|0 of 1|not ready"):
        ipp.Cluster(n=1, engine_timeout=0.01).start_and_connect_sync()


# --- connection files

FOREIGN = {"exec_key": "x", "ssh": "", "location": "h", "registration": 4711, "control": 1,
           "interface": "tcp://127.0.0.1"}


def damaged(info, role):
    """(name, content of the file or None, what the error must say)"""
    text = json.dumps(info)
    yield "missing", None, "There is no file"
    yield "empty", "", "is empty; restart the controller"
    yield "blank", " \n", "is empty; restart the controller"
    yield "truncated", text[: len(text) // 2], "cut short"
    yield "binary", "\x00\x01", "cut short or no JSON"
    yield "list", "[1]", "no connection file"
    yield "foreign", json.dumps(FOREIGN), "is of IPython Parallel"
    yield "other", json.dumps({"name": "package", "version": "1"}), "of another program"
    yield "lacking", json.dumps({"program": "ipclite", "role": role}), "lacks url, ipc"
    yield "role", json.dumps({**info,
                              "role": {"client": "engine", "engine": "client"}[role]}), f"not {role}; give the file"
    yield "newer", json.dumps({**info, "protocol": 99,
                               "version": "9.9"}), "newer protocol.*9.9.*install the same version"
    yield "dead", json.dumps({**info, "pid": 2**22 - 1}), "run that has ended|is gone"
    yield "recycled", json.dumps({**info, "pid": os.getpid()}), "run that has ended|is gone"


@pytest.mark.parametrize("role", ["client", "engine"])
def test_a_connection_file_that_is_no_good(ipython_dir, tmp_path, role):
    with controller(ipython_dir):
        info = connection(ipython_dir, role)
        for name, text, wanted in damaged(info, role):
            path = tmp_path / f"{name}.json"
            if text is not None:
                path.write_text(text)
                path.chmod(0o600)
            if role == "client":
                with pytest.raises(ipp.ConnectionFileError, match=wanted) as caught:
                    ipp.Client(path, timeout=0.2)
                message = str(caught.value)
            else:
                message = one_sentence(run("engine", f"--file={path}", "--timeout=0.2"), 1)
                assert re.search(wanted, message), (name, message)
            assert str(path) in message and "\n" not in message, message


def test_a_connection_file_that_others_can_read(ipython_dir):
    with controller(ipython_dir):
        for role in ("client", "engine"):
            (security(ipython_dir) / f"ipcontroller-{role}.json").chmod(0o644)
        path = security(ipython_dir) / "ipcontroller-client.json"
        with pytest.raises(ipp.ConnectionFileError, match=f"can be read by others.*chmod 600 {path}"):
            ipp.Client(timeout=0.2)
        one_sentence(run("engine", "--timeout=0.2"), 1, "can be read by others", "chmod 600")


def test_connection_information_of_nobody(ipython_dir):
    with controller(ipython_dir, "--transport=tcp", "--ip=127.0.0.1"):
        info = connection(ipython_dir)
    with pytest.raises(ipp.ConnectError, match="refused the connection"):
        ipp.Client(info, timeout=2)
    with pytest.raises(ipp.ConnectError, match="no.such.host.*can not be looked up.*location"):
        ipp.Client({**info, "url": "tcp://no.such.host.invalid:9", "location": "no.such.host.invalid"}, timeout=5)
    with socket.create_server(("127.0.0.1", 0)) as mute, pytest.raises(ipp.ConnectError,
                                                                       match="no controller answered"):
        ipp.Client({**info, "url": f"tcp://127.0.0.1:{mute.getsockname()[1]}"}, timeout=0.5)


# --- places that can't be written


@pytest.mark.parametrize("role", ["controller", "cluster start"])
def test_directories_that_can_not_be_written(ipython_dir, role):
    words = role.split()
    ipython_dir.rmdir()
    ipython_dir.write_text("I am a file")
    one_sentence(run(*words), 2, "can't be written", "--profile-dir or $IPYTHONDIR")
    ipython_dir.unlink()
    (ipython_dir / "profile_default").mkdir(parents=True)
    (ipython_dir / "profile_default" / "log").write_text("I am a file")
    one_sentence(run(*words, "--log-to-file"), 2, "log", "can't be written")
    (ipython_dir / "profile_default" / "log").unlink()


@pytest.mark.parametrize("role", ["controller", "cluster start"])
def test_a_runtime_directory_that_is_no_good(ipython_dir, role):
    code = {"controller": 2, "cluster start": 1}[role]
    runtime = ipython_dir.parent / "run"

    def refused(*hints):
        command = run(*role.split())
        if role == "controller":
            one_sentence(command, code, *hints)
        assert command.process.returncode == code and "Traceback" not in command.err, command.err
        assert all(hint in command.err for hint in hints), command.err
        assert not list(security(ipython_dir).glob("*.json"))

    runtime.write_text("I am a file")
    refused("runtime directory", "IPCLITE_RUNTIME_DIR")
    runtime.unlink()
    (ipython_dir.parent / "elsewhere").mkdir(mode=0o700)
    runtime.symlink_to(ipython_dir.parent / "elsewhere")
    refused("runtime directory", "IPCLITE_RUNTIME_DIR")
    runtime.unlink()
    for mode in (0o770, 0o701, 0o777):
        runtime.mkdir()
        runtime.chmod(mode)
        refused("is open to others", f"chmod 700 {runtime}")
        runtime.rmdir()
    if os.getuid() == 0:
        runtime.mkdir(mode=0o700)
        os.chown(runtime, NOBODY, NOBODY)
        refused("not a directory of yours")


def test_permissions_of_a_user(ipython_dir):
    need(os.getuid() == 0, "root, to become somebody else")
    ipython_dir.parent.chmod(0o755)
    ipython_dir.chmod(0o755)
    for role, words in (("controller", []), ("cluster", ["start"])):
        # Everything is imported while the interpreter's own files can be read.
        command = run(code=["-c", "import importlib, os, pkgutil, sys, ipclite\n"
                                  "for m in pkgutil.iter_modules(ipclite.__path__):\n"
                                  "    m.name == '__main__' or importlib.import_module('ipclite.' + m.name)\n"
                                  f"os.setgid({NOBODY}); os.setuid({NOBODY}); sys.exit(ipclite.{role}.main({words}))"])
        one_sentence(command, 2, "can't be written (Permission denied)")


def test_files_that_somebody_else_may_not_read(ipython_dir):
    """A config file and a connection file of another user: the path and the reason, in a sentence."""
    need(os.getuid() == 0, "root, to become somebody else")
    for folder in (ipython_dir.parent, ipython_dir):
        folder.chmod(0o755)
    theirs = ipython_dir / "profile_theirs"
    for name in ("", "security", "pid", "log"):
        (theirs / name).mkdir(mode=0o700)
        os.chown(theirs / name, NOBODY, NOBODY)
    config, file = theirs / "ipengine_config.py", ipython_dir / "engine.json"
    for path in (config, file):
        path.write_text("{}")
        path.chmod(0o600)
    as_nobody = ("import importlib, os, pkgutil, sys, ipclite\n"
                 "for m in pkgutil.iter_modules(ipclite.__path__):\n"
                 "    m.name == '__main__' or importlib.import_module('ipclite.' + m.name)\n"
                 "ipclite.pack.pack_function(lambda: None)\n"
                 f"os.setgid({NOBODY}); os.setuid({NOBODY}); sys.exit(ipclite.engine.main(sys.argv[1:]))")
    words = [f"--profile-dir={theirs}", f"--file={file}", "--timeout=0.1"]
    one_sentence(run(code=["-c", as_nobody, *words]), 2, str(config), "Permission denied")
    config.unlink()
    one_sentence(run(code=["-c", as_nobody, *words]), 1, str(file), "Permission denied")


def test_a_full_disk(ipython_dir):
    folder = ipython_dir / "profile_default" / "security"
    folder.mkdir(parents=True, mode=0o700)
    need(os.getuid() == 0 and shutil.which("mount"), "root and mount, to make a tiny disk")
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4k,mode=700", "tmpfs", str(folder)],
                          check=False).returncode == 0
    need(made, "a tmpfs")
    try:
        (folder / "filler").write_bytes(b"x" * 4096)
        one_sentence(run("controller"), 2, "can't be written", "No space left")
        start = run("cluster", "start", "-n", "1")
        assert start.process.returncode in (1, 2), start.err
        assert "No space left" in start.err and "Traceback" not in start.err, start.err
        assert os.listdir(folder) == ["filler"]
    finally:
        subprocess.run(["umount", str(folder)], check=True)
    assert list(ipython_dir.parent.glob("run/*")) == []


def test_ports_in_use(ipython_dir):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        one_sentence(run("controller", "--ip=127.0.0.1", f"--ports={port}"), 1,
                     f"no port left to listen on at 127.0.0.1: {port}", "--ports")
        assert not list(security(ipython_dir).glob("*.json"))
    one_sentence(run("controller", "--ip=127.0.0.1", f"--ports={port}"), 1, "no port left", "--ports")  # two are needed
    assert list(ipython_dir.parent.glob("run/*")) == []


# --- tasks


class Lost:
    """Its class is not there when it is unpickled."""

    def __reduce__(self):
        return _find, ("no_such_module_anywhere",)


def _find(name):
    return __import__(name)


def test_a_payload_that_can_not_be_unpickled(cluster):
    view = cluster.load_balanced_view()
    with pytest.raises(ipp.KernelError) as caught:
        view.apply_sync(lambda x: x, Lost())
    assert "no_such_module_anywhere" in str(caught.value)
    with pytest.raises(ipp.KernelError, match="lock"):
        view.apply_sync(len, __import__("threading").Lock())
    with pytest.raises(ipp.KernelError, match="lock"):
        view.apply_sync(lambda: __import__("threading").Lock())

    def make_lost():
        class OnlyThere:
            def __reduce__(self):
                return eval, ("__import__('no_such_module_here')",)
        return OnlyThere()

    with pytest.raises((ipp.KernelError, ModuleNotFoundError), match="no_such_module_here"):
        view.apply_sync(make_lost)
    assert view.map_sync(abs, [-1, 2]) == [1, 2]


def test_a_module_that_only_the_client_has(ipython_dir, tmp_path, monkeypatch):
    """Its file is there when the engines start, and gone, or without the class, when they need it."""
    (tmp_path / "only_beside_the_client.py").write_text("def f(x):\n    return x\n")
    (tmp_path / "gone_there.py").write_text("class Box:\n    pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    import gone_there
    import only_beside_the_client

    (tmp_path / "only_beside_the_client.py").unlink()
    (tmp_path / "gone_there.py").write_text("")
    with ipp.Cluster(n=1) as cluster:
        with pytest.raises((ipp.KernelError, ModuleNotFoundError), match="only_beside_the_client"):
            cluster[0].apply_async(only_beside_the_client.f, 1).get(20)
        with pytest.raises((ipp.KernelError, AttributeError), match="Box"):
            cluster[0].apply_async(lambda x: x, gone_there.Box()).get(20)
        assert cluster[:].apply_sync(abs, -3) == [3]


def test_a_task_that_is_larger_than_the_controller_takes(cluster):
    cluster._connection._max_task_bytes = 10_000_000  # as on a small machine
    view = cluster.load_balanced_view()
    with pytest.raises(ipp.PackError, match="GiB.*send smaller pieces, or a path to a file"):
        view.apply_sync(len, bytes(10_000_001))
    with pytest.raises(ipp.PackError):
        cluster[:].push({"big": bytes(10_000_001)}, block=True)
    assert view.apply_sync(len, bytes(1000)) == 1000


def hog():
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20), hard))
    try:
        return len(bytearray(1 << 30))
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def test_an_engine_without_memory(cluster):
    with pytest.raises(MemoryError) as caught:
        cluster[0].apply_sync(hog)
    assert isinstance(caught.value, ipp.RemoteError)
    assert cluster[0].apply_sync(abs, -1) == 1


def test_a_result_that_does_not_fit_the_engine(cluster):
    def limited():
        import resource

        used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + (48 << 20), resource.RLIM_INFINITY))
        return list(range(1 << 20))  # some 40 MB of objects, and as much again to pickle them

    with pytest.raises((MemoryError, ipp.KernelError)):
        cluster[0].apply_sync(lambda: [limited(), limited(), limited()])
    eventually(lambda: cluster[1].apply_sync(abs, -1) == 1)


def test_file_size_limit(ipython_dir):
    """Writes that end half way leave no half file."""
    code = ("import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
            "resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100)); import runpy; sys.argv[1:] = ['controller']; "
            "runpy.run_module('ipclite', run_name='__main__')")
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(ROOT)},
                          stderr=subprocess.PIPE,
                          stdout=subprocess.PIPE, text=True, timeout=30, check=False)
    assert done.returncode == 2 and "can't be written: File too large" in done.stderr, done.stderr
    assert os.listdir(security(ipython_dir)) == []
    assert list(ipython_dir.parent.glob("run/*")) == []
