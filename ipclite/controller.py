"""The controller: one process, one thread, one loop.

    clients ══ HELLO FUNCTION TASKS ABORT QUERY ══►            ◄══ HELLO RESULTS OUTPUT RETURNED ══ engines
                                                   Controller
    clients ◄═ WELCOME RESULTS OUTPUT ENGINES PING ══          ══ FUNCTION TASKS FORGET ══► engines
                                                       │       ══ CONTROL PING ══► agents ══ EXITED PONG ══►
                                              events ──▼──▲── effects
                                                   Scheduler

Messages become scheduler events; the effects that it returns become messages. Rules that hold here: payloads are
forwarded, never looked into; nothing is unpickled; nothing blocks; a peer that has not said HELLO with its role's
token gets no answer and changes nothing.
"""

from __future__ import annotations

import errno
import gc
import json
import os
import random
import secrets
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any, Callable, Optional

from . import __version__, config, net, wire
from .db import Batch, Function, Section
from .errors import AlreadyRunning, ConnectionFileError, ProtocolError
from .queries import Desk, open_db
from .scheduler import Scheduler
from .tasks import Abort, Accept, EngineDown, EngineUp, Fail, Finished, HostDown, Recall, Returned, Run, Spec, Submit, Task, Tick

DRAIN = 64  # messages taken from one socket before the others get their turn
SSH_KEYS = {"client": "IPController.ssh_server", "engine": "IPController.engine_ssh_server"}
MISSED_PINGS = 3  # an agent that misses so many is gone
LINGER_MS = 500
DEPARTED_KEPT = 1000  # engines that have left whose ids are known
SPECS_KEPT = 4096
FANS_KEPT = 64
HELLO_FIELDS = {"client": {"session": str, "host": str, "pid": int}, "agent": {"uuid": str, "host": str, "pid": int},
                "engine": {"uuid": str, "agent": str, "host": str, "pid": int}}
SIGNAL_MAX = 64
VERSION_MAX = 20  # characters
COMPLAIN_S = 1.0  # at most one line about garbage in this time ...
COMPLAINT_MAX = 200  # ... that quotes at most so many characters of it


class Peer:
    """Someone who said HELLO: where to send, and who it is."""

    __slots__ = ("sock", "route", "kind", "name")

    def __init__(self, sock: Any, route: bytes, kind: str, name: str):
        self.sock, self.route, self.kind, self.name = sock, route, kind, name


class ClientPeer(Peer):
    """`live` counts its unfinished tasks; they run on when it leaves, and keep `functions` alive."""

    __slots__ = ("session", "live", "functions", "gone")

    def __init__(self, sock: Any, route: bytes, name: str, session: bytes):
        super().__init__(sock, route, "client", name)
        self.session, self.live, self.gone = session, 0, False
        self.functions: dict[str, Function] = {}


class EnginePeer(Peer):
    __slots__ = ("id", "uuid", "agent", "info", "known")

    def __init__(self, sock: Any, route: bytes, id: int, body: dict[str, Any]):
        super().__init__(sock, route, "engine", f"engine {id}")
        self.id, self.uuid, self.agent = id, body["uuid"], body["agent"]
        self.info = {"id": id, **{k: body.get(k) for k in ("uuid", "host", "pid", "agent")},
                     "python": str(body.get("python", ""))[:VERSION_MAX]}
        self.known: set[tuple[bytes, str]] = set()  # functions that it holds


class Gather:
    """The results of a call to several engines that are to travel together: their sections, and how many are missing."""

    __slots__ = ("left", "sections")

    def __init__(self, count: int):
        self.left = count
        self.sections: list[Any] = []


class AgentPeer(Peer):
    __slots__ = ("uuid", "seen")

    def __init__(self, sock: Any, route: bytes, uuid: str, host: str, seen: float):
        super().__init__(sock, route, "agent", f"agent {uuid[:8]} on {host}")
        self.uuid, self.seen = uuid, seen


