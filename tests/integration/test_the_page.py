"""Starting the controller and engines: what that page shows, from its top to its bottom, as a reader types it.

Its config lines are in test_configuration.py, its tunnels in test_tunnels.py, its launchers in tests/schedulers.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import stat

import pytest
from shell import Command, connection, one_sentence, run, security
from support import eventually

import ipclite as ipp

HOST = socket.gethostname()


def profile(name, **files):
    """`ipython profile create --parallel --profile=NAME`, edited."""
    done = run("profile", "create", "--parallel", f"--profile={name}")
    assert done.process.returncode == 0, done.err
    folder = done.out.strip().rpartition("The profile is ")[2]
    for app, text in files.items():
        with open(f"{folder}/ip{app}_config.py", "a") as file:
            file.write(text)
    return folder


def test_managing_clusters(ipython_dir):
    cluster = ipp.Cluster(n=4)
    cluster.start_cluster_sync()
    try:
        with cluster.connect_client_sync() as rc:
            rc.wait_for_engines(4, timeout=30)
            assert rc[:].apply_sync(abs, -1) == [1] * 4
    finally:
        cluster.stop_cluster_sync()


def test_a_cluster_on_all_interfaces(ipython_dir):
    with ipp.Cluster(n=1, controller_ip="*", controller_location="127.0.0.1") as rc:
        info = connection(ipython_dir, "engine", rc.cluster_id)
        assert re.fullmatch(r"tcp://127.0.0.1:\d+", info["url"]) and info["location"] == "127.0.0.1"


@pytest.mark.parametrize("words", [["--ip=*"], ["--ip", "*"], ["--IPController.ip=*"]])
def test_all_interfaces_as_people_type_it(ipython_dir, words):
    with Command("controller", "--transport=tcp", *words) as boss:
        boss.says("controller started")
        assert re.fullmatch(rf"tcp://{re.escape(HOST)}:\d+", connection(ipython_dir)["url"])
        assert connection(ipython_dir)["location"] == HOST, "by default the host's name"


def test_loopback_by_default_on_high_random_ports(ipython_dir):
    with Command("controller", "--transport=tcp") as boss:
        boss.says("controller started")
        first = connection(ipython_dir)["url"]
        assert first.startswith("tcp://127.0.0.1:") and int(first.rpartition(":")[2]) > 1023
    with Command("controller", "--transport=tcp") as boss:
        boss.says("controller started")
        assert connection(ipython_dir)["url"] != first


def test_a_profile_that_is_edited_and_started(ipython_dir):
    """`profile create`, two lines in its files, and `ipcluster start` with no more than the profile, in both spellings."""
    folder = profile("myprofile", cluster="c.IPClusterEngines.n = 2\n", controller="c.IPController.ip = '*'\n",
                     engine="c.IPEngine.startup_command = 'import math; answer = 42'\n")
    assert sorted(os.listdir(folder))[:3] == ["ipcluster_config.py", "ipcontroller_config.py", "ipengine_config.py"]
    for word in ("profile=myprofile", "--profile=myprofile"):
        with Command("cluster", "start", word) as cluster:
            cluster.says("2 engines are ready")
            shown = run("cluster", "list")
            assert re.search(r"(?m)^myprofile +'' +running +2/2 +local", shown.out), shown.out
            with ipp.Client(profile="myprofile") as rc:
                assert rc[:]["answer"] == [42, 42]
                rc[:]["answer"] = 0
                rc[:].clear(block=True)
                assert rc[:]["answer"] == [42, 42], "startup code runs again after each clear"


def test_many_clusters_of_a_profile(ipython_dir):
    with Command("cluster", "start", "-n", "1") as one, Command("cluster", "start", "-n", "1", "--cluster-id=b") as two:
        for cluster in (one, two):
            cluster.says("engines are ready")
        assert {row["cluster_id"] for row in json.loads(run("cluster", "list", "-o", "json").out)} == {"", "b"}
        (row,) = json.loads(run("cluster", "list", "--cluster-id=b", "-o", "json").out)
        assert row["cluster_id"] == "b"


def test_three_hosts_without_a_shared_file_system(ipython_dir, tmp_path, monkeypatch):
    """`scp` the engine's file and give it by `--file`, or put it into another profile's security/."""
    with Command("controller", f"--ip={socket.gethostbyname('localhost')}", "--location=127.0.0.1",
                 "--transport=tcp") as boss:
        boss.says("controller started")
        for line in ("listening for engines on tcp://127.0.0.1:", "database DictDB", "wrote connection file ",
                     "ipcontroller-client.json", "ipcontroller-engine.json", "scheduler leastload", "heartbeat every"):
            assert line in boss.err, boss.err
        (tmp_path / "host1").mkdir()
        shutil.copy(security(ipython_dir) / "ipcontroller-engine.json", tmp_path / "host1")
        os.chmod(tmp_path / "host1" / "ipcontroller-engine.json", 0o600)
        env = {"IPYTHONDIR": str(tmp_path / "host2")}
        assert run("profile", "create", "--profile=ssh", env=env).process.returncode == 0
        shutil.copy(security(ipython_dir) / "ipcontroller-engine.json", tmp_path / "host2/profile_ssh/security")
        with Command("engine", "--file=./ipcontroller-engine.json", cwd=tmp_path / "host1",
                     env={"IPYTHONDIR": str(tmp_path / "host1/ipython")}), \
                Command("engine", "--profile=ssh", env=env), Command("cluster", "engines", "--n=4") as four:
            boss.says("engine 0 connected")
            four.says("4 engines are ready")
            boss.says("engine 5 connected")
            with ipp.Client(str(security(ipython_dir) / "ipcontroller-client.json")) as rc:
                assert len(rc) == 6


@pytest.mark.keeps_files
def test_files_that_are_copied_once(ipython_dir, tmp_path):
    """`ipcontroller --reuse`: same keys, same ports, and the engines of the run before come back."""
    with Command("controller", "--reuse", "--transport=tcp") as boss:
        boss.says("controller started")
        copies = {role: shutil.copy(security(ipython_dir) / f"ipcontroller-{role}.json", tmp_path) for role in
                  ("client", "engine")}
        with Command("engine", f"--file={copies['engine']}", env={"IPYTHONDIR": str(tmp_path / "far")}) as engine:
            boss.says("engine 0 connected")
            boss.stop(signal.SIGKILL)
            with Command("controller", "--reuse", "--transport=tcp") as again:
                again.says("engine 0 connected")
                with ipp.Client(copies["client"]) as rc:
                    assert rc[0].apply_sync(abs, -1) == 1
                again.stop()
                engine.stop()


def test_log_files_of_all_components(ipython_dir):
    with Command("cluster", "start", "-n", "1", "--log-to-file") as cluster:
        cluster.says("engines are ready")
        names = sorted(re.sub(r"-\d+", "", path.name) for path in ipython_dir.glob("profile_default/log/*"))
        assert names == ["ipcluster.log", "ipcontroller.log", "ipengine.log", "ipengine.log"], "an agent and an engine"
    line = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3} \[[a-z]+\] [A-Z]+: ")
    for path in ipython_dir.glob("profile_default/log/*"):
        lines = path.read_text().splitlines()
        assert lines and all(line.match(text) for text in lines), f"one format: {path}: {lines}"
        program = path.name.split("-")[0]
        assert program == "ipcluster" or re.search("(controller|agent) stopped: .|engine ended: .", lines[-1]), lines[-1]


@pytest.mark.parametrize("flag", ["--nodb", "--dictdb"])
def test_databases_in_memory(ipython_dir, flag):
    with Command("controller", flag, "--transport=ipc") as boss:
        boss.says("controller started")
        assert f"database {'NoDB' if flag == '--nodb' else 'DictDB'}" in boss.err


def test_what_an_engine_runs_first_and_where(ipython_dir, tmp_path):
    script = tmp_path / "startup.py"
    script.write_text("import os\nscratch = os.getcwd()\n")
    (tmp_path / "scratch").mkdir()
    profile("default", engine=f"c.IPEngine.startup_script = u'{script}'\nc.IPEngine.work_dir = u'{tmp_path / 'scratch'}/'\n"
                              "c.IPEngine.startup_command = 'import json, socket'\n"
                              "c.IPKernelApp.exec_lines = ['extra = scratch + \"!\"']\n")
    with Command("controller", "--transport=ipc"), Command("engine"), ipp.Client(timeout=20) as rc:
        rc.wait_for_engines(1, timeout=20)
        scratch = str(tmp_path / "scratch")
        assert rc[0]["scratch"] == scratch and rc[0]["extra"] == scratch + "!"
        assert rc[0].pull("json.__name__ + socket.__name__", block=True) == "jsonsocket"


def test_engine_that_can_not_find_the_file(ipython_dir, tmp_path):
    one_sentence(run("engine", f"--file={tmp_path}/no.json", "--timeout=0.2"), 1, "waited 0.2 s", f"{tmp_path}/no.json")


def test_ids_and_addresses_that_are_asked_for(ipython_dir):
    with Command("controller", "--transport=tcp") as boss:
        boss.says("controller started")
        url = connection(ipython_dir, "engine")["url"]
        path = security(ipython_dir) / "ipcontroller-engine.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "url": "tcp://203.0.113.9:9"}))
        with Command("engine", f"--url={url}", "--IPEngine.id=7", "-n", "2"):
            boss.says("engine 7 connected")
            boss.says("engine 8 connected")


def test_files_are_for_their_owner(ipython_dir):
    with Command("controller", "--transport=tcp") as boss:
        boss.says("controller started")
        for path in security(ipython_dir).iterdir():
            assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_stopping_with_a_signal(ipython_dir):
    for signal_name in ("SIGINT", "9"):
        assert run("cluster", "start", "-n", "2", "--daemonize").process.returncode == 0
        with ipp.Client() as rc:
            pids = [engine["pid"] for engine in rc.engine_info().values()]
        assert run("cluster", "stop", f"--signal={signal_name}").out == "Stopped the default cluster.\n"
        eventually(lambda pids=pids: not any(os.path.exists(f"/proc/{pid}") for pid in pids), what="the engines ended")
    one_sentence(run("cluster", "stop", "--signal=SIGNOPE"), 2, "--signal needs a signal's name or number")


def test_transports_of_each_role(ipython_dir):
    with Command("controller", "--IPController.client_transport=ipc", "--IPController.engine_transport=tcp") as boss:
        boss.says("controller started")
        client, engine = (connection(ipython_dir, role) for role in ("client", "engine"))
        assert client["ipc"] and not client["url"] and engine["url"] and not engine["ipc"]
        with Command("engine"), ipp.Client() as rc:
            rc.wait_for_engines(1, timeout=20)
