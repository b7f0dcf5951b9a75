"""`ipclite doctor`: each thing that can be wrong between a profile and a welcome is found and told with its remedy."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import warnings

import pytest
from shell import Command, Raw, connection, controller, run, security

import ipclite as ipp

FAILED = "FAIL"
HERE = ".".join(map(str, sys.version_info[:2]))


def verdicts(*words, code=None):
    """{step: (result, text)}"""
    done = run("doctor", "--json", *words)
    assert done.process.returncode == (0 if code is None else code), done.out + done.err
    return {row["step"]: (row["result"], row["text"]) for row in json.loads(done.out)}


def failures(*words):
    """What failed: {step: text}"""
    return {step: text for step, (result, text) in verdicts(*words, code=1).items() if result == FAILED}


def edit(ipython_dir, **changes):
    path = security(ipython_dir) / "ipcontroller-client.json"
    info = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps(info))
    return path


@pytest.mark.parametrize("transport", ["ipc", "tcp"])
def test_all_is_well(ipython_dir, transport):
    with controller(ipython_dir, f"--transport={transport}", "--ip=127.0.0.1") as boss, Command("engine", "-n", "2"):
        boss.says("engine 1 connected")
        found = verdicts()
        assert {result for result, _ in found.values()} == {"ok"}
        assert found["client: key"][1] == "the controller welcomes us; it has 2 engines"
        assert found["engine: key"][1] == "the controller welcomes us"
        assert ("is there" if transport == "ipc" else "takes connections") in found["engine: address"][1]
        text = run("doctor")
        assert text.process.returncode == 0 and text.out.endswith("Everything is as it must be.\n")
        assert all(line.startswith(("ok    ", "Everything")) for line in text.out.splitlines())
        assert connection(ipython_dir)["secret_key"] not in text.out
        assert verdicts()["client: key"][1].endswith("2 engines"), "the probes are no engines"


def test_no_profile(ipython_dir):
    found = failures()
    assert "There is no profile" in found["profile"] and "--profile" in found["profile"]
    assert list(ipython_dir.iterdir()) == [], "it changes nothing"
    assert run("doctor", "--profile=nope").process.returncode == 2


def test_another_cluster(ipython_dir):
    with controller(ipython_dir, "--cluster-id=other"):
        connection(ipython_dir, cluster_id="other")
        found = failures()
        assert "There are files of --cluster-id=other (cluster_id=)." in found["client's connection file"]
        assert verdicts("--cluster-id=other")["client: key"][0] == "ok"


def test_modes_and_settings(ipython_dir):
    with controller(ipython_dir):
        connection(ipython_dir)
        folder = security(ipython_dir)
        folder.chmod(0o755)
        (folder / "ipcontroller-client.json").chmod(0o644)
        (folder.parent / "ipengine_config.py").write_text("c.IPEngine.tiemout = 3\n")
        found = failures()
        assert f"chmod 700 {folder}" in found["security"]
        assert "chmod 600" in found["client's connection file"]
        assert "did you mean timeout?" in found["settings of ipengine"]
        (folder.parent / "ipcontroller_config.py").write_text("")
        (folder.parent / "ipcontroller_config.py").chmod(0o666)
        assert "chmod o-w" in failures()["settings of ipcontroller"]
        folder.chmod(0o700)
        (ipython_dir.parent / "run").chmod(0o755)
        assert "chmod 700" in failures()["socket directory"]
        (ipython_dir.parent / "run").chmod(0o700)


@pytest.mark.keeps_files
def test_a_dead_controller(ipython_dir):
    with Command("controller", "--transport=tcp") as boss:
        boss.says("controller started")
        boss.stop(signal.SIGKILL)
    found = failures()
    assert "is of a run that has ended" in found["client: controller"]
    assert "ipcluster clean" in found["engine: controller"]
    assert run("cluster", "clean").process.returncode == 0
    assert not list(security(ipython_dir).iterdir())


@pytest.mark.parametrize("changes, step, hint", [
    ({"program": "other"}, "client's connection file", "of another program"),
    ({"protocol": 99, "version": "9.9"}, "client's connection file", "install the same version"),
    ({"role": "engine"}, "client's connection file", "ends in -client.json"),
    ({"url": "tcp://no.such.host.invalid:9", "ipc": "", "location": ""}, "client: name lookup", "--location"),
    ({"url": "", "ipc": "", "location": ""}, "client: name lookup", "--ip=*"),
    ({"url": "tcp://127.0.0.1:9", "ipc": "", "host": "elsewhere"}, "client: name lookup", "loopback of elsewhere only"),
    ({"url": "tcp://127.0.0.1:1", "ipc": ""}, "client: address", "firewall"),
    ({"ipc": "", "server_key": "rq:rM>}U?@Lns47E1%kR.o@n%FcmmsL/@{H8]yf7"}, "client: key", "copy"),
    ({"ipc": "", "public_key": "Yne@$w-vo<fVvi]a<NY6T1ed:M$fCG*[IaLV{hID",
      "secret_key": "D:)Q[IlAW!ahhC2ac:9*A}h:p?([4%wOTJ%JR%cs"}, "client: key", "key"),
])
def test_a_file_that_is_wrong(ipython_dir, changes, step, hint):
    with controller(ipython_dir, "--transport=tcp", "--ip=127.0.0.1"):
        connection(ipython_dir)
        edit(ipython_dir, **changes)
        found = failures()
        assert list(found) == [step], "the first step that fails, and no other"
        assert hint in found[step], found[step]


def test_a_clock_that_is_behind(ipython_dir):
    with controller(ipython_dir):
        info = connection(ipython_dir)
        path = edit(ipython_dir, started=info["started"] + 1000)
        os.utime(path, (info["started"] + 1000,) * 2)
        result, text = verdicts()["clock"]
        assert result == "note" and text.startswith("the controller's host is ") and "; the file server is " in text


def test_another_python(ipython_dir):
    """Byte code does not travel between versions: doctor and client say so."""
    with controller(ipython_dir):
        info = connection(ipython_dir, "engine")
        old = Raw.member(info)
        old.hello(info, python="2.7.18")
        assert verdicts()["client: key"][1].endswith(f"1 engines, some with Python 2.7 (here {HERE})")
        with pytest.warns(UserWarning, match=f"engine 0 runs Python 2.7.18 and this is Python {HERE}: functions of"):
            ipp.Client().close()
        old.close()
    with controller(ipython_dir), Command("engine"), warnings.catch_warnings():
        warnings.simplefilter("error")
        with ipp.Client(timeout=20) as rc:
            rc.wait_for_engines(1, timeout=20)


def test_launchers(ipython_dir, tmp_path, monkeypatch):
    """The command that a cluster of this profile would be started with is on PATH, or it is told that it is not."""
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    with controller(ipython_dir):
        connection(ipython_dir)
        assert verdicts()["launcher of the engines"] == ("ok", "local")
        path = security(ipython_dir).parent / "ipcluster_config.py"
        for name, command, text in (("slurm", "sbatch", ""), ("mpi", "srun", "c.MPILauncher.mpi_cmd = ['srun', '--mpi=pmi2']\n"),
                                    ("PBSEngineSetLauncher", "qsub", "")):
            path.write_text(f"c.Cluster.engine_launcher_class = {name!r}\n{text}")
            assert f"{command}, which is not on PATH" in failures()["launcher of the engines"]
            program = tmp_path / "bin" / command
            program.write_text("#!/bin/sh\n")
            program.chmod(0o755)
            assert verdicts()["launcher of the engines"][1].endswith(f"by {program}")
        path.write_text("c.Cluster.engine_launcher_class = 'nope'\n")
        assert "choose from local" in failures()["launcher of the engines"]


def test_through_ssh(ipython_dir):
    """A server that is none: the step and the name. One that is there is in test_tunnels.py."""
    with controller(ipython_dir, "--transport=tcp"):
        connection(ipython_dir)
        edit(ipython_dir, ssh="me@no.such.host.invalid", ipc="")
        found = failures()
        assert list(found) == ["client: key"]
        assert "the ssh server 'no.such.host.invalid' can't be looked up" in found["client: key"]


def test_something_else_listens(ipython_dir):
    with controller(ipython_dir, "--transport=tcp"), socket.create_server(("127.0.0.1", 0)) as mute:
        connection(ipython_dir)
        edit(ipython_dir, url=f"tcp://127.0.0.1:{mute.getsockname()[1]}", ipc="")
        assert "no controller answered" in failures()["client: key"]
