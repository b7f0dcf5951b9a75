"""ssh tunnels: the controller's port, brought to a socket of this host.

    client, agent ── Tunnel ── JSON lines on stdin and stdout ──► tunnel process: ssh connection, listening socket
    client, agent, engines ═══ the socket ═══► tunnel process ═══ ssh ═══► sshd ───► controller

The ssh connection is held by a process of its own. A program that keeps Python to itself for a minute must not hold up
the heartbeats that pass through it, and an agent that forks engines must have no threads. Engines have no tunnel:
they dial their agent's socket (`Shared`).

Rules that hold here: paramiko is imported by the tunnel process alone; nothing secret is in an argument, the environment or
a log; the socket lies in a directory that only the user can enter; a host key that is not known is refused; questions are
asked on a terminal, by the owner, or not at all; the process ends with its owner. Every request gets one line in answer, or
several of which all but the last are questions.
"""

from __future__ import annotations

import binascii
import contextlib
import fnmatch
import getpass
import glob
import hashlib
import json
import logging
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, Callable, Iterator, NamedTuple, Optional, Tuple

from .errors import ConnectError, TunnelError, UserError
from .files import runtime_dir

TUNNEL_S = 20.0  # the least time that a connection through several hosts gets
ASK_TIMES = 3  # how often a password or passphrase may be mistyped
CHUNK = 32 * 1024 - 64  # bytes: fits the packets that sshd takes
WINDOW = 16 << 20  # bytes on their way before the other end must speak up
KEEPALIVE_S, GONE_S = 5, 15  # signs of life, and how long to do without
NOTICE_S = 0.5  # for an ssh connection to notice its end
DRAIN_S = 1.0  # for what is on its way when the owner leaves
INCLUDES_MAX = 16  # depth
JUMPS_MAX = 8
LOOPBACK = ("127.0.0.1", "::1", "localhost")
PROHIBITED = 1  # https://www.rfc-editor.org/rfc/rfc4254#section-5.1
DEFAULT_KEYS = ("~/.ssh/id_ed25519", "~/.ssh/id_ecdsa", "~/.ssh/id_rsa")
KNOWN_HOSTS = ("~/.ssh/known_hosts", "~/.ssh/known_hosts2", "/etc/ssh/ssh_known_hosts")


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
            host, port: where the controller listens, as the ssh server sees it.
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


def on_terminal() -> bool:
    """Whether somebody can be asked: stdin is a terminal, and we are not in its background."""
    if sys.stdin is None or sys.stdin.closed or not sys.stdin.isatty():
        return False
    return not hasattr(os, "tcgetpgrp") or os.tcgetpgrp(sys.stdin.fileno()) == os.getpgrp()


# ---------------------------------------------------------------- the tunnel process: names and configuration


class Hop(NamedTuple):
    """An ssh server: what the user calls it, and what its configuration makes of that."""

    name: str
    host: str
    port: int
    user: str
    options: dict[str, Any]

    def __str__(self) -> str:
        return f"{self.user}@{self.host}:{self.port}"

    @property
    def key_name(self) -> str:
        """Under which its key is in known_hosts."""
        alias = self.options.get("hostkeyalias")
        host = alias or self.host
        return host if self.port == 22 or alias else f"[{host}]:{self.port}"


def parse_server(server: str) -> Tuple[str, str, int]:
    """(user or "", host, port or 0) of "[ssh://][user@]host[:port]"; an IPv6 address with a port has brackets.

    Raises:
        TunnelError: it is none.
    """
    user, _, host = server.strip().replace("ssh://", "", 1).rstrip("/").rpartition("@")
    port = ""
    if host.startswith("["):
        host, _, rest = host[1:].partition("]")
        port = rest.lstrip(":")
    elif host.count(":") == 1:
        host, _, port = host.partition(":")
    if not host or host.startswith("-") or (port and not (port.isdigit() and 0 < int(port) < 65536)):
        raise TunnelError(f"{server!r} is not the name of an ssh server; give it as user@host:port, or as in ~/.ssh/config")
    return user, host, int(port or 0)


def config_text(path: str, depth: int = 0) -> str:
    """A configuration file of ssh with what it includes."""
    try:
        text = Path(path).expanduser().read_text(encoding="utf-8", errors="surrogateescape")
    except (FileNotFoundError, PermissionError):
        return ""
    lines = []
    for line in text.splitlines():
        words = line.replace("=", " ", 1).split()
        if words[:1] and words[0].lower() == "include" and depth < INCLUDES_MAX:
            for pattern in words[1:]:
                pattern = os.path.join(os.path.dirname(path), os.path.expanduser(pattern.strip('"')))
                lines += [config_text(found, depth + 1) for found in sorted(glob.glob(os.path.expanduser(pattern)))]
        else:
            lines.append(line)
    return "\n".join(lines) + "\n"


