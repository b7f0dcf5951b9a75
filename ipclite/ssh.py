"""ssh connections by paramiko, as the user's configuration, keys and known hosts want them.

    "user@host:port" ── ~/.ssh/config ──► Hop ── Login.connect ──► paramiko.Transport ── open_channel ──► host:port

Rules that hold here: paramiko is imported when a connection is made, not before; a server whose key is not known is
refused, with its fingerprint and the way to accept it; every error names the step, the server and the fix. What only a
person can answer is asked through the caller, and every way in that was tried is told.
"""

from __future__ import annotations

import binascii
import contextlib
import fnmatch
import getpass
import glob
import hashlib
import logging
import os
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any, Callable, Iterator, NamedTuple, Optional, Tuple

from .errors import ConnectError, TunnelError

ASK_TIMES = 3  # how often a password or passphrase may be mistyped
WINDOW = 2 << 20  # bytes on their way; with more, paramiko gets slower, not faster
KEEPALIVE_S, GONE_S = 5, 15  # signs of life, and how long to do without
INCLUDES_MAX = 16  # depth
JUMPS_MAX = 8
PROHIBITED = 1  # https://www.rfc-editor.org/rfc/rfc4254#section-5.1
DEFAULT_KEYS = ("~/.ssh/id_ed25519", "~/.ssh/id_ecdsa", "~/.ssh/id_rsa")
KNOWN_HOSTS = ("~/.ssh/known_hosts", "~/.ssh/known_hosts2", "/etc/ssh/ssh_known_hosts")


# ---------------------------------------------------------------- names and configuration


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
        raise TunnelError(f"{server!r} is not the name of an ssh server; give it as user@host:port, or as in "
                          "~/.ssh/config")
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


def on_terminal() -> bool:
    """Whether somebody can be asked: stdin is a terminal, and we are not in its background."""
    if sys.stdin is None or sys.stdin.closed or not sys.stdin.isatty():
        return False
    return not hasattr(os, "tcgetpgrp") or os.tcgetpgrp(sys.stdin.fileno()) == os.getpgrp()


def find_hop(server: str, config: Any, over: Optional[dict[str, Any]] = None) -> Hop:
    """What the user's configuration says about a server; what `over` says counts more."""
    user, name, port = parse_server(server)
    options = {**config.lookup(name), **(over or {})}
    return Hop(name, options["hostname"], port or int(options.get("port", 22)),
               user or options.get("user") or getpass.getuser(), options)


# ---------------------------------------------------------------- connecting


