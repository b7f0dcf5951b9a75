"""Sockets, keys, addresses: the only file that imports zmq.

    Link      one outgoing connection (client, engine, agent): DEALER plus the monitor that sees it break
    Ports     the controller's listening sockets: for each role an ipc one, a TCP one, or both
    gatekeep  answers libzmq's question "may this key come in?" (ZAP, https://rfc.zeromq.org/spec/27/)

Rules that hold here: TCP is always CURVE (https://rfc.zeromq.org/spec/25/), with one key pair per role, so that a port
admits its role alone; ipc sockets lie in a directory that only the user can enter. A connection that breaks
is never mended behind our back (a silent reconnect can lose messages): it is reported, and whoever owns it dials again.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import select
import socket as stdsocket
import sys
import time
from typing import Any, Iterable, NamedTuple, Optional, Sequence

import zmq
from zmq.backend import Socket as RawSocket
from zmq.utils import z85
from zmq.utils.monitor import parse_monitor_message

from . import wire
from .config import dead_run, log
from .errors import ConfigError, ConnectError, LauncherError, ProtocolError

POLLIN = int(zmq.POLLIN)  # plain ints: pyzmq's enums cost microseconds at every use
Context = zmq.Context
Again = zmq.Again
NetError = zmq.ZMQError

LARGE = 64 * 1024  # from here on frames are handed over rather than copied
SIOCGIFADDR = 0x8915
PROBE_S = 1.5  # to see whether the controller can be reached by one of its addresses
HANDSHAKE_S = 5.0  # a peer that is there answers well within this
# Answered by libzmq's own thread, whatever Python is doing; but not while one large message is under way on a slow link.
HEARTBEAT_MS, HEARTBEAT_TIMEOUT_MS = 3000, 30000

_MORE, _NOBLOCK, _EVENTS = int(zmq.SNDMORE), int(zmq.NOBLOCK), int(zmq.EVENTS)
_send, _recv, _get = RawSocket.send, RawSocket.recv, RawSocket.get  # the loops over frames are ours: one pass, the large ones uncopied
_MONITORED = (zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL | zmq.EVENT_HANDSHAKE_FAILED_AUTH
              | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_DISCONNECTED | zmq.EVENT_CLOSED
              | zmq.EVENT_CONNECTED)


ANY = ("*", "0.0.0.0", "::")  # all addresses of this host
WELCOME_FIELDS = {"run_id": str, "cluster_id": str, "silence_s": (int, float), "max_task_bytes": int}


class KeyPair(NamedTuple):
    """A CURVE key pair in Z85 text."""

    public: str
    secret: str


def has_curve() -> bool:
    """Whether this libzmq can encrypt."""
    return bool(zmq.has("curve"))


def make_keys() -> KeyPair:
    """A new key pair. Without CURVE it only serves as a pair of unguessable words."""
    if not has_curve():
        return KeyPair(os.urandom(20).hex(), os.urandom(20).hex())
    public, secret = zmq.curve_keypair()
    return KeyPair(public.decode(), secret.decode())


def is_key(text: Any) -> bool:
    """Whether this can be one of the two of a pair."""
    return isinstance(text, str) and re.fullmatch(r"[0-9A-Za-z.:+=^!/*?&<>()\[\]{}@%$#-]{40}", text) is not None


def token(secret_key: str) -> str:
    """What a peer shows in its HELLO to prove that it holds the secret key of its role. On ipc it is the only proof; the
    digest keeps the key itself out of messages."""
    return hashlib.blake2b(secret_key.encode(), digest_size=16, person=b"ipclite-hello").hexdigest()


def send(sock: Any, frames: Sequence[Any]) -> None:
    """Send one message; large frames are not copied, so their owner must leave them alone until they are gone. On a link
    that is broken the message is dropped, as one that was sent a moment earlier would be."""
    last = len(frames) - 1
    try:
        for i, frame in enumerate(frames):
            size = len(frame) if type(frame) is bytes else memoryview(frame).nbytes
            _send(sock, frame, _MORE if i < last else 0, size < LARGE)
    except Again:
        pass


def recv(sock: Any) -> list[Any]:
    """Receive one message without waiting; frames are bytes, the large ones writable memoryviews of the received memory.

    Raises:
        Again: there is none.
    """
    frames: list[Any] = []
    while True:
        frame = _recv(sock, _NOBLOCK, False)
        buffer = frame.buffer
        frames.append(frame.bytes if buffer.nbytes < LARGE else buffer)
        if not frame.more:
            return frames


def readable(sock: Any) -> bool:
    """Whether a message waits. Also rearms the socket's edge-triggered file descriptor."""
    return bool(_get(sock, _EVENTS) & POLLIN)