def find_hop(server: str, config: Any) -> Hop:
    """What the user's configuration says about a server."""
    user, name, port = parse_server(server)
    options = dict(config.lookup(name))
    return Hop(name, options["hostname"], port or int(options.get("port", 22)),
               user or options.get("user") or getpass.getuser(), options)


# ---------------------------------------------------------------- the tunnel process: connecting


class Login:
    """Makes the ssh connection, through other servers if need be.

    Args:
        key, password: as in `Tunnel`.
        ask: puts a question to the user; returns None if nobody can answer.
        timeout_s: for everything but the questions.
    """

    def __init__(self, key: str, password: Optional[str], ask: Callable[[str], Optional[str]], timeout_s: float):
        import paramiko

        self._paramiko: Any = paramiko
        self._key, self._password = key, password
        self._put = ask
        self._deadline = time.monotonic() + timeout_s
        try:
            self._config = paramiko.SSHConfig.from_text(config_text("~/.ssh/config") + config_text("/etc/ssh/ssh_config"))
        except (paramiko.ConfigParseError, paramiko.SSHException) as e:
            raise TunnelError(f"~/.ssh/config can't be read: {e}") from None

    def connect(self, server: str, through: Any = None, jumps: int = 0) -> Any:
        """A paramiko Transport that is logged in, made by way of another one if that is given.

        Raises:
            TunnelError: names the step, the server and the fix.
        """
        hop = find_hop(server, self._config)
        paramiko = self._paramiko
        if jumps > JUMPS_MAX:
            raise TunnelError(f"ProxyJump in ~/.ssh/config leads from {server} to itself; remove the line")
        transport = paramiko.Transport(self._socket(hop, through, jumps), default_window_size=WINDOW)
        fast = [name for name in transport.get_security_options().ciphers if "gcm" in name]
        transport.get_security_options().ciphers = fast + [
            name for name in transport.get_security_options().ciphers if name not in fast]
        try:
            known = list(self._known_keys(hop))
            kinds = transport.get_security_options().key_types
            wanted = {kind for _, one, _ in known for kind in _signatures(one)}
            transport.get_security_options().key_types = sorted(kinds, key=lambda kind: kind not in wanted)
            try:
                transport.start_client(timeout=self._left())
            except (paramiko.SSHException, EOFError, OSError) as e:
                raise TunnelError(f"{hop.host}:{hop.port} did not complete the ssh handshake ({e or 'it closed the connection'}); is "
                                  "an ssh server listening there, or does it have too many connections?", True) from None
            self._check_host_key(hop, transport.get_remote_server_key(), known)
            self._log_in(transport, hop)
        except BaseException:
            transport.close()
            raise
        transport.set_keepalive(KEEPALIVE_S)
        return transport

    def _left(self) -> float:
        return max(1.0, self._deadline - time.monotonic())

    def _ask(self, prompt: str) -> Optional[str]:
        began = time.monotonic()
        answer = self._put(prompt)
        self._deadline += time.monotonic() - began
        return answer

    def _socket(self, hop: Hop, through: Any, jumps: int) -> Any:
        jump, command = hop.options.get("proxyjump", "none"), hop.options.get("proxycommand", "none")
        if through is None and jump.lower() != "none":
            for name in jump.split(","):
                through = self.connect(name.strip(), through, jumps + 1)
        if through is not None:
            return self._jump(through, hop)
        if command.lower() != "none":
            return self._paramiko.ProxyCommand(command)
        try:
            found = socket.getaddrinfo(hop.host, hop.port, type=socket.SOCK_STREAM)
        except OSError as e:
            raise TunnelError(f"the ssh server {hop.host!r} can't be looked up ({e.strerror or e}); is the name right, or does it "
                              "lack a HostName in ~/.ssh/config?", True) from None
        trouble: Optional[OSError] = None
        for family, kind, _, _, address in found:
            sock = socket.socket(family, kind)
            sock.settimeout(self._left())
            try:
                sock.connect(address)
                _keep_alive(sock)
                return sock
            except OSError as e:
                sock.close()
                trouble = e
        if isinstance(trouble, ConnectionRefusedError):
            raise TunnelError(f"{hop.host}:{hop.port} refused the connection: no ssh server listens there; is the port right "
                              "(user@host:port), and sshd running?", True)
        raise TunnelError(f"no connection to the ssh server {hop.host}:{hop.port} ({trouble}); is a firewall in the way, or the "
                          "address wrong?", True)

    def _jump(self, through: Any, hop: Hop) -> Any:
        server = "%s:%d" % through.getpeername()[:2]
        try:
            return open_channel(through, server, hop.host, hop.port, self._left())
        except ConnectError as e:
            raise TunnelError(f"no way to the ssh server {hop.name}: {e}", getattr(e, "passing", True)) from None

    # --- whether it is the server that we know

    def _known_files(self, hop: Hop) -> list[str]:
        own = hop.options.get("userknownhostsfile", "").split() + hop.options.get("globalknownhostsfile", "").split()
        return [os.path.expanduser(path) for path in own or KNOWN_HOSTS]

    def _known_keys(self, hop: Hop) -> Iterator[Tuple[str, str, bytes]]:
        """(marker or "", kind, key) of every line about the server."""
        for path in self._known_files(hop):
            try:
                text = Path(path).read_text(encoding="utf-8", errors="replace")
            except (FileNotFoundError, PermissionError):
                continue
            for line in text.splitlines():
                words = line.split()
                marker = words.pop(0) if line.startswith("@") else ""
                if len(words) >= 3 and not line.startswith("#") and self._is_about(words[0], hop.key_name):
                    with contextlib.suppress(binascii.Error):
                        yield marker, words[1], binascii.a2b_base64(words[2])

    def _is_about(self, names: str, name: str) -> bool:
        found = False
        for pattern in names.split(","):
            if pattern.startswith("|1|"):
                found = found or bool(self._paramiko.HostKeys.hash_host(name, pattern) == pattern)
            elif fnmatch.fnmatchcase(name.lower(), pattern.lstrip("!").lower().replace("[", "[[]")):
                if pattern.startswith("!"):
                    return False
                found = True
        return found

    def _check_host_key(self, hop: Hop, key: Any, known: list[Tuple[str, str, bytes]]) -> None:
        kind, mine = key.get_name(), key.asbytes()
        what = f"{kind.replace('ssh-', '').split('-')[0].upper()} key {fingerprint(mine)}"
        files = self._known_files(hop)
        if ("@revoked", kind, mine) in known:
            raise TunnelError(f"the {what} of the ssh server {hop.host}:{hop.port} is marked @revoked in known_hosts; ask its administrator "
                              "for the new one")
        if ("", kind, mine) in known:
            return
        was = ", ".join(sorted({fingerprint(one) for marker, _, one in known if not marker}))
        if was:
            raise TunnelError(f"THE HOST KEY OF {hop.host}:{hop.port} HAS CHANGED: it shows the {what}, and known_hosts has {was}. "
                              "Someone may be listening in, or the server was set up anew; ask its administrator, and only if that "
                              f"is so remove the old key with: ssh-keygen -R '{hop.key_name}' -f {files[0]}")
        if hop.options.get("stricthostkeychecking", "").lower() in ("no", "off", "accept-new"):
            return
        scan = f"ssh-keyscan -t {kind.split('-')[1] if kind.startswith('ssh-') else 'ecdsa'} -p {hop.port} {hop.host}"
        jump = hop.options.get("proxyjump")
        raise TunnelError(f"the ssh server {hop.host}:{hop.port} is not known here: it shows the {what}. If that is what its "
                          "administrator, or `ssh-keygen -lf` of its host key on the server itself, says, accept it with: "
                          f"{f'ssh {jump} {scan}' if jump else scan} >> {files[0]}")

    # --- whether it lets us in

    def _log_in(self, transport: Any, hop: Hop) -> None:
        paramiko = self._paramiko
        transport.auth_timeout = self._left()
        tried: list[str] = []
        try:
            left = transport.auth_none(hop.user)
        except paramiko.BadAuthenticationType as e:
            left = e.allowed_types
        except (paramiko.SSHException, EOFError) as e:
            raise TunnelError(f"{hop} broke off the login ({e})", True) from None
        if not left:
            return
        allowed = offered = set(left)
        for method, label, attempt in self._attempts(transport, hop, tried, lambda: allowed):
            try:
                left = attempt()
            except (paramiko.SSHException, EOFError) as e:
                tried.append(label)
                if not transport.is_active():
                    raise TunnelError(f"{hop} ended the login after {', '.join(tried)} ({e}); it may have been too many tries: name the "
                                      "right key with --sshkey (sshkey=), or IdentityFile and IdentitiesOnly in ~/.ssh/config") from None
                continue
            if not left:
                return
            allowed = set(left) - {method} or set(left)
        raise TunnelError(f"{hop} did not let us in: it takes {', '.join(sorted(offered))}, and we tried {', '.join(tried) or 'nothing'}; "
                          "name a key that it knows with --sshkey (sshkey=), or add one with ssh-add; a password or passphrase is asked "
                          "for on a terminal only")

    def _attempts(self, transport: Any, hop: Hop, tried: list[str],
                  allowed: Callable[[], set[str]]) -> Iterator[Tuple[str, str, Callable[[], Any]]]:
        """(method, what it is called, function that does it) of every way in."""
        def by_key(key: Any) -> Callable[[], Any]:
            return lambda: transport.auth_publickey(hop.user, key)

        if "publickey" in allowed():
            for label, key in self._keys(hop, tried):
                if "publickey" not in allowed():
                    break
                yield "publickey", label, by_key(key)
        if "password" in allowed():
            for label, password in self._passwords(f"Password of {hop}: ", "password"):
                yield "password", label, lambda password=password: transport.auth_password(  # type: ignore[misc]
                    hop.user, password, fallback=False)
        if "keyboard-interactive" in allowed():
            yield "keyboard-interactive", "keyboard-interactive", lambda: transport.auth_interactive(
                hop.user, lambda title, instructions, fields: self._answers(hop, fields))

    def _passwords(self, prompt: str, what: str) -> Iterator[Tuple[str, str]]:
        if self._password is not None:
            yield f"the given {what}", self._password
        for _ in range(ASK_TIMES):
            answer = self._ask(prompt)
            if answer is None:
                return
            yield what, answer

    def _answers(self, hop: Hop, fields: list[Tuple[str, bool]]) -> list[str]:
        answers = []
        for prompt, echo in fields:
            known = self._password if not echo and "password" in prompt.lower() else None
            answer = known if known is not None else self._ask(f"{hop}: {prompt}")
            if answer is None:
                raise self._paramiko.SSHException("it asks what only a person can answer, and there is no terminal")
            answers.append(answer)
        return answers

    def _keys(self, hop: Hop, tried: list[str]) -> Iterator[Tuple[str, Any]]:
        """Private keys: the one that was named, those of the agent, those in files; the locked ones last."""
        paramiko = self._paramiko
        named = [os.path.expanduser(self._key)] if self._key else []
        if named and not os.path.exists(named[0]):
            raise TunnelError(f"there is no key file {self._key}; correct --sshkey (sshkey=)")
        listed = hop.options.get("identityfile", [])
        files = named + [os.path.expanduser(path) for path in listed or DEFAULT_KEYS]
        only = hop.options.get("identitiesonly", "no").lower() == "yes"
        wanted = {words[1] for path in files for words in [_public(path)] if len(words) > 1}
        agent = self._agent_keys(hop.options.get("identityagent", ""))
        locked = []
        for path in dict.fromkeys(named):
            yield from self._from_file(path, tried, locked)
        for key in agent:
            if not only or key.get_base64() in wanted:
                yield f"the agent's {key.get_name()} key {fingerprint(key.asbytes())}", key
        for path in dict.fromkeys(files):
            if path not in named and os.path.exists(path):
                yield from self._from_file(path, tried, locked)
        held = {key.get_base64() for key in agent}
        for path in locked:
            if not held & set(_public(path)):
                for _, phrase in self._passwords(f"Passphrase of the key {path}: ", "passphrase"):
                    with contextlib.suppress(paramiko.SSHException, ValueError):
                        yield f"{path}", self._load(path, phrase)
                        break
                else:
                    tried.append(f"{path} (it is locked, and its passphrase was not given)")

    def _from_file(self, path: str, tried: list[str], locked: list[str]) -> Iterator[Tuple[str, Any]]:
        try:
            yield path, self._load(path, None)
        except self._paramiko.PasswordRequiredException:
            locked.append(path)
        except (self._paramiko.SSHException, ValueError, OSError) as e:
            tried.append(f"{path} (it can't be used: {e})")

    def _load(self, path: str, passphrase: Optional[str]) -> Any:
        trouble: Any = None
        for kind in (self._paramiko.Ed25519Key, self._paramiko.ECDSAKey, self._paramiko.RSAKey):
            try:
                key = kind.from_private_key_file(path, passphrase)
            except self._paramiko.PasswordRequiredException:
                raise
            except (self._paramiko.SSHException, ValueError, TypeError, IndexError) as e:
                trouble = e
                continue
            if os.path.exists(path + "-cert.pub"):
                key.load_certificate(path + "-cert.pub")
            return key
        raise self._paramiko.SSHException(f"no ed25519, ecdsa or rsa key that we can read ({trouble})")

    def _agent_keys(self, chosen: str) -> list[Any]:
        if chosen.lower() == "none":
            return []
        if chosen and chosen != "SSH_AUTH_SOCK":
            os.environ["SSH_AUTH_SOCK"] = os.path.expanduser(chosen)
        try:
            return list(self._paramiko.Agent().get_keys())
        except (self._paramiko.SSHException, OSError):  # a socket that an ended agent left
            return []