class Login:
    """Makes the ssh connection, through other servers if need be.

    Args:
        key: path of the private key to try first, or "".
        password: for the account and for the key, or None.
        ask: puts a question to the user; returns None if nobody can answer.
        timeout_s: for everything but the questions.
        over: options of the server, over those of its configuration; names in lower case, as in {"port": "2222"}.
    """

    def __init__(self, key: str, password: Optional[str], ask: Callable[[str], Optional[str]], timeout_s: float,
                 over: Optional[dict[str, Any]] = None):
        import paramiko

        self._paramiko: Any = paramiko
        self._key, self._password = key, password
        self._put, self._over = ask, over
        self._deadline = time.monotonic() + timeout_s
        try:
            text = config_text("~/.ssh/config") + config_text("/etc/ssh/ssh_config")
            self._config = paramiko.SSHConfig.from_text(text)
        except (paramiko.ConfigParseError, paramiko.SSHException) as e:
            raise TunnelError(f"~/.ssh/config can't be read: {e}") from None

    def connect(self, server: str, through: Any = None, jumps: int = 0) -> Any:
        """A paramiko Transport that is logged in, made by way of another one if that is given.

        Raises:
            TunnelError: names the step, the server and the fix.
        """
        hop = find_hop(server, self._config, None if jumps else self._over)
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
                raise TunnelError(f"{hop.host}:{hop.port} did not complete the ssh handshake "
                                  f"({e or 'it closed the connection'}); is an ssh server listening there, or does it "
                                  "have too many connections?", True) from None
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
            raise TunnelError(f"the ssh server {hop.host!r} can't be looked up ({e.strerror or e}); is the name right, "
                              "or does it lack a HostName in ~/.ssh/config?", True) from None
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
            raise TunnelError(f"{hop.host}:{hop.port} refused the connection: no ssh server listens there; is the port "
                              "right (user@host:port), and sshd running?", True)
        raise TunnelError(f"no connection to the ssh server {hop.host}:{hop.port} ({trouble}); is a firewall in the "
                          "way, or the address wrong?", True)

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
            raise TunnelError(f"the {what} of the ssh server {hop.host}:{hop.port} is marked @revoked in known_hosts; "
                              "ask its administrator for the new one")
        if ("", kind, mine) in known:
            return
        was = ", ".join(sorted({fingerprint(one) for marker, _, one in known if not marker}))
        if was:
            raise TunnelError(f"THE HOST KEY OF {hop.host}:{hop.port} HAS CHANGED: it shows the {what}, and "
                              f"known_hosts has {was}. Someone may be listening in, or the server was set up anew; ask "
                              "its administrator, and only if that is so remove the old key with: ssh-keygen -R "
                              f"'{hop.key_name}' -f {files[0]}")
        if hop.options.get("stricthostkeychecking", "").lower() in ("no", "off", "accept-new"):
            return
        scan = f"ssh-keyscan -t {kind.split('-')[1] if kind.startswith('ssh-') else 'ecdsa'} -p {hop.port} {hop.host}"
        jump = hop.options.get("proxyjump")
        raise TunnelError(f"the ssh server {hop.host}:{hop.port} is not known here: it shows the {what}. If that is "
                          "what its administrator, or `ssh-keygen -lf` of its host key on the server itself, says, "
                          f"accept it with: {f'ssh {jump} {scan}' if jump else scan} >> {files[0]}")

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
        offered, allowed = sorted(left), set(left)
        for method, label, attempt in self._attempts(transport, hop, tried, allowed):
            try:
                left = attempt()
            except (paramiko.SSHException, EOFError) as e:
                tried.append(label)
                if not transport.is_active():
                    raise TunnelError(f"{hop} ended the login after {', '.join(tried)} ({e}); it may have been too "
                                      "many tries: name the right key with --sshkey (sshkey=), or IdentityFile and "
                                      "IdentitiesOnly in ~/.ssh/config") from None
                continue
            if not left:
                return
            allowed.clear()  # it wants one more
            allowed.update(set(left) - {method} or left)
        raise TunnelError(f"{hop} did not let us in: it takes {', '.join(offered)}, and we tried "
                          f"{', '.join(tried) or 'nothing'}; name a key that it knows with --sshkey (sshkey=), or add "
                          "one with ssh-add; a password or passphrase is asked for on a terminal only")

    def _attempts(self, transport: Any, hop: Hop, tried: list[str],
                  allowed: set[str]) -> Iterator[Tuple[str, str, Callable[[], Any]]]:
        """(method, what it is called, function that does it) of every way in that is `allowed` when its turn comes."""
        def by_key(key: Any) -> Callable[[], Any]:
            return lambda: transport.auth_publickey(hop.user, key)

        if "publickey" in allowed:
            for label, key in self._keys(hop, tried):
                if "publickey" not in allowed:
                    break
                yield "publickey", label, by_key(key)
        if "password" in allowed:
            for label, password in self._passwords(f"Password of {hop}: ", "password"):
                yield "password", label, lambda password=password: transport.auth_password(  # type: ignore[misc]
                    hop.user, password, fallback=False)
        if "keyboard-interactive" in allowed:
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
    for name, value in (("TCP_KEEPIDLE", KEEPALIVE_S), ("TCP_KEEPINTVL", KEEPALIVE_S),
                        ("TCP_KEEPCNT", GONE_S // KEEPALIVE_S), ("TCP_USER_TIMEOUT", GONE_S * 1000)):
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


# ---------------------------------------------------------------- connections from the server on


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
    """A connection from the ssh server to host:port, or with port 0 to the socket file `host`.

    Raises:
        TunnelError: the ssh server forwards nothing, or is gone.
        ConnectError: it is not let in there.
    """
    import paramiko

    last_words.text = ""
    where = f"{host}:{port}" if port else host
    try:
        if not port:
            return _open_socket_channel(transport, host, timeout_s)
        return transport.open_channel("direct-tcpip", (host, port), ("127.0.0.1", 0), timeout=timeout_s)
    except paramiko.ChannelException as e:
        if e.code == PROHIBITED:
            raise TunnelError(f"the ssh server {server} refuses to forward to {where} (AllowTcpForwarding or "
                              "PermitOpen in its sshd_config); ask its administrator, or name another server with "
                              "--ssh (sshserver=)") from None
        reason = last_words.text.rpartition(":")[0] or e.text
        reason += "" if port else ": it is not there, or AllowStreamLocalForwarding is off in its sshd_config"
        raise ConnectError(f"the ssh server {server} can't reach {where} ({reason})") from None
    except (paramiko.SSHException, EOFError, OSError) as e:
        raise TunnelError(f"the ssh server {server} did not connect us to {where} in time, or "
                          f"is gone ({e})", True) from None


def _open_socket_channel(transport: Any, path: str, timeout_s: float) -> Any:
    """`transport.open_channel` to a socket file, which it lacks: "direct-streamlocal@openssh.com" of
    https://github.com/openssh/openssh-portable/blob/master/PROTOCOL, made of the same parts."""
    from paramiko import Channel, ChannelException, Message
    from paramiko.common import DEFAULT_MAX_PACKET_SIZE, cMSG_CHANNEL_OPEN

    opened = threading.Event()
    with transport.lock:
        number = transport._next_channel()
        channel = Channel(number)
        transport._channels.put(number, channel)
        transport.channel_events[number] = opened
        transport.channels_seen[number] = True
        channel._set_transport(transport)
        channel._set_window(WINDOW, DEFAULT_MAX_PACKET_SIZE)
    message = Message()
    message.add_byte(cMSG_CHANNEL_OPEN)
    message.add_string("direct-streamlocal@openssh.com")
    for size in (number, WINDOW, DEFAULT_MAX_PACKET_SIZE):
        message.add_int(size)
    message.add_string(path)
    message.add_string("")
    message.add_int(0)
    transport._send_user_message(message)
    deadline = time.monotonic() + timeout_s
    while not opened.wait(0.1):
        if not transport.is_active() or time.monotonic() > deadline:
            raise EOFError("it did not answer")
    if transport._channels.get(number) is None:
        raise transport.get_exception() or ChannelException(2, "refused")
    return channel
