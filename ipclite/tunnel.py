"""ssh tunnels: the controller's port, brought to a socket of this host.

    client, agent ── Tunnel ── JSON lines on stdin and stdout ──► tunnel process
    client, agent, engines ══ its socket ══► tunnel process ══ ssh ══► sshd ──► controller

The ssh connection is held by a process of its own. A program that keeps Python to itself for a minute must not hold up
the heartbeats that pass through it, and an agent that forks engines must have no threads. Engines have no tunnel: they
dial their agent's socket (`Shared`).

Rules that hold here: paramiko is imported by the tunnel process alone; nothing secret is in an argument, the
environment or a log; the socket lies in a directory that only the user can enter; questions are asked on a terminal, by
the owner, or not at all; the process ends with its owner. Every request gets one line in answer, or several of which
all but the last are questions.
"""

from __future__ import annotations

import contextlib
import getpass
import json
import logging
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, Optional, Tuple

from .errors import ConnectError, TunnelError, UserError
from .files import runtime_dir
from .ssh import WINDOW, Login, last_words, on_terminal, open_channel

TUNNEL_S = 20.0  # the least time that a connection through several hosts gets
CHUNK = 32 * 1024 - 64  # bytes: fits the packets that sshd takes
NOTICE_S = 0.5  # for an ssh connection to notice its end
DRAIN_S = 1.0  # for what is on its way when the owner leaves
LOOPBACK = ("127.0.0.1", "::1", "localhost")


# ---------------------------------------------------------------- the owner's end