class Watch:
    """Waits for messages on sockets and for bytes on descriptors, in one system call where zmq.Poller takes one or two per socket.

    libzmq's descriptors tell of a change once, and any use of a socket may swallow that. So a socket that has been used
    since the last wait (`used`) is asked itself first, and a socket that is reported must be read until it is empty or
    put into `used` again.

    Args:
        sources: zmq sockets and file descriptors.
    """

    def __init__(self, sources: Iterable[Any]):
        self.used: set[Any] = set()
        self._poll = select.poll()
        self._source_of: dict[int, Any] = {}
        for source in sources:
            fd = source if isinstance(source, int) else source.get(zmq.FD)
            self._source_of[fd] = source
            self._poll.register(fd, select.POLLIN)
            if fd is not source:
                self.used.add(source)

    def wait(self, timeout_s: Optional[float]) -> list[Any]:
        """What can be read now, after at most `timeout_s` (None: any time)."""
        ready = [sock for sock in self.used if readable(sock)]
        self.used.clear()
        for fd, _ in self._poll.poll(0 if ready else None if timeout_s is None else max(0.0, timeout_s) * 1000):
            source = self._source_of[fd]
            if source not in ready and (source is fd or readable(source)):
                ready.append(source)
        return ready


def _prepare(sock: Any) -> None:
    sock.set_hwm(0)
    sock.linger = 0
    sock.ipv6 = True
    sock.setsockopt(zmq.TCP_KEEPALIVE, 1)
    sock.setsockopt(zmq.TCP_KEEPALIVE_IDLE, 60)
    sock.setsockopt(zmq.TCP_KEEPALIVE_INTVL, 15)
    sock.setsockopt(zmq.HEARTBEAT_IVL, HEARTBEAT_MS)
    sock.setsockopt(zmq.HEARTBEAT_TIMEOUT, HEARTBEAT_TIMEOUT_MS)
    sock.setsockopt(zmq.HEARTBEAT_TTL, HEARTBEAT_TIMEOUT_MS)
    sock.setsockopt(zmq.HANDSHAKE_IVL, 30000)