def _keep_alive(sock: socket.socket) -> None:
    sock.settimeout(None)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", KEEPALIVE_S), ("TCP_KEEPINTVL", KEEPALIVE_S), ("TCP_KEEPCNT", GONE_S // KEEPALIVE_S),
                        ("TCP_USER_TIMEOUT", GONE_S * 1000)):
        if hasattr(socket, name):
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _signatures(kind: str) -> Tuple[str, ...]:
    """The ways in which a server with a key of this kind may sign."""
    return ("rsa-sha2-512", "rsa-sha2-256", "ssh-rsa") if kind == "ssh-rsa" else (kind,)


def _public(path: str) -> list[str]:
    """The words of a key's public half, if it lies beside it."""
    try:
        return Path(path + ".pub").read_text(encoding="utf-8", errors="replace").split()
    except OSError:
        return []


def fingerprint(key: bytes) -> str:
    """As `ssh-keygen -l` prints it."""
    return "SHA256:" + binascii.b2a_base64(hashlib.sha256(key).digest(), newline=False).decode().rstrip("=")


# ---------------------------------------------------------------- the tunnel process: forwarding


class LastWords(logging.Handler):
    """Keeps what paramiko logs last of a refusal: the server's own words, which its exceptions lack."""

    text = ""

    def emit(self, record: logging.LogRecord) -> None:
        """Keep it if it is one."""
        _, refused, reason = record.getMessage().partition("open FAILED: ")
        if refused:
            self.text = reason