class Tunnel:
    """A way to the controller through an ssh server, made when it is asked for and made again when it broke.

    Args:
        name: of the socket in the runtime directory; it stays the same when the tunnel is made again.
        key: path of the private key to try first, or "".
        password: for the account and for the key; otherwise they are asked for on a terminal.
    """

    def __init__(self, name: str, key: str = "", password: Optional[str] = None):
        self.path = socket_path(name) if hasattr(socket, "AF_UNIX") else ""
        self.server = ""
        self._key, self._password = key, password
        self._process: Any = None
        self._answers: dict[str, str] = {}
        self._pid = os.getpid()

    def reach(self, server: str, host: str, port: int, home: str, timeout_s: float) -> str:
        """See to it that the controller can be reached.

        Args:
            server: "[user@]host[:port]", or a name in ~/.ssh/config.
            host, port: where the controller listens, as the ssh server sees it; port 0: `host` is the path of a socket.
            home: name of the controller's host, for messages.
            timeout_s: to reach it in, of at least `TUNNEL_S`; questions to the user do not count.

        Returns:
            The address to dial: "ipc://..." or, where sockets have no paths, "tcp://127.0.0.1:...".

        Raises:
            TunnelError: the ssh connection can't be made; names the step, the server and the fix.
            ConnectError: it can, but there is no controller at its far end.
        """
        timeout_s = max(timeout_s, TUNNEL_S)
        if self._process is not None and (server != self.server or self._process.poll() is not None):
            self.close()
        request: dict[str, Any] = {"reach": [host, port], "home": home, "timeout": timeout_s}
        if self._process is None:
            self._spawn()
            self.server = server
            request.update(server=server, key=self._key, password=self._password, path=self.path)
        answer = self._ask(request)
        if "address" in answer:
            return str(answer["address"])
        if answer.get("far"):
            raise ConnectError(answer["error"])
        self.close()
        raise TunnelError(answer.get("error") or self._sentence(answer["lost"]), bool(answer.get("passing", True)))

    def trouble(self) -> str:
        """Why the tunnel is broken, or "" if it is not."""
        if self._process is None or self._pid != os.getpid():
            return ""
        lost = self._ask({}).get("lost", "")
        return self._sentence(lost) if lost else ""

    def _sentence(self, lost: str) -> str:
        return f"the ssh tunnel through {self.server} broke ({lost})"

    def _spawn(self) -> None:
        root = Path(__file__).resolve().parents[1]
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (str(root), os.environ.get("PYTHONPATH"))))}
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env,
            start_new_session=True)  # Ctrl-C is the owner's

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        used: set[str] = set()
        while True:
            with contextlib.suppress(BrokenPipeError):  # then its last words, or their absence, are the answer
                self._process.stdin.write(json.dumps(request).encode() + b"\n")
                self._process.stdin.flush()
            line = self._process.stdout.readline()
            if not line:
                return {"lost": f"its process ended with code {self._process.wait()}"}
            answer: dict[str, Any] = json.loads(line)
            if "ask" not in answer:
                return answer
            request = {"answer": self._question(answer["ask"], used)}

    def _question(self, prompt: str, used: set[str]) -> Optional[str]:
        """What the user says, or said when the tunnel was made before; None without a terminal."""
        if prompt not in self._answers or prompt in used:
            if not on_terminal():
                return None
            try:
                self._answers[prompt] = getpass.getpass(prompt)
            except BaseException:
                self.abandon()
                raise
        used.add(prompt)
        return self._answers[prompt]

    def abandon(self) -> None:
        """End the process at once, so that a `reach` that waits returns."""
        if self._process is not None and self._pid == os.getpid():
            self._process.terminate()

    def close(self) -> None:
        """End the tunnel, after what is on its way."""
        process, self._process = self._process, None
        if process is None or self._pid != os.getpid():
            return
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()
        try:
            process.wait(2 * DRAIN_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()
        if self.path:
            Path(self.path).unlink(missing_ok=True)


class Shared:
    """Another process's tunnel, for engines: their agent's.

    Args:
        name: what the owner calls its `Tunnel`.
    """

    def __init__(self, name: str):
        self._path = socket_path(name)

    def reach(self, server: str, host: str, port: int, home: str, timeout_s: float) -> str:
        """As `Tunnel.reach`, if the owner has made it."""
        if not os.path.exists(self._path):
            raise ConnectError(f"the agent has no ssh tunnel through {server} at present")
        return f"ipc://{self._path}"

    def trouble(self) -> str:
        """As `Tunnel.trouble`; the owner alone knows more."""
        return "" if os.path.exists(self._path) else "the agent's ssh tunnel broke"

    def close(self) -> None:
        """It is not ours."""


def socket_path(name: str) -> str:
    """Where the tunnel of this name listens."""
    return str(runtime_dir() / f"tunnel-{name}")


# ---------------------------------------------------------------- the tunnel process


class Forwarder:
    """Listens on a socket of this host, and carries what comes there to the controller and back.

    Args:
        transport: of the ssh server `server`.
        path: of the socket; "": listen on a port.
    """

    def __init__(self, transport: Any, server: str, path: str):
        self._transport, self._server, self._path = transport, server, path
        self._target: Tuple[str, int] = ("", 0)
        self._spare: list[Any] = []  # a channel that showed that the controller is there serves the next connection
        self._busy: set[threading.Thread] = set()
        if path:
            Path(path).unlink(missing_ok=True)
            self._listener = socket.socket(socket.AF_UNIX)
            self._listener.bind(path)
            self._listener.listen(256)
            self.address = f"ipc://{path}"
        else:
            self._listener = socket.create_server(("127.0.0.1", 0))
            self.address = "tcp://127.0.0.1:%d" % self._listener.getsockname()[1]

    def aim(self, host: str, port: int, home: str, timeout_s: float) -> None:
        """Lead to the controller on the host `home` from now on; raises what `open_channel` does."""
        self._target = (host, port)
        try:
            channel = open_channel(self._transport, self._server, host, port, timeout_s)
        except TunnelError:
            raise
        except ConnectError as e:
            fix = (f"; a controller that listens on its own host only is reached by ssh to that host ({home}), or "
                   "start it with --ip=* (or --ip=ADDRESS)" if host in LOOPBACK or not port else
                   "; is the controller gone? If not, correct 'location' in the connection file, or start it with "
                   "--ip=* and the --location=ADDRESS that the ssh server knows it by")
            raise ConnectError(f"{e}{fix}") from None
        for old in self._spare:
            old.close()
        self._spare = [channel]

    def serve(self) -> None:
        """Take connections for as long as the process lives."""
        while True:
            try:
                local, _ = self._listener.accept()
            except OSError:  # we are ending
                return
            threading.Thread(target=self._carry, args=(local,), daemon=True).start()

    def _carry(self, local: socket.socket) -> None:
        with local:
            try:
                channel = self._spare.pop() if self._spare else open_channel(
                    self._transport, self._server, *self._target, TUNNEL_S)
            except UserError:  # the owner is told when it asks for the controller again
                return
            up = threading.Thread(target=self._up, args=(local, channel), daemon=True)
            self._busy.add(up)
            up.start()
            with contextlib.suppress(OSError):  # one end is gone, and the other will be
                while True:
                    data = channel.recv(WINDOW)
                    if not data:
                        break
                    local.sendall(data)
            with contextlib.suppress(OSError):
                local.shutdown(socket.SHUT_RDWR)
            up.join()
            self._busy.discard(up)

    def _up(self, local: socket.socket, channel: Any) -> None:
        with contextlib.suppress(OSError):
            while True:
                data = local.recv(CHUNK)
                if not data:
                    break
                channel.sendall(data)
        channel.close()

    def close(self) -> None:
        """Take no more connections, and let those that have ended deliver what they sent."""
        if self._path:
            Path(self._path).unlink(missing_ok=True)
        self._listener.close()
        deadline = time.monotonic() + DRAIN_S
        for up in list(self._busy):
            up.join(max(0.0, deadline - time.monotonic()))
        self._transport.close()


class Servant:
    """The tunnel process: answers the owner's requests until its stdin ends."""

    def __init__(self) -> None:
        self._writing = threading.Lock()
        self._forwarder: Optional[Forwarder] = None
        self._transport: Any = None
        self._owner = os.getppid()

    def run(self) -> None:
        """Serve, and leave with the owner."""
        while True:
            request = self._read()
            if request is None:
                break
            if "reach" in request:
                self._say(self._reach(request))
            else:
                self._transport.join(NOTICE_S)
                if not self._transport.is_alive():
                    threading.Event().wait()  # what is said of its end is the answer, and the end of us
                self._say({"lost": ""})
        if self._forwarder is not None:
            self._forwarder.close()

    def _read(self) -> Optional[dict[str, Any]]:
        line = sys.stdin.readline()
        return json.loads(line) if line else None

    def _say(self, answer: dict[str, Any]) -> None:
        with self._writing:
            with contextlib.suppress(BrokenPipeError):  # the end of stdin ends us
                sys.stdout.write(json.dumps(answer) + "\n")
                sys.stdout.flush()

    def _ask(self, prompt: str) -> Optional[str]:
        self._say({"ask": prompt})
        reply = self._read()
        if reply is None:
            raise SystemExit(1)
        answer: Optional[str] = reply["answer"]
        return answer

    def _reach(self, request: dict[str, Any]) -> dict[str, Any]:
        host, port = request["reach"]
        try:
            if self._forwarder is None:
                login = Login(request["key"], request["password"], self._ask, request["timeout"])
                self._transport = login.connect(request["server"])
                self._forwarder = Forwarder(self._transport, request["server"], request["path"])
                for function in (self._forwarder.serve, self._watch_ssh, self._watch_owner):
                    threading.Thread(target=function, daemon=True).start()
            self._forwarder.aim(host, port, request["home"], request["timeout"] / 2)
            return {"address": self._forwarder.address}
        except ImportError as e:
            return {"error": f"ssh tunnels need paramiko, which this Python lacks ({e}); install it with `pip install "
                             f"paramiko`, or make a tunnel by hand: ssh -L {port}:{host}:{port} SERVER, and write "
                             f"tcp://127.0.0.1:{port} as 'url' and no "
                             "'ssh' into the connection file", "passing": False}
        except TunnelError as e:
            return {"error": str(e), "passing": e.passing}
        except ConnectError as e:
            return {"error": str(e), "far": True}

    def _watch_ssh(self) -> None:
        """The end of the ssh connection is ours."""
        self._transport.join()
        trouble = self._transport.get_exception()
        closed = trouble is None or isinstance(trouble, EOFError)
        self._say({"lost": "the server closed the connection" if closed else str(trouble)})
        self._leave()

    def _watch_owner(self) -> None:
        """A process that the owner forked may keep our stdin open."""
        while os.getppid() == self._owner:
            time.sleep(1)
        self._leave()

    def _leave(self) -> None:
        if self._forwarder is not None:
            self._forwarder.close()
        os._exit(0)


def main() -> int:
    """The tunnel process."""
    log = logging.getLogger("paramiko")
    log.addHandler(last_words)
    log.propagate = False
    Servant().run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