class Link:
    """One outgoing connection to the controller.

    Args:
        context: the process's zmq context.
        info: the connection file's content.
        tunnel: leads there if that says `ssh`; has `reach` and `trouble` like `tunnel.Tunnel`.
    """

    def __init__(self, context: Any, info: dict[str, Any], tunnel: Any = None):
        self.info = info
        self.local = is_local(info)
        self.tunnel = tunnel if needs_tunnel(info) else None
        far = self.tunnel is not None and not info["url"]  # a socket file on the ssh server
        self.address = f"ipc://{far_socket(info)}" if far else f"ipc://{info['ipc']}" if self.local else "tcp://%s:%d" % endpoint(info)
        self._door = self.address  # what is dialled
        self._context = context
        self.sock = context.socket(zmq.DEALER)
        _prepare(self.sock)
        self.sock.setsockopt(zmq.RECONNECT_IVL, -1)
        self.sock.setsockopt(zmq.SNDTIMEO, 0)  # once the connection is broken, sending would block for ever
        if not self.local and not far and info["server_key"]:
            self.sock.curve_serverkey = info["server_key"].encode()
            self.sock.curve_publickey = info["public_key"].encode()
            self.sock.curve_secretkey = info["secret_key"].encode()
        self.monitor = self.sock.get_monitor_socket(_MONITORED)
        self.lost: Optional[str] = None  # why, once the connection is broken

    def find(self, timeout_s: float) -> None:
        """Find the way: look up the host's name, or make the ssh tunnel.

        Raises:
            ConnectError: naming the step that failed and the address.
        """
        if self.tunnel is not None:
            self.address += f" through ssh to {self.info['ssh']}"
            self._door = tunnel_to(self.info, self.tunnel, timeout_s)
        elif needs_tunnel(self.info):
            raise ConnectError(f"the controller on {self.info['host']} is reached through ssh to {self.info['ssh']} only")
        elif not self.local:
            self._choose_address(timeout_s)

    def _choose_address(self, timeout_s: float) -> None:
        """The controller gives its host's name, and its addresses in case the name leads nowhere from here: compute nodes
        may not know the login node's name, or know it by an address that they can't reach."""
        host, port = endpoint(self.info)
        others = [_bracket(other) for other in self.info.get("addresses", ())]
        if self.info.get("location") == self.info["host"]:  # nobody knew better
            deadline = time.monotonic() + timeout_s / 2
            for candidate in [host, *others] if others else ():
                if time.monotonic() < deadline and _answers(candidate, port, PROBE_S):
                    self.address = self._door = f"tcp://{candidate}:{port}"
                    break
        _resolve(self.address)

    def dial(self, timeout_s: float = HANDSHAKE_S) -> None:
        """Connect and wait for the handshake.

        Raises:
            ConnectError: naming the step that failed and the address.
        """
        try:
            self._dial(timeout_s)
        except ConnectError as e:
            if self.tunnel is None and not self.local and is_loopback(endpoint(self.info)[0]) \
                    and self.info["host"] != stdsocket.gethostname():
                raise ConnectError(f"the controller on {self.info['host']} listens on that host only ({self.address}) and can't be reached "
                                   "from here; restart it with --ip=* (or --ip=ADDRESS), or go through ssh to that host with "
                                   f"--ssh={self.info['host']} (sshserver=)") from None
            trouble = self.tunnel.trouble() if self.tunnel is not None else ""
            raise ConnectError(f"{e}: {trouble}") if trouble else e from None

    def _dial(self, timeout_s: float) -> None:
        log("net").debug("dialling %s", self.address if self._door == self.address else f"{self.address} by {self._door}")
        self.sock.connect(self._door)
        deadline = time.monotonic() + timeout_s
        connected = False
        while True:
            wait_s = deadline - time.monotonic()
            if wait_s <= 0 or not self.monitor.poll(int(wait_s * 1000) + 1):
                raise ConnectError(
                    f"connected to {self.address} but no controller answered there in {timeout_s:g} s" if connected else
                    f"no answer from {self.address} in {timeout_s:g} s; is a firewall in the way, or the address wrong?")
            event = parse_monitor_message(self.monitor.recv_multipart())
            kind = event["event"]
            if kind == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                return
            if kind == zmq.EVENT_CONNECTED:
                connected = True
            elif kind == zmq.EVENT_HANDSHAKE_FAILED_AUTH:
                raise ConnectError(f"the controller at {self.address} refused our key: the connection file is of another "
                                   "cluster or of another role; copy the right one")
            elif connected:
                raise ConnectError(f"{self.address} broke off the handshake: the connection file's key is not this "
                                   "controller's, or something else listens there; copy the file again")
            else:
                raise ConnectError(f"{self.address} {self._refusal()}: the controller is gone, or has another address now; start it, "
                                   "or copy the connection file again")

    def _refusal(self) -> str:
        """Why nothing answers where we dialled; libzmq does not tell."""
        host, port = self._door.rpartition("//")[2].rpartition(":")[::2]
        try:
            if port.isdecimal():
                stdsocket.create_connection((host.strip("[]"), int(port)), PROBE_S).close()
        except ConnectionRefusedError:
            pass
        except stdsocket.timeout:
            return "does not answer (is a firewall in the way, or the host down?)"
        except OSError as e:
            return f"can't be reached ({e.strerror or e})"
        return "refused the connection"

    def check(self) -> Optional[str]:
        """Why the connection is lost, or None. To be called when `monitor` is readable."""
        while self.lost is None and readable(self.monitor):
            event = parse_monitor_message(self.monitor.recv_multipart(zmq.NOBLOCK))
            if event["event"] not in (zmq.EVENT_CONNECTED, zmq.EVENT_HANDSHAKE_SUCCEEDED):
                trouble = self.tunnel.trouble() if self.tunnel is not None else ""
                self.lost = f"the connection to the controller at {self.address} broke{trouble and ': ' + trouble}"
        return self.lost

    def close(self, linger_ms: int = 0) -> None:
        """Close the sockets; messages still to be sent get `linger_ms` to leave. Does nothing if they are closed."""
        if self.sock.closed:
            return
        self.lost = self.lost or "it was closed"
        self.sock.disable_monitor()
        self.monitor.close(0)
        self.sock.close(linger_ms)


