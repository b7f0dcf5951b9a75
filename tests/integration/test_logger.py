"""`ipclite logger` and `--log-url`: the lines of all processes in one place, for nobody else to read."""

from __future__ import annotations

import contextlib
import re
import socket

import pytest
import zmq
from shell import Command, controller, one_sentence, run, security
from support import eventually

import ipclite as ipp
from ipclite import net

pytestmark = pytest.mark.keeps_files  # the logger's keys


@contextlib.contextmanager
def logger(*words):
    """A running logger and its address."""
    with Command("logger", *words) as command:
        command.says("--log-url=")
        yield command, re.search(r"--log-url=(\S+)", command.err)[1]


def test_lines_of_all_processes(ipython_dir):
    with logger() as (lines, url), Command("cluster", "start", "-n", "2", f"--log-url={url}") as cluster:
        cluster.says("engines are ready")
        host = re.escape(socket.gethostname())
        for line in (r"\[ipcontroller\] INFO: controller started", r"\[ipcontroller\] INFO: engine 1 connected",
                     r"\[ipcluster\] INFO: Started the controller"):
            eventually(lambda line=line: re.search(rf"(?m)^{host}:\d+ \d{{4}}-.* {line}", lines.out), 20, line)
        cluster.stop()
        eventually(lambda: lines.out.count("[ipengine] INFO: engine ended: ") == 2, 20, lines.out)
        eventually(lambda: "agent stopped" in lines.out and "controller stopped" in lines.out, 20, lines.out)
        assert "controller stopped" in next(ipython_dir.glob("*/log/ipcontroller*")).read_text(), "as well"


def test_the_address_stays_and_the_profile_knows_it(ipython_dir):
    with logger() as (_, url):
        address, _, key = url.rpartition("/")
    with logger(f"--url={address}") as (lines, again):
        assert again == url
        with controller(ipython_dir, f"--log-url={address}", "--transport=ipc"):
            eventually(lambda: "controller started" in lines.out)
        assert (security(ipython_dir) / "iplogger.json").stat().st_mode & 0o777 == 0o600


def test_topics(ipython_dir):
    with logger("--topics=ipengine,ipcontroller.WARNING") as (lines, url):
        with controller(ipython_dir, f"--log-url={url}", "--transport=ipc"), Command("engine", f"--log-url={url}"):
            with ipp.Client() as rc:
                rc.wait_for_engines(1, timeout=20)
                rc.shutdown(0)
            eventually(lambda: "WARNING: engine 0 (pid " in lines.out and "engine ended" in lines.out, 20, lines.out)
        assert "INFO: controller started" not in lines.out


def test_nobody_waits_for_a_logger_that_is_away(ipython_dir):
    with logger() as (_, url):
        pass
    with Command("controller", f"--log-url={url}", "--transport=ipc") as boss:
        boss.says("controller started")
        with logger(f"--url={url.rpartition('/')[0]}") as (lines, _):
            eventually(lambda: "controller started" in lines.out, 20, "what was said before it came")
        assert boss.stop() == 0


def test_outsiders(ipython_dir):
    """Without the logger's key nobody gets a line in; a line plays no tricks on the terminal."""
    with logger() as (lines, url):
        address = url.rpartition("/")[0]
        context = zmq.Context()
        plain = context.socket(zmq.PUSH)
        plain.linger = 0
        plain.connect(address)
        plain.send_multipart([b"ipengine.INFO", b"me", b"plain"], zmq.NOBLOCK)
        keyed = net.line_sender(context, address, url.rpartition("/")[2], 10, 0)
        for frames in ([b"x"], [b"t", b"o", b"\x1b[2Jwiped\xff"], [b"t", b"o", b"the end"]):
            keyed.send_multipart(frames)
        eventually(lambda: "the end" in lines.out)
        assert lines.out.splitlines() == ["o \\x1b[2Jwiped\N{REPLACEMENT CHARACTER}", "o the end"]
        plain.close()
        keyed.close()
        context.term()


@pytest.mark.parametrize("words, code, hints", [
    (["controller", "--log-url=nonsense"], 2, ["--log-url needs an address", "ipclite logger"]),
    (["engine", "--log-url=tcp://h:1/abc"], 2, ["--log-url needs an address"]),
    (["logger", "--url=tcp://203.0.113.1:0"], 2, ["can not listen on 203.0.113.1", "--url"]),
    (["logger", "--url=udp://x"], 2, ["--url needs an address to listen on"]),
])
def test_wrong_words(ipython_dir, words, code, hints):
    one_sentence(run(*words), code, *hints)


def test_an_address_without_a_key_is_a_warning(ipython_dir):
    """As in old profiles: `c.IPController.log_url = 'tcp://127.0.0.1:20202'`."""
    (ipython_dir / "profile_default").mkdir()
    (ipython_dir / "profile_default" / "ipcontroller_config.py").write_text(
        "c.IPController.log_url = 'tcp://127.0.0.1:20202'\n")
    with controller(ipython_dir, "--transport=ipc") as boss:
        assert "has no effect: give the whole address that `ipclite logger` prints" in boss.err
