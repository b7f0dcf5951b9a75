"""The command lines as a person uses them, and a peer that speaks raw frames: for tests of both."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Iterator, Optional

import zmq
from support import eventually

from ipclite import net, wire

ROOT = Path(__file__).resolve().parents[1]


class Command:
    """A running `python -m ipclite ...`.

    Args:
        words: the command line after the package's name.
        env: environment variables over ours.
        via: a command that runs another one, which is put before.
    """

    def __init__(self, *words: str, env: Optional[dict[str, str]] = None, cwd: Optional[Path] = None,
                 code: Optional[list[str]] = None, via: tuple[str, ...] = ()):
        self._out, self._err = tempfile.TemporaryFile(), tempfile.TemporaryFile()
        path = os.pathsep.join(filter(None, (str(ROOT), (env or {}).get("PYTHONPATH"))))
        self.process = subprocess.Popen(
            [*via, sys.executable, *(code or ["-m", "ipclite", *words])], stdin=subprocess.DEVNULL, stdout=self._out,
            stderr=self._err,
            env={**os.environ, **(env or {}), "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}, cwd=cwd,
            start_new_session=True)
        self.pid = self.process.pid

    @staticmethod
    def _text(file: Any) -> str:
        return os.pread(file.fileno(), 10_000_000, 0).decode(errors="replace")

    @property
    def out(self) -> str:
        """What it has written to stdout."""
        return self._text(self._out)

    @property
    def err(self) -> str:
        """What it has written to stderr."""
        return self._text(self._err)

    def running(self) -> bool:
        return self.process.poll() is None

    def wait(self, timeout: float = 30) -> int:
        """Its exit code."""
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise AssertionError(f"still running after {timeout} s; it wrote:\n{self.out}\n{self.err}") from None

    def says(self, text: str, timeout: float = 30) -> "Command":
        """Wait until it has written `text`."""
        eventually(lambda: text in self.out + self.err or not self.running(), timeout,
                   f"{text!r} in {self.out}{self.err}")
        assert text in self.out + self.err, f"it ended with {self.process.poll()}: {self.out}{self.err}"
        return self

    def stop(self, signum: int = signal.SIGTERM) -> int:
        """Signal it and wait for its end."""
        if self.running():
            self.process.send_signal(signum)
        return self.wait()

    def __enter__(self) -> "Command":
        return self

    def __exit__(self, *exc: Any) -> None:
        self.stop()
        self._out.close()
        self._err.close()


def run(*words: str, timeout: float = 30, **options: Any) -> Command:
    """A command that has ended; its exit code is `.process.returncode`."""
    command = Command(*words, **options)
    command.wait(timeout)
    return command


def one_sentence(command: Command, code: int, *words: str) -> str:
    """Check that a command failed as a person wants it: with this exit code and one line on stderr that has these
    words, besides the lines of its log. Returns the line."""
    lines = [line for line in command.err.splitlines() if not line[:4].isdigit()]
    assert command.process.returncode == code, (command.process.returncode, command.err)
    assert "Traceback" not in command.err, command.err
    assert len(lines) == 1, command.err
    assert lines[0].startswith(("ipcluster: ", "ipcontroller: ", "ipengine: ", "ipclite: ")), lines
    for word in words:
        assert word in lines[0], (word, lines[0])
    return lines[0]


def security(ipython_dir: Path, profile: str = "default") -> Path:
    return ipython_dir / f"profile_{profile}" / "security"


def connection(ipython_dir: Path, role: str = "client", cluster_id: str = "", timeout: float = 20) -> dict[str, Any]:
    """A connection file's content, once it is there."""
    path = security(ipython_dir) / f"ipcontroller{'-' + cluster_id if cluster_id else ''}-{role}.json"
    eventually(path.exists, timeout, f"{path} exists")
    return dict(json.loads(path.read_text()))


@contextlib.contextmanager
def controller(ipython_dir: Path, *flags: str, **options: Any) -> Iterator[Command]:
    """A controller that has written its connection files."""
    with Command("controller", *flags, **options) as command:
        command.says("controller started")
        yield command
        assert command.running(), f"the controller died:\n{command.err}"


class Raw:
    """A socket that dials the controller and sends whatever it is told to.

    Args:
        address: where to.
        server, pair: CURVE keys; without `pair` fresh ones are made, without `server` CURVE is not spoken.
    """

    def __init__(self, address: str, server: str = "", pair: Optional[tuple[str, str]] = None):
        self.context = zmq.Context()
        self.sock = self.context.socket(zmq.DEALER)
        self.sock.linger = 0
        self.sock.sndtimeo = 2000
        if server:
            public, secret = pair or [k.decode() for k in zmq.curve_keypair()]
            self.sock.curve_serverkey, self.sock.curve_publickey = server.encode(), public.encode()
            self.sock.curve_secretkey = secret.encode()
        self.sock.setsockopt(zmq.RECONNECT_IVL, -1)
        self.monitor = self.sock.get_monitor_socket()
        self.sock.connect(address)

    @classmethod
    def member(cls, info: dict[str, Any], tcp: bool = False) -> "Raw":
        """With the keys of a connection file."""
        if tcp:
            return cls(info["url"], info["server_key"], (info["public_key"], info["secret_key"]))
        return cls(f"ipc://{info['ipc']}")

    def send(self, frames: list[Any]) -> None:
        self.sock.send_multipart([bytes(f) for f in frames])

    def hello(self, info: dict[str, Any], **body: Any) -> list[bytes]:
        """Say hello with the file's token; returns the answer."""
        proper = {"role": info["role"], "protocol": wire.VERSION, "session": os.urandom(8).hex(), "pid": 1, "host": "h",
                  "uuid": os.urandom(16).hex(), "agent": os.urandom(16).hex(), "token": net.token(info["secret_key"])}
        self.send(wire.encode_json(wire.HELLO, {**proper, **body}))
        return self.answer()

    def answer(self, *kinds: bytes, timeout: float = 10) -> list[bytes]:
        """The next message, or the next of these kinds."""
        while True:
            assert self.sock.poll(int(timeout * 1000)), "no answer"
            frames = self.sock.recv_multipart()
            if not kinds or frames[0] in kinds:
                return frames

    def silent(self, timeout: float = 0.3) -> bool:
        """Whether nothing comes for a while."""
        return not self.sock.poll(int(timeout * 1000))

    def kept_out(self, timeout: float = 10) -> bool:
        """Whether the handshake fails."""
        from zmq.utils.monitor import recv_monitor_message

        while self.monitor.poll(int(timeout * 1000)):
            event = recv_monitor_message(self.monitor)["event"]
            if event in (zmq.EVENT_HANDSHAKE_FAILED_AUTH, zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL,
                         zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL, zmq.EVENT_DISCONNECTED, zmq.EVENT_CONNECT_RETRIED):
                return True
            if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                return False
        return True

    def close(self) -> None:
        self.sock.disable_monitor()
        self.monitor.close(0)
        self.sock.close(0)
        self.context.term()

    def __enter__(self) -> "Raw":
        return self

    def __exit__(self, *exc: Any) -> None:
        self.close()