def is_local(info: dict[str, Any]) -> bool:
    """Whether the controller can be reached by its ipc socket: the run's own random name makes a chance hit
    on another host's path impossible."""
    return bool(info["ipc"]) and os.path.exists(info["ipc"])


def needs_tunnel(info: dict[str, Any]) -> bool:
    """Whether the controller is to be reached through ssh."""
    return bool(info.get("ssh")) and not is_local(info)


def through_ssh(info: dict[str, Any], server: str) -> dict[str, Any]:
    """A connection file's content as it is for somebody who is to go through the ssh server `server`, even on this host."""
    return {**info, "ssh": server, "ipc": "", "far_ipc": info["ipc"]}


def far_socket(info: dict[str, Any]) -> str:
    """The path of the controller's socket on its host."""
    return str(info.get("far_ipc") or info["ipc"])


def endpoint(info: dict[str, Any]) -> tuple[str, int]:
    """Where the controller listens: (host, with brackets if need be, port). A `location` that somebody wrote into the file
    counts, but nothing leads to a loopback address from elsewhere.

    Raises:
        ConnectError: it listens on no port, or `url` is no address.
    """
    if not info["url"]:
        raise ConnectError(f"the controller on {info['host']} listens on that host only; restart it with --ip=* (or --ip=ADDRESS) "
                           f"to reach it from here, or go through ssh to that host with --ssh={info['host']} (sshserver=)")
    host, _, port = info["url"].rpartition("//")[2].rpartition(":")
    if not host or not (port.isdecimal() and 0 < int(port) < 65536):
        raise ConnectError(f"'url' in the connection file has the form tcp://host:port, unlike {info['url']!r}; copy the file again")
    return (host if is_loopback(host) else _bracket(info.get("location", "").strip("[]")) or host), int(port)


def tunnel_to(info: dict[str, Any], tunnel: Any, timeout_s: float = 2 * HANDSHAKE_S) -> str:
    """See to it that `tunnel` leads to the controller; returns the address of its near end. Raises what its `reach` does."""
    host, port = endpoint(info) if info["url"] else (far_socket(info), 0)
    return str(tunnel.reach(info["ssh"], host.strip("[]"), port, info["host"], timeout_s))


def _resolve(address: str) -> None:
    host = address.split("//", 1)[1].rpartition(":")[0].strip("[]")
    try:
        stdsocket.getaddrinfo(host, None)
    except OSError as e:
        raise ConnectError(f"the controller's host name {host!r} can not be looked up ({e.strerror or e}); edit 'location' in "
                           "the connection file or start the controller with --location=ADDRESS") from None


def greet(context: Any, info: dict[str, Any], hello: dict[str, Any], timeout_s: float = 2 * HANDSHAKE_S,
          tunnel: Any = None) -> tuple[Link, dict[str, Any]]:
    """Dial, introduce ourselves, return the link and the controller's WELCOME.

    Raises:
        ConnectError: naming the step that failed: no such host, refused, wrong key, no answer, not welcome.
        TunnelError: there is no ssh tunnel, and one is needed.
    """
    link = Link(context, info, tunnel)
    try:
        link.find(timeout_s)
        deadline = time.monotonic() + timeout_s
        link.dial(timeout_s)
        send(link.sock, wire.encode_json(wire.HELLO, {**hello, "token": token(info["secret_key"])}))
        watch = Watch([link.sock, link.monitor])
        while True:
            wait_s = deadline - time.monotonic()
            if wait_s <= 0:
                raise ConnectError(f"the controller at {link.address} took the connection but said nothing in {timeout_s:g} s")
            ready = watch.wait(wait_s)
            if link.sock in ready:
                welcome = _welcome(link, recv(link.sock))
                log("net").debug("welcome at %s, run %s, controller %s", link.address, welcome["run_id"], welcome.get("version"))
                return link, welcome
            if link.monitor in ready and link.check():
                raise ConnectError(f"{link.lost} before it answered")
    except BaseException:
        link.close()
        raise


