"""The check for what a test leaves behind sees each kind of thing that it looks for."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import pytest
from support import QUEUES, Leaks, cluster_files, eventually, need, our_processes

SLEEP = "import time; time.sleep(600)"
DAEMON = f"""
import os, sys
if os.fork():
    sys.exit()
os.setsid()
print(os.getpid(), flush=True)
os.close(1)
{SLEEP}
"""


@pytest.fixture
def leaks(ipython_dir):
    return Leaks(ipython_dir.parent)


def test_a_child_is_seen_and_ended(leaks):
    assert leaks.now() == []
    child = subprocess.Popen([sys.executable, "-c", SLEEP])
    try:
        assert [line for line in leaks.now() if line.startswith(f"process {child.pid}: ")]
    finally:
        leaks.end()
        child.wait()
    assert leaks.now() == []


def test_a_daemon_is_seen_and_ended(leaks):
    pid = int(subprocess.run([sys.executable, "-c", DAEMON], stdout=subprocess.PIPE, check=True).stdout)
    assert pid in our_processes()
    assert len(leaks.now()) == 1
    leaks.end()
    eventually(lambda: leaks.now() == [])


def test_what_was_there_before_is_no_leak(ipython_dir):
    child = subprocess.Popen([sys.executable, "-c", SLEEP])
    try:
        assert Leaks(ipython_dir.parent).now() == []
    finally:
        child.kill()
        child.wait()


def test_a_listening_port_is_seen(leaks):
    with socket.create_server(("127.0.0.1", 0)) as server:
        assert leaks.now() == [f"listening port {server.getsockname()[1]}"]
    assert leaks.now() == []


def test_files_of_a_cluster_are_seen(leaks, ipython_dir):
    run, profile = ipython_dir.parent / "run", ipython_dir / "profile_default"
    for folder in (run, profile / "security", profile / "pid", profile / "log"):
        folder.mkdir(parents=True)
    left = {run / "s", profile / "security" / "ipcontroller-client.json", profile / "pid" / "ipcluster.pid"}
    for path in left - {run / "s"}:
        path.write_text("{}")
    (profile / "log" / "controller.log").write_text("a log may stay")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(run / "s"))
    assert cluster_files(ipython_dir.parent) == left
    assert leaks.now() == sorted(f"file {path}" for path in left)
    assert Leaks(ipython_dir.parent, files=False).now() == []
    for path in left:
        path.unlink()


def test_a_job_in_a_queue_is_seen_and_ended(leaks, monkeypatch):
    class Queue:
        waiting = ["7"]

        def jobs(self):
            return self.waiting

        def clear(self):
            self.waiting = []

    monkeypatch.setitem(QUEUES, "slurm", Queue())
    assert leaks.now() == ["job 7 of slurm"]
    leaks.end()
    assert leaks.now() == []


def test_waiting_has_a_deadline():
    assert eventually(lambda: 7) == 7
    with pytest.raises(pytest.fail.Exception, match="still not: rain"):
        eventually(lambda: False, 0.05, "rain")


def test_an_absent_service_skips_or_fails_in_ci(monkeypatch):
    need(True, "Slurm")
    for word in ("true", "1"):
        monkeypatch.setenv("CI", word)
        with pytest.raises(pytest.fail.Exception, match="Slurm is absent"):
            need(None, "Slurm")
    monkeypatch.delenv("CI")
    with pytest.raises(pytest.skip.Exception):
        need(None, "Slurm")


def test_directories_are_the_tests_own(ipython_dir):
    assert os.environ["IPYTHONDIR"] == str(ipython_dir)
    assert len(os.environ["IPCLITE_RUNTIME_DIR"]) < 60, "a socket path must stay under 107 bytes"