last_words = LastWords()


def open_channel(transport: Any, server: str, host: str, port: int, timeout_s: float) -> Any:
    """A connection from the ssh server to host:port.

    Raises:
        TunnelError: the ssh server forwards nothing, or is gone.
        ConnectError: it is not let in there.
    """
    import paramiko

    last_words.text = ""
    try:
        return transport.open_channel("direct-tcpip", (host, port), ("127.0.0.1", 0), timeout=timeout_s)
    except paramiko.ChannelException as e:
        if e.code == PROHIBITED:
            raise TunnelError(f"the ssh server {server} refuses to forward to {host}:{port} (AllowTcpForwarding or PermitOpen in its "
                              "sshd_config); ask its administrator, or name another server with --ssh (sshserver=)") from None
        reason = last_words.text.rpartition(":")[0] or e.text
        raise ConnectError(f"the ssh server {server} can't reach {host}:{port} ({reason})") from None
    except (paramiko.SSHException, EOFError, OSError) as e:
        raise TunnelError(f"the ssh server {server} did not connect us to {host}:{port} in time, or is gone ({e})", True) from None


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
            fix = (f"; a controller that listens on its own host only is reached by ssh to that host ({home}), or start it with "
                   "--ip=* (or --ip=ADDRESS)" if host in LOOPBACK else
                   "; is the controller gone? If not, correct 'location' in the connection file, or start it with --ip=* and the "
                   "--location=ADDRESS that the ssh server knows it by")
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
            return {"error": f"ssh tunnels need paramiko, which this Python lacks ({e}); install it with `pip install paramiko`, or make "
                             f"a tunnel by hand: ssh -L {port}:{host}:{port} SERVER, and write tcp://127.0.0.1:{port} as 'url' and no "
                             "'ssh' into the connection file", "passing": False}
        except TunnelError as e:
            return {"error": str(e), "passing": e.passing}
        except ConnectError as e:
            return {"error": str(e), "far": True}

    def _watch_ssh(self) -> None:
        """The end of the ssh connection is ours."""
        self._transport.join()
        trouble = self._transport.get_exception()
        self._say({"lost": "the server closed the connection" if trouble is None or isinstance(trouble, EOFError) else str(trouble)})
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