def _welcome(link: Link, frames: list[Any]) -> dict[str, Any]:
    try:
        body = wire.decode_dict(frames)
    except ProtocolError as e:
        raise ConnectError(f"{link.address} does not speak this protocol: {e}") from None
    if frames[0] == wire.REFUSED:
        raise ConnectError(f"the controller at {link.address} refused us: {body.get('reason', 'no reason given')}")
    if frames[0] != wire.WELCOME:
        raise ConnectError(f"{link.address} answered with an unexpected message; is that our controller?")
    wrong = [field for field, kind in WELCOME_FIELDS.items() if not isinstance(body.get(field), kind)]
    engines = body.get("engines", [])
    if wrong or not (isinstance(engines, list) and all(map(_is_engine, engines))):
        raise ConnectError(f"the controller at {link.address} sent a welcome that is malformed ({', '.join(wrong) or 'engines'})")
    return body


def _is_engine(body: Any) -> bool:
    return isinstance(body, dict) and type(body.get("id")) is int and isinstance(body.get("uuid"), str)


def takes_connections(info: dict[str, Any], timeout_s: float = 2.0) -> bool:
    """Whether something listens at the address in a connection file."""
    try:
        return _answers(*endpoint(info), timeout_s)
    except ConnectError:  # it has no address
        return False


def _answers(host: str, port: int, timeout_s: float) -> bool:
    try:
        stdsocket.create_connection((host.strip("[]"), port), timeout_s).close()
    except (OSError, ValueError):
        return False
    return True


def ended_run(info: dict[str, Any]) -> str:
    """As `dead_run`; but a copy of a file that stays valid (`--reuse`) may be of an earlier run of a controller that serves."""
    dead = dead_run(info)
    return "" if dead and info.get("reuse") and info["url"] and takes_connections(info, HANDSHAKE_S) else dead


def refuses(info: dict[str, Any], timeout_s: float = 2.0) -> bool:
    """Whether the controller's host says that nothing listens at the address in a connection file. Through ssh nobody knows."""
    if is_local(info) or needs_tunnel(info):
        return False
    try:
        host, port = endpoint(info)
        stdsocket.create_connection((host.strip("[]"), port), timeout_s).close()
    except ConnectionRefusedError:
        return True
    except OSError:
        pass  # it can not be reached, which may pass
    return False


def controller_gone(info: dict[str, Any]) -> bool:
    """Whether the controller of this connection file is certainly dead: it ran on this host and its process is not there."""
    return not needs_tunnel(info) and bool(dead_run(info))


def key_in_hex(public: str) -> str:
    """A public key as it may stand in an address."""
    return z85.decode(public.encode()).hex()


def key_of_hex(text: str) -> str:
    """The inverse of `key_in_hex`. Raises ValueError."""
    return z85.encode(bytes.fromhex(text)).decode()


def line_sender(context: Any, address: str, key: str, kept: int, linger_ms: int) -> Any:
    """A socket that sends messages to a logger whenever that is there; of those that can't be sent, `kept` wait.

    Args:
        key: the logger's public key, by `key_in_hex`.

    Raises:
        ConfigError: this libzmq can not encrypt, or the key or address is none.
    """
    _must_encrypt()
    sock = context.socket(zmq.PUSH)
    _prepare(sock)
    sock.set_hwm(kept)
    sock.setsockopt(zmq.SNDTIMEO, 0)
    sock.linger = linger_ms
    own = make_keys()
    try:
        sock.curve_serverkey, sock.curve_publickey, sock.curve_secretkey = (
            text.encode() for text in (key_of_hex(key), own.public, own.secret))
        sock.connect(address)
    except (ValueError, zmq.ZMQError) as e:
        raise ConfigError(f"the logger's address {address} or its key is none: {e}") from None
    return sock