class Controller:
    """Sockets, peers, and the loop between them and the scheduler.

    Args:
        options: what `config.parse("controller", ...)` returned.
        log: where to tell what happens.
    """

    def __init__(self, options: dict[str, Any], log: Any):
        self.options, self.log = options, log
        self.ping_s: float = options["HeartMonitor.period"] / 1000
        self.run_id = secrets.token_hex(8)
        self.max_task_bytes = config.memory_limit() // 2
        self.clients: dict[bytes, ClientPeer] = {}  # by session
        self.engines: dict[int, EnginePeer] = {}
        self.agents: dict[str, AgentPeer] = {}
        self._silent_agents: dict[str, float] = {}  # agents whose engines came before they did: since when
        self._peers: dict[tuple[Any, bytes], Peer] = {}
        self._gathers: dict[tuple[bytes, int], Gather] = {}  # by the tasks that they wait for
        self._ids: dict[str, int] = {}  # engine uuid -> id, also of engines that have left
        self._next_id = 0
        self._specs: dict[bytes, Spec] = {}
        self._fans: dict[bytes, list[Spec]] = {}
        self.scheduler = Scheduler(crash_limit=options["TaskScheduler.crash_limit"], hwm=options["TaskScheduler.hwm"],
                                   policy=options["TaskScheduler.scheme_name"], rng=random.Random())
        self.db = open_db(options["IPController.db_class"], options, self._place_of)
        self.desk = Desk(self.scheduler, self.db, self._send_to, self._submit_again)
        self._context: Any = None
        self._ports: Any = None
        self._watch: Any = None
        self._tokens: dict[str, str] = {}
        self._files: list[Path] = []
        self._sockets_dir: Optional[Path] = None
        self.end: Optional[str] = None
        self._complained = 0.0
        self._handlers: dict[tuple[str, bytes], Callable[[Any, list[Any]], None]] = {
            ("client", wire.TASKS): self._on_tasks, ("client", wire.FUNCTION): self._on_function,
            ("client", wire.FORGET): self._on_forget, ("client", wire.ABORT): self._on_abort,
            ("client", wire.QUERY): self._on_query, ("client", wire.BYE): self._on_client_bye,
            ("engine", wire.RESULTS): self._on_results, ("engine", wire.OUTPUT): self._on_output,
            ("engine", wire.RETURNED): self._on_returned, ("engine", wire.BYE): self._on_engine_bye,
            ("agent", wire.PONG): self._on_pong, ("agent", wire.EXITED): self._on_exited,
            ("agent", wire.BYE): self._on_agent_bye,
        }
        self._queries: dict[str, Callable[[dict[str, Any]], Any]] = {
            "shutdown": self._query_shutdown, "signal": self._query_signal,
        }

    # --- starting and stopping

    def open(self, profile_dir: Path) -> None:
        """Listen, and write the two connection files below `profile_dir`.

        Raises:
            AlreadyRunning: a live controller owns the files.
            UserError: an address, port, directory or file can't be used.
        """
        lock = config.connection_file(profile_dir, self.options["Application.cluster_id"], "lock").with_suffix("")
        with config.locked(lock):  # of two that start at once, one sees the files of the other
            self._open(profile_dir)

    def _open(self, profile_dir: Path) -> None:
        cluster_id = self.options["Application.cluster_id"]
        paths = {role: config.connection_file(profile_dir, cluster_id, role) for role in ("client", "engine")}
        before = {role: self._previous(path) for role, path in paths.items()}
        reuse = self.options["IPController.reuse_files"]
        old = before if reuse and all(before.values()) and "server_secret" in before["client"] else {}
        keys = {role: net.KeyPair(old[role]["public_key"], old[role]["secret_key"]) if old else net.make_keys()
                for role in paths}
        server = net.KeyPair(old["client"]["server_key"], old["client"]["server_secret"]) if old else net.make_keys()
        self._tokens = {role: net.token(pair.secret) for role, pair in keys.items()}
        self._admitted = {role: pair.public for role, pair in keys.items()}
        self._context = net.Context()
        self._context.set(net.zmq.MAX_SOCKETS, 65535)
        self._ports = net.Ports(self._context, server, self.max_task_bytes)
        ipc, urls = self._listen(old)
        for role, path in paths.items():
            ip = self._ip(role)
            info = {"program": config.PROGRAM, "role": role, "url": urls[role], "ipc": ipc[role],
                    "ssh": self.options[SSH_KEYS[role]] or (old[role].get("ssh", "") if old else ""),
                    "location": self.options["IPController.location"] or (socket.gethostname() if net.is_loopback(ip) else
                                                                          net.public_host(ip, "").strip("[]")),
                    "public_key": keys[role].public, "secret_key": keys[role].secret,
                    "server_key": server.public if net.has_curve() else "", "cluster_id": cluster_id,
                    "run_id": self.run_id, "protocol": wire.VERSION, "version": __version__, "pid": os.getpid(),
                    "pid_start": config.process_start(os.getpid()), "host": socket.gethostname(), "started": time.time(),
                    "reuse": reuse}
            if reuse and role == "client":
                info["server_secret"] = server.secret
            config.write_json(path, info)
            self._files.append(path)
            self.log.info("wrote connection file %s", path)

    def _ip(self, role: str) -> str:
        return self.options[f"IPController.{role}_ip"] or self.options["IPController.ip"]

    def _listen(self, old: dict[str, Any]) -> tuple[dict[str, str], dict[str, str]]:
        """Listen for both roles, on the ports of the files `old` if there are any; returns sockets' paths and addresses."""
        transport = self.options["IPController.transport"]
        ipc, urls = {"client": "", "engine": ""}, {"client": "", "engine": ""}
        if transport != "tcp":
            self._sockets_dir = config.runtime_dir() / self.run_id
            self._sockets_dir.mkdir(mode=0o700)
            for role in ipc:
                ipc[role] = str(self._sockets_dir / role)
                self._ports.listen_ipc(role, ipc[role])
                self.log.info("listening for %ss on ipc://%s", role, ipc[role])
        if transport != "ipc":
            common = iter(self.options["IPController.ports"])
            for role in urls:
                if old and old[role]["url"]:
                    candidates: Any = [int(old[role]["url"].rpartition(":")[2])]
                elif self.options[f"IPController.{role}_ports"]:
                    candidates = self.options[f"IPController.{role}_ports"]
                else:
                    candidates = common if self.options["IPController.ports"] else [0]
                port = self._ports.listen_tcp(role, self._ip(role), candidates)
                host = net.public_host(self._ip(role), self.options["IPController.location"])
                urls[role] = f"tcp://{host}:{port}"
                self.log.info("listening for %ss on tcp://%s:%d", role, self._ip(role), port)
        return ipc, urls

    def _previous(self, path: Path) -> Optional[dict[str, Any]]:
        try:
            info = config.read_connection(path)
        except ConnectionFileError:
            return None
        here = info["host"] == socket.gethostname()
        if not config.dead_run(info) if here else net.takes_connections(info):
            raise AlreadyRunning(f"a controller (pid {info['pid']} on {info['host']}) already serves {path}; stop it, or give this one "
                                 "another --cluster-id")
        return info

    def close(self) -> None:
        """Say goodbye, close the sockets, remove what was written."""
        reason = wire.encode_json(wire.BYE, {"reason": self.end or "it stopped"})
        for peer in list(self._peers.values()):
            if peer.kind != "engine":
                self._send(peer, reason)
        if self._ports is not None:
            self._ports.close(LINGER_MS)
            self._context.term()
        self.db.close()
        if not self.options["IPController.reuse_files"]:
            for path in self._files:
                path.unlink(missing_ok=True)
        parent = self.options["IPController.parent"]
        if parent and os.getppid() != parent and self._files:  # nobody else is left to remove it
            cluster_id = self.options["Application.cluster_id"]
            config.cluster_file(self._files[0].parents[1], cluster_id).unlink(missing_ok=True)
        if self._sockets_dir is not None:
            for name in ("client", "engine"):
                (self._sockets_dir / name).unlink(missing_ok=True)
            self._sockets_dir.rmdir()

    def stop(self, reason: str) -> None:
        """Leave the loop soon."""
        self.end = self.end or reason

    # --- the loop

    def run(self) -> None:
        """Serve until stopped."""
        wake_r, wake_w = os.pipe()
        os.set_blocking(wake_w, False)
        signal.set_wakeup_fd(wake_w, warn_on_full_buffer=False)
        self._watch = net.Watch([*self._ports.role_of, *self._ports.gates, wake_r])
        next_ping = time.monotonic()
        try:
            while self.end is None:
                now = time.monotonic()
                if now >= next_ping:
                    self._beat(now)
                    next_ping = now + self.ping_s
                due = self.scheduler.next_deadline()
                if due is not None and due <= now:
                    self._carry_out(self.scheduler.handle(Tick(), now))
                    due = self.scheduler.next_deadline()
                wait_s = max(0.0, min(next_ping, due if due is not None else next_ping) - time.monotonic())
                for sock in self._watch.wait(wait_s):
                    if sock in self._ports.gates:
                        self._ports.gatekeep(self._admitted)
                    elif sock == wake_r:
                        os.read(wake_r, 4096)
                    else:
                        self._drain(sock)
        finally:
            signal.set_wakeup_fd(-1)
            os.close(wake_r)
            os.close(wake_w)

    def _beat(self, now: float) -> None:
        parent = self.options["IPController.parent"]
        if parent and os.getppid() != parent:
            self.stop(f"its owner (pid {parent}) is gone")
        for peer in list(self._peers.values()):
            if peer.kind != "engine":
                self._send(peer, [wire.PING])
        limit = MISSED_PINGS * self.ping_s
        for agent in list(self.agents.values()):
            if now - agent.seen > limit:
                self._drop_agent(agent, f"its host did not answer for {now - agent.seen:.0f} s")
        for uuid, since in list(self._silent_agents.items()):
            if now - since > limit:
                del self._silent_agents[uuid]
                self._drop_engines_of(uuid, "its agent never said hello")

    def _drain(self, sock: Any) -> None:
        for _ in range(DRAIN):
            self._on_message(sock, net.recv(sock))
            if not net.readable(sock):
                return
        self._watch.used.add(sock)

    def _on_message(self, sock: Any, frames: list[Any]) -> None:
        route, kind = frames[0], bytes(frames[1][:8]) if len(frames) > 1 else b""
        peer = self._peers.get((sock, route))
        try:
            handler = self._handlers.get((peer.kind, kind)) if peer is not None else None
            if handler is not None:
                handler(peer, frames[1:])
            elif kind == wire.HELLO:
                self._on_hello(sock, route, wire.decode_dict(frames[1:]))
            elif peer is not None or kind not in wire.KINDS:
                raise ProtocolError(f"{kind!r} is not something that a {peer.kind if peer else 'stranger'} sends")
            elif kind == wire.PONG:  # an agent that we gave up on has thawed: it must introduce itself again
                self._refuse(sock, route, "you were taken for dead")
        except RecursionError:
            self._complain(peer, sock, route, "it is nested too deep")
        except ProtocolError as e:
            self._complain(peer, sock, route, str(e)[:COMPLAINT_MAX])

    def _complain(self, peer: Optional[Peer], sock: Any, route: bytes, trouble: str) -> None:
        self._warn("dropped a malformed message from %s: %r", peer.name if peer else "a stranger", trouble)
        if peer is not None and peer.kind == "client":
            self._refuse(sock, route, f"malformed message: {trouble}")

    def _warn(self, *line: Any) -> None:
        now = time.monotonic()
        if now - self._complained > COMPLAIN_S:  # a flood of garbage must not become a flood of log lines
            self._complained = now
            self.log.warning(*line)

    def _refuse(self, sock: Any, route: bytes, reason: str) -> None:
        self._send(Peer(sock, route, "stranger", "a stranger"), wire.encode_json(wire.REFUSED, {"reason": reason}))

    def _send(self, peer: Peer, frames: list[Any]) -> None:
        self._watch.used.add(peer.sock)
        try:
            net.send(peer.sock, [peer.route, *frames])
        except net.NetError as e:
            if e.errno != errno.EHOSTUNREACH:
                raise
            self._on_unreachable(peer)

    def _place_of(self, key: wire.TaskKey) -> Optional[tuple[int, str, int]]:
        """On which engine an unfinished task is: id, uuid, attempt."""
        task = self.scheduler.tasks.get(key)
        engine = self.engines.get(task.engine) if task is not None and task.engine is not None else None
        return None if task is None or engine is None else (engine.id, engine.uuid, task.attempt)

    def _send_to(self, session: bytes, frames: list[Any]) -> None:
        client = self.clients.get(session)
        if client is not None and not client.gone:
            self._send(client, frames)

    # --- who comes and goes

    def _on_hello(self, sock: Any, route: bytes, body: dict[str, Any]) -> None:
        role = self._ports.role_of[sock]
        kind = body.get("role")
        if kind not in ("client", "engine", "agent") or (kind == "client") != (role == "client"):
            return self._refuse(sock, route, f"this port is for {role}s")
        if (sock, route) in self._peers:
            raise ProtocolError("it said hello before")
        if not secrets.compare_digest(str(body.get("token")).encode(errors="replace"), self._tokens[role].encode()):
            self._warn("refused a %s with a wrong key", kind)
            return self._refuse(sock, route, "your connection file is of another cluster, run or role")
        if body.get("protocol") != wire.VERSION:
            return self._refuse(sock, route, f"protocol version {str(body.get('protocol'))[:20]} (yours) is not {wire.VERSION} (ours): "
                                             f"install ipclite {__version__} there")
        for field, wanted in HELLO_FIELDS[kind].items():
            if not isinstance(body.get(field), wanted):
                return self._refuse(sock, route, f"{field} is missing or malformed")
        {"client": self._hello_client, "engine": self._hello_engine, "agent": self._hello_agent}[kind](sock, route, body)

    def _welcome(self, peer: Peer, **more: Any) -> None:
        self._peers[peer.sock, peer.route] = peer
        self._send(peer, wire.encode_json(wire.WELCOME, {
            "run_id": self.run_id, "cluster_id": self.options["Application.cluster_id"], "version": __version__, "ping_s": self.ping_s,
            "silence_s": MISSED_PINGS * self.ping_s, "max_task_bytes": self.max_task_bytes, "pid": os.getpid(),
            "host": socket.gethostname(), **more}))

    def _hello_client(self, sock: Any, route: bytes, body: dict[str, Any]) -> None:
        try:
            session = bytes.fromhex(body["session"])
        except ValueError:
            session = b""
        if len(session) != wire.SESSION_SIZE or session in self.clients:
            return self._refuse(sock, route, "the session is malformed or taken")
        peer = ClientPeer(sock, route, f"client {body['pid']} on {body['host']}", session)
        self.clients[session] = peer
        self._welcome(peer, engines=[e.info for e in self.engines.values()])
        self.log.info("%s connected", peer.name)

    def _hello_engine(self, sock: Any, route: bytes, body: dict[str, Any]) -> None:
        uuid, wanted = body["uuid"], body.get("id")
        known = self._ids.get(uuid)
        if known in self.engines:
            self._drop_engine(self.engines[known], "it lost its connection and came back", None, False)
        id = known
        if id is None:
            free = type(wanted) is int and 0 <= wanted < wire.NO_ENGINE and wanted not in self.engines
            id = wanted if free else self._next_id
            self._next_id = max(self._next_id, id + 1)
        self._ids[uuid] = id
        if len(self._ids) > len(self.engines) + DEPARTED_KEPT:
            for old in [u for u, i in self._ids.items() if i not in self.engines and i != id][: DEPARTED_KEPT // 2]:
                del self._ids[old]
        engine = EnginePeer(sock, route, id, body)
        self.engines[id] = engine
        if engine.agent not in self.agents:
            self._silent_agents.setdefault(engine.agent, time.monotonic())
        self._welcome(engine, id=id)
        if self.engines.get(id) is not engine:
            return  # it did not stay for its welcome
        self.log.info("engine %d connected (pid %s on %s)", id, body.get("pid"), body["host"])
        self._tell_clients({"joined": [engine.info]})
        self._carry_out(self.scheduler.handle(EngineUp(id), time.monotonic()))

    def _hello_agent(self, sock: Any, route: bytes, body: dict[str, Any]) -> None:
        uuid = body["uuid"]
        if uuid in self.agents:
            self._peers.pop((self.agents[uuid].sock, self.agents[uuid].route), None)
        self._silent_agents.pop(uuid, None)
        agent = self.agents[uuid] = AgentPeer(sock, route, uuid, body["host"], time.monotonic())
        self._welcome(agent)
        self.log.info("%s connected", agent.name)

    def _on_pong(self, agent: AgentPeer, frames: list[Any]) -> None:
        agent.seen = time.monotonic()

    def _on_exited(self, agent: AgentPeer, frames: list[Any]) -> None:
        body = wire.decode_dict(frames)
        id = self._ids.get(str(body.get("uuid")))
        engine = self.engines.get(id) if id is not None else None
        if engine is None or engine.agent != agent.uuid:
            return
        running = body.get("running")
        try:
            key = (bytes.fromhex(running[0]), int(running[1])) if running else None
        except (TypeError, ValueError, LookupError, OverflowError):
            raise ProtocolError("'running' is not a task") from None
        verdict = body.get("verdict")
        if verdict is not None and not (isinstance(verdict, list) and [type(v) for v in verdict] == [str, str]):
            raise ProtocolError("'verdict' is not an error class and a message")
        self._drop_engine(engine, str(body.get("cause")), key, bool(body.get("crashed")), verdict and tuple(verdict))

    def _on_agent_bye(self, agent: AgentPeer, frames: list[Any]) -> None:
        self._drop_agent(agent, str(wire.decode_dict(frames).get("reason", "its agent stopped")))

    def _on_engine_bye(self, engine: EnginePeer, frames: list[Any]) -> None:
        self._drop_engine(engine, str(wire.decode_dict(frames).get("reason", "it stopped")), None, False)

    def _on_client_bye(self, client: ClientPeer, frames: list[Any]) -> None:
        self._drop_client(client, "closed")

    def _on_unreachable(self, peer: Peer) -> None:
        if self._peers.get((peer.sock, peer.route)) is not peer:
            return
        if isinstance(peer, ClientPeer):
            self._drop_client(peer, "lost")
        elif isinstance(peer, AgentPeer):
            self._drop_agent(peer, "its host closed the connection")
        elif isinstance(peer, EnginePeer):
            self._drop_engine(peer, "it closed its connection", "unknown", False)

    def _drop_client(self, client: ClientPeer, how: str) -> None:
        self._peers.pop((client.sock, client.route), None)
        client.gone = True
        self.desk.left(client.session)
        self.log.info("%s %s; %d of its tasks are unfinished", client.name, how, client.live)
        self._settle(client, 0)

    def _drop_agent(self, agent: AgentPeer, reason: str) -> None:
        self._peers.pop((agent.sock, agent.route), None)
        if self.agents.get(agent.uuid) is agent:
            del self.agents[agent.uuid]
            self.log.warning("%s is gone: %s", agent.name, reason)
            self._drop_engines_of(agent.uuid, reason)

    def _drop_engines_of(self, agent_uuid: str, reason: str) -> None:
        gone = [self._strike(e, reason, "unknown", False) for e in list(self.engines.values()) if e.agent == agent_uuid]
        self._carry_out(self.scheduler.handle(HostDown([event for event in gone if event is not None]), time.monotonic()))

    def _drop_engine(self, engine: EnginePeer, reason: str, running: Any, crashed: bool,
                     verdict: Optional[tuple[str, str]] = None) -> None:
        event = self._strike(engine, reason, running, crashed, verdict)
        if event is not None:
            self._carry_out(self.scheduler.handle(event, time.monotonic()))

    def _strike(self, engine: EnginePeer, reason: str, running: Any, crashed: bool,
                verdict: Optional[tuple[str, str]] = None) -> Optional[EngineDown]:
        """Take an engine off the list, and tell the clients; returns what the scheduler is to hear of it."""
        self._peers.pop((engine.sock, engine.route), None)
        if self.engines.get(engine.id) is not engine:
            return None
        del self.engines[engine.id]
        self.log.warning("engine %d (pid %s on %s) is gone: %s", engine.id, engine.info["pid"], engine.info["host"], reason)
        self._tell_clients({"left": {str(engine.id): reason}})
        reason = f"engine {engine.id} on {engine.info['host']} is gone: {reason}"
        return EngineDown(engine.id, reason, running, crashed, verdict)

    def _tell_clients(self, news: dict[str, Any]) -> None:
        message = wire.encode_json(wire.ENGINES, news)
        for client in list(self.clients.values()):
            if not client.gone:
                self._send(client, message)

    # --- what clients send

    def _spec(self, raw: bytes) -> Spec:
        spec = self._specs.get(raw)
        if spec is None:
            if len(self._specs) >= SPECS_KEPT:
                self._specs.clear()
            spec = self._specs[raw] = Spec.from_json(raw)
        return spec

    def _on_tasks(self, client: ClientPeer, frames: list[Any]) -> None:
        tasks: list[Task] = []
        for raw, session, batch in wire.decode_tasks(frames):
            if session != client.session:
                raise ProtocolError("tasks of another client's session")
            spec, at = self._spec(raw), len(tasks)
            for seq, fan_out, payload in batch:
                if fan_out <= 1:
                    tasks.append(Task((session, seq), spec, payload))
                    continue
                if spec.targets is None or len(spec.targets) != fan_out:
                    raise ProtocolError("a task for several engines does not name them")
                if seq + fan_out > wire.SEQ_END:
                    raise ProtocolError("a task's number is too large")
                keys = [(session, seq + i) for i in range(fan_out)]
                whole = json.loads(spec.raw)
                if whole.pop("coalesce", False):
                    self._gathers.update(dict.fromkeys(keys, Gather(fan_out)))
                tasks += [Task(key, one, payload) for key, one in zip(keys, self._fan(whole))]
            if self.db.keeps and batch:
                if len(frames) == 2 and len(batch) > 1 and len(tasks) - at == len(batch) and tasks[-1].spec is spec is tasks[at].spec:
                    self._note(client, spec, [entry[0] for entry in batch], None, frame=frames[1])
                else:
                    self._record(client, spec, tasks[at:], len(batch))
        self._submit(client, tasks)

    def _submit(self, client: ClientPeer, tasks: list[Task]) -> None:
        client.live += len(tasks)
        self._carry_out(self.scheduler.handle(Submit(tasks), time.monotonic()))

    def _submit_again(self, client: ClientPeer, tasks: list[Task]) -> None:
        for task in tasks:
            self._record(client, task.spec, [task], 1)
        self._submit(client, tasks)

    def _record(self, client: ClientPeer, spec: Spec, tasks: list[Task], sent: int) -> None:
        """Put tasks on record: `sent` tasks with this spec became these."""
        seqs = [task.key[1] for task in tasks]
        fan, rest = divmod(len(tasks), sent)
        if rest or (fan > 1 and seqs[-1] - seqs[0] != len(seqs) - 1) or (fan == 1 and tasks[0].spec is not spec):
            for task in tasks:
                self._record(client, task.spec, [task], 1)
            return
        self._note(client, spec, seqs, [task.payload for task in tasks], fan)

    def _note(self, client: ClientPeer, spec: Spec, seqs: list[int], payloads: Optional[list[wire.Payload]], fan: int = 1,
              frame: Optional[bytes] = None) -> None:
        function = client.functions.get(spec.fn) if spec.fn else None
        self.db.submitted(Batch(client.session, spec.raw, seqs, payloads, time.time(), function, fan, frame))

    def _fan(self, whole: dict[str, Any]) -> list[Spec]:
        """One spec per target of a spec, cached like every other."""
        key = json.dumps(whole).encode()
        fan = self._fans.get(key)
        if fan is None:
            if len(self._fans) >= FANS_KEPT:
                self._fans.clear()
            fan = self._fans[key] = [self._spec(json.dumps({**whole, "targets": [t]}).encode()) for t in whole["targets"]]
        return fan

    def _on_function(self, client: ClientPeer, frames: list[Any]) -> None:
        if len(frames) < 3:
            raise ProtocolError("a function without its bytes")
        client.functions[bytes(frames[1]).hex()] = Function(frames[2:])

    def _on_forget(self, client: ClientPeer, frames: list[Any]) -> None:
        for digest in frames[1:]:
            self._forget(client, bytes(digest).hex())

    def _forget(self, client: ClientPeer, digest: str) -> None:
        client.functions.pop(digest, None)
        for engine in list(self.engines.values()):
            if (client.session, digest) in engine.known:
                engine.known.discard((client.session, digest))
                self._send(engine, [wire.FORGET, client.session + bytes.fromhex(digest)])

    def _settle(self, client: ClientPeer, finished: int) -> None:
        """Count finished tasks; a client that left is forgotten with its last one."""
        client.live -= finished
        if client.gone and client.live <= 0:
            self.clients.pop(client.session, None)
            for digest in list(client.functions):
                self._forget(client, digest)
            for key in [key for key in self._gathers if key[0] == client.session]:
                del self._gathers[key]

    def _on_abort(self, client: ClientPeer, frames: list[Any]) -> None:
        session, ids = wire.decode_ids(frames)
        if session != client.session:
            raise ProtocolError("tasks of another client's session")
        self._carry_out(self.scheduler.handle(Abort(session, [seq for seq, _ in ids]), time.monotonic()))
        on: dict[int, list[Any]] = {}
        for seq, interrupt in ids:
            task = self.scheduler.tasks.get((session, seq))
            if interrupt and task is not None and task.engine is not None:
                on.setdefault(task.engine, []).append([session.hex(), seq])
        for engine_id, tasks in on.items():
            if engine_id in self.engines:
                self._control([self.engines[engine_id]], {"op": "interrupt", "tasks": tasks})

    def _on_query(self, client: ClientPeer, frames: list[Any]) -> None:
        body = wire.decode_query(frames)
        if type(body.get("id")) is not int:
            raise ProtocolError("a query without a number")
        reply: dict[str, Any] = {"id": body["id"]}
        what = str(body.get("what"))
        if what in self.desk.table:
            reply.update(self.desk.answer(client, {**body, "what": what}))
            return self._send(client, wire.encode_query(wire.REPLY, reply))
        query = self._queries.get(what)
        try:
            reply["value"] = query(body) if query else None
            if query is None:
                reply["error"] = f"the controller does not know the query {str(body.get('what'))[:COMPLAINT_MAX]!r}"
        except (KeyError, TypeError, ValueError, OverflowError) as e:
            reply["error"] = f"the query {body['what']!r} is malformed: {type(e).__name__}: {str(e)[:COMPLAINT_MAX]}"
        self._send(client, wire.encode_json(wire.REPLY, reply))

    def _targets(self, body: dict[str, Any]) -> list[EnginePeer]:
        wanted = body["targets"]
        return list(self.engines.values()) if wanted is None else [self.engines[t] for t in wanted if t in self.engines]

    def _query_shutdown(self, body: dict[str, Any]) -> Any:
        if body["hub"]:
            self.stop("a client shut it down")
        else:
            self._control(self._targets(body), {"op": "stop", "restart": bool(body.get("restart"))})

    def _query_signal(self, body: dict[str, Any]) -> Any:
        if not 0 <= int(body["signum"]) <= SIGNAL_MAX:
            raise ValueError(f"{body['signum']} is not a signal")
        self._control(self._targets(body), {"op": "signal", "signum": int(body["signum"])})

    def _control(self, engines: list[EnginePeer], order: dict[str, Any]) -> None:
        for engine in engines:
            agent = self.agents.get(engine.agent)
            if agent is not None:
                self._send(agent, wire.encode_json(wire.CONTROL, {**order, "uuid": engine.uuid}))

    # --- what engines send

    def _on_results(self, engine: EnginePeer, frames: list[Any]) -> None:
        for session, engine_id, records, section in wire.result_sections(frames):
            if engine_id != engine.id:
                raise ProtocolError("results of another engine")
            effects = self.scheduler.handle(Finished(engine_id, session, records), time.monotonic())
            self._carry_out(effects, (records, section))

    def _on_output(self, engine: EnginePeer, frames: list[Any]) -> None:
        session, engine_id, pieces = wire.decode_output(frames)
        client = self.clients.get(session)
        if engine_id != engine.id:
            raise ProtocolError("output of another engine")
        self.db.output(session, pieces)
        if self.desk.watchers:
            self.desk.output(session, engine_id, pieces)
        if client is not None and not client.gone:
            self._send(client, frames)

    def _on_returned(self, engine: EnginePeer, frames: list[Any]) -> None:
        session, ids = wire.decode_ids(frames)
        self._carry_out(self.scheduler.handle(Returned(engine.id, session, ids), time.monotonic()))

    # --- what the scheduler wants

    def _carry_out(self, effects: list[Any], arrived: Optional[tuple[Any, Any]] = None) -> None:
        for effect in effects:
            if type(effect) is Run:
                self._run_on(effect)
            elif type(effect) is Accept:
                self._deliver(effect, *arrived)  # type: ignore[misc]
                self._keep(effect, *arrived)  # type: ignore[misc]
            elif type(effect) is Fail:
                self._fail(effect)
            elif type(effect) is Recall:
                self._recall(effect)

    def _run_on(self, effect: Run) -> None:
        engine = self.engines.get(effect.engine_id)
        if engine is None:
            return  # an effect before this one found it gone, and the scheduler knows
        message: list[Any] = [wire.TASKS]
        section: list[Any] = []
        spec: Any = None
        session = b""
        for task in effect.tasks:
            if task.spec is not spec or task.key[0] != session:
                if section:
                    message += self._section(engine, spec, session, section)
                    section = []
                spec, session = task.spec, task.key[0]
                if spec.fn and (session, spec.fn) not in engine.known:
                    function = self.clients[session].functions.get(spec.fn)
                    if function is not None:
                        engine.known.add((session, spec.fn))
                        self._send(engine, [wire.FUNCTION, session + bytes.fromhex(spec.fn), *function.frames])
            section.append((task.key[1], task.attempt, task.payload))
        message += self._section(engine, spec, session, section)
        self._send(engine, message)

    def _section(self, engine: EnginePeer, spec: Spec, session: bytes, tasks: list[Any]) -> list[Any]:
        if self.db.keeps:
            self.db.assigned(session, engine.id, engine.uuid, tasks)
        return wire.encode_tasks(spec.raw, session, tasks)

    def _deliver(self, effect: Accept, records: list[Any], section: list[Any]) -> None:
        client = self.clients.get(effect.session)
        if client is None:
            return
        if not client.gone:
            if effect.positions is not None or self._gathers:
                results = list(wire.section_results(records, section))
                if effect.positions is not None:
                    results = [results[i] for i in effect.positions]
                self._answer(client, effect.engine_id, results)
            else:
                self._send(client, [wire.RESULTS, *section])
        self._settle(client, len(records) if effect.positions is None else len(effect.positions))

    def _keep(self, effect: Accept, records: list[Any], section: list[Any]) -> None:
        """Results that count, for the record and for whoever wants them besides the client that gets them."""
        if not self.db.keeps and not self.desk.watchers:
            return
        if effect.positions is not None:
            results = list(wire.section_results(records, section))
            records = [records[i] for i in effect.positions]
            section = wire.encode_results(effect.session, effect.engine_id, [results[i] for i in effect.positions])
        engine = self.engines.get(effect.engine_id)
        uuid = engine.uuid if engine is not None else ""
        self.db.finished(Section(effect.session, effect.engine_id, uuid, time.time(), [r[0] for r in records], section))
        if self.desk.watchers:
            self.desk.results(effect.session, section)

    def _fail(self, effect: Fail) -> None:
        session, seq = effect.task.key
        payload = wire.encode_error({"ename": effect.ename, "evalue": effect.message, "own": True})
        result = wire.Result(seq, time.time(), 0.0, effect.task.attempt, wire.ERROR, payload)
        client = self.clients.get(session)
        if client is not None:
            if not client.gone:
                self._answer(client, wire.NO_ENGINE, [result])
            self._settle(client, 1)
        self._keep(Accept(wire.NO_ENGINE, session, None), [result], wire.encode_results(session, wire.NO_ENGINE, [result]))

    def _answer(self, client: ClientPeer, engine_id: int, results: list[wire.Result]) -> None:
        """Send results, or put them by until those that they are to travel with are here."""
        at_once: list[wire.Result] = []
        message: list[Any] = [wire.RESULTS]
        for result in results:
            gather = self._gathers.pop((client.session, result.seq), None)
            if gather is None:
                at_once.append(result)
                continue
            gather.left -= 1
            gather.sections += wire.encode_results(client.session, engine_id, [result])
            if not gather.left:
                message += gather.sections
        if at_once:
            message += wire.encode_results(client.session, engine_id, at_once)
        if len(message) > 1:
            self._send(client, message)

    def _recall(self, effect: Recall) -> None:
        engines = [self.engines[effect.engine_id]] if effect.engine_id in self.engines else []
        self._control(engines, {"op": "recall", "tasks": [[session.hex(), seq] for session, seq in effect.keys]})


def serve(argv: list[str]) -> int:
    """Run a controller until it is stopped. Returns the exit code."""
    settings = config.parse("controller", argv)
    log = config.setup_logging("ipcontroller", settings["Application.log_level"], settings.log_file)
    if settings["Application.work_dir"]:
        config.enter_work_dir(settings["Application.work_dir"])
    gc.freeze()  # what exists now stays; tasks are freed by reference count, so the collector has little to find
    gc.set_threshold(50_000, 20, 100)
    files = config.raise_file_limit()
    controller = Controller(settings, log)
    for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(signum, lambda n, _: controller.stop(f"it got {signal.Signals(n).name}"))
    try:
        controller.open(settings.profile_dir)
        hwm = settings["TaskScheduler.hwm"]
        log.info("profile directory %s; open files up to %d", settings.profile_dir, files)
        log.info("database %s; scheduler %s, %s", settings["IPController.db_class"], settings["TaskScheduler.scheme_name"],
                 "tasks ahead as their run time tells" if hwm is None else f"{hwm or 'any number of'} tasks ahead")
        log.info("heartbeat every %d ms", settings["HeartMonitor.period"])
        log.info("controller started (pid %d, run %s)", os.getpid(), controller.run_id)
        controller.run()
        log.info("controller stopped: %s", controller.end)
    finally:
        controller.close()
    return 0


def main(argv: Optional[list[str]] = None) -> int:
    """`ipcontroller`: the command line."""
    return config.run_main("ipcontroller", serve, argv)


if __name__ == "__main__":
    sys.exit(main())