def line_listener(context: Any, ip: str, port: int, keys: KeyPair, max_bytes: int) -> tuple[Any, int]:
    """A socket that takes what senders of lines send, and its port.

    Raises:
        ConfigError: this libzmq can not encrypt, or the address can't be used.
    """
    _must_encrypt()
    sock = context.socket(zmq.PULL)
    _prepare(sock)
    sock.set_hwm(1000)
    sock.setsockopt(zmq.MAXMSGSIZE, max_bytes)
    sock.curve_server = True
    sock.curve_secretkey, sock.curve_publickey = keys.secret.encode(), keys.public.encode()
    try:
        sock.bind(f"tcp://{ip}:{port}")
    except zmq.ZMQError as e:
        sock.close(0)
        raise ConfigError(f"can not listen on {ip}:{port}: {_words(e)}; give another --url") from None
    return sock, int(sock.last_endpoint.decode().rpartition(":")[2])


def _must_encrypt() -> None:
    if not has_curve():
        raise ConfigError("this libzmq has no CURVE encryption, so log lines are not sent; install pyzmq from its wheel")


class Ports:
    """The controller's listening sockets.

    Args:
        context: the process's zmq context.
        server: the controller's key pair.
        max_bytes: a peer that sends a larger frame is cut off.
    """

    def __init__(self, context: Any, server: KeyPair, max_bytes: int):
        self._context, self._server, self._max_bytes = context, server, max_bytes
        self.role_of: dict[Any, str] = {}  # socket -> "client" or "engine"
        self._local: set[Any] = set()  # those of them that only this host can reach
        self.gates: list[Any] = []  # where libzmq asks; one as soon as there is something to guard

    def _socket(self, role: str) -> Any:
        sock = self._context.socket(zmq.ROUTER)
        _prepare(sock)
        sock.setsockopt(zmq.ROUTER_MANDATORY, 1)
        sock.setsockopt(zmq.MAXMSGSIZE, self._max_bytes)
        sock.setsockopt(zmq.BACKLOG, 4096)
        self.role_of[sock] = role
        return sock

    def is_local(self, sock: Any) -> bool:
        """Whether who comes through this socket is on our host."""
        return sock in self._local

    def listen_ipc(self, role: str, path: str) -> None:
        """Listen on a socket file in a directory that is ours alone.

        Raises:
            ConfigError: it can't be made there.
        """
        sock = self._socket(role)
        self._local.add(sock)
        try:
            sock.bind(f"ipc://{path}")
        except zmq.ZMQError as e:
            raise ConfigError(f"can not listen on the socket {path}: {e.strerror}") from None

    def listen_tcp(self, role: str, ip: str, ports: Iterable[int]) -> tuple[str, int]:
        """Listen on the first of `ports` that is free (0: any), and return the address, as `ip` or in numbers, and the port.

        Args:
            ip: an address, a name or a network interface of this host, or "*".

        Raises:
            LauncherError: all are taken.
            ConfigError: this host does not have the address, or libzmq can not encrypt and the address is not loopback.
        """
        ip, is_interface = _numeric(ip)
        sock = self._socket(role)
        sock.ipv6 = not is_interface  # which has addresses of both kinds
        if has_curve():
            self._open_gate()
            sock.curve_server = True
            sock.curve_secretkey = self._server.secret.encode()
            sock.curve_publickey = self._server.public.encode()
            sock.setsockopt(zmq.ZAP_DOMAIN, role.encode())
        elif not is_loopback(ip):
            raise ConfigError(f"this libzmq has no CURVE encryption, so the controller does not listen on {ip}; install pyzmq "
                              "from its wheel, or use --ip=127.0.0.1 with ssh tunnels")
        tried = []
        for port in ports:
            try:
                sock.bind(f"tcp://{_bracket(ip)}:{port}")
                host, _, bound = sock.last_endpoint.decode()[len("tcp://"):].rpartition(":")
                return host if is_interface else ip, int(bound)
            except zmq.ZMQError as e:
                if e.errno == errno.EADDRINUSE or e.errno == errno.EACCES:
                    tried.append(f"{port} ({e.strerror})")
                    continue
                raise ConfigError(f"can not listen on {ip}: {_words(e)}; give --ip an address of this host") from None
        raise LauncherError(f"no port left to listen on at {ip}: {', '.join(tried) or 'clients and engines need one each'}; "
                            "free one or name others with --ports")

    def _open_gate(self) -> None:
        if not self.gates:
            gate = self._context.socket(zmq.ROUTER)
            gate.linger = 0
            gate.bind("inproc://zeromq.zap.01")
            self.gates.append(gate)

    def gatekeep(self, admitted: dict[str, str]) -> list[tuple[str, str]]:
        """Answer the questions that wait at the gate; returns the address, and the role of the port, of who was refused.

        Args:
            admitted: {role: the public key that it must show}.
        """
        refused = []
        for gate in self.gates:
            while readable(gate):
                refused += self._answer(gate, gate.recv_multipart(), admitted)
        return refused

    def _answer(self, gate: Any, frames: list[bytes], admitted: dict[str, str]) -> list[tuple[str, str]]:
        if len(frames) < 8:
            return []
        envelope, (version, request, domain, address, _identity, mechanism) = frames[:2], frames[2:8]
        key = z85.encode(frames[8]).decode() if len(frames) > 8 and len(frames[8]) == 32 else ""
        wanted = admitted.get(domain.decode("latin-1"))
        ok = mechanism == b"CURVE" and bool(wanted) and key == wanted
        status, text = (b"200", b"OK") if ok else (b"400", b"this key may not come in here")
        gate.send_multipart([*envelope, version, request, status, text, b"", b""])
        return [] if ok else [(address.decode("latin-1"), domain.decode("latin-1"))]

    def close(self, linger_ms: int) -> None:
        """Close all sockets; messages on their way get `linger_ms` to leave."""
        for sock in self.role_of:
            sock.close(linger_ms)
        for gate in self.gates:
            gate.close(0)


def is_loopback(ip: str) -> bool:
    """Whether an address to listen on is reachable from this host only."""
    return ip.strip("[]") in ("localhost", "::1") or ip.startswith("127.")


def _numeric(ip: str) -> tuple[str, bool]:
    """(the address of this host that a name means, of several one that others may reach; False), or (the name of a network
    interface, True).

    Raises:
        ConfigError: there is none.
    """
    if ip in ANY or ip in (name for _, name in stdsocket.if_nameindex()):
        return ip, ip not in ANY
    try:
        found = {str(entry[4][0]) for entry in stdsocket.getaddrinfo(ip.strip("[]"), None)}
    except (OSError, UnicodeError) as e:
        raise ConfigError(f"the address to listen on, {ip!r}, can not be looked up ({getattr(e, 'strerror', None) or e}); give "
                          "--ip an address of this host, or * for all") from None
    return min(found, key=lambda address: (is_loopback(address), ":" in address, address)), False


def _words(e: Any) -> str:
    return os.strerror(e.errno)


def _bracket(ip: str) -> str:
    return f"[{ip}]" if ":" in ip else ip


def own_addresses() -> list[str]:
    """The addresses of this host that others may reach it by, the one towards the world first."""
    found = []
    for family, far in ((stdsocket.AF_INET, "192.0.2.1"), (stdsocket.AF_INET6, "2001:db8::1")):
        with contextlib.suppress(OSError), stdsocket.socket(family, stdsocket.SOCK_DGRAM) as sock:  # there is no way there
            sock.connect((far, 9))  # sends nothing
            found.append(sock.getsockname()[0])
    with contextlib.suppress(OSError):
        found += [str(entry[4][0]) for entry in stdsocket.getaddrinfo(stdsocket.gethostname(), None)]
    found += _interface_addresses()
    return [ip for ip in dict.fromkeys(found) if not is_loopback(ip) and not ip.startswith("fe80:")]


def _interface_addresses() -> list[str]:
    """The IPv4 address of each network interface; only Linux tells (man 7 netdevice)."""
    found = []
    if sys.platform == "linux":
        import fcntl

        with stdsocket.socket(stdsocket.AF_INET, stdsocket.SOCK_DGRAM) as sock:
            for _, name in stdsocket.if_nameindex():
                with contextlib.suppress(OSError):  # it has none
                    answer = fcntl.ioctl(sock, SIOCGIFADDR, name.encode()[:15].ljust(256, b"\0"))
                    found.append(stdsocket.inet_ntoa(answer[20:24]))
    return found


def public_host(ip: str, location: str) -> str:
    """The host that goes into the connection files' `url`.

    Args:
        ip: what the controller listens on.
        location: what the user says others see, or "".
    """
    if location:
        return _bracket(location)
    if ip in ANY:
        return stdsocket.gethostname()
    return _bracket(ip)
