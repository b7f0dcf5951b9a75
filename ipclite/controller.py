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
import math
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
from .errors import AlreadyRunning, ConfigError, ConnectionFileError, ProtocolError
from .peers import AgentPeer, ClientPeer, EnginePeer, Gather, Peer
from .queries import Desk, open_db, write_off
from .recovery import COMEBACK_S, Recovery
from .restore import Ledger, Restore, Roster
from .scheduler import Scheduler
from .tasks import (ATTEMPTS_MAX, Abort, Accept, Away, EngineDown, EngineUp, Fail, Finished, Held, HostDown, Recall, Returned, Run,
                    Settled, Spec, Submit, Task, Tick, Void)

DRAIN = 64  # messages taken from one socket before the others get their turn
SSH_KEYS = {"client": "IPController.ssh_server", "engine": "IPController.engine_ssh_server"}
LINGER_MS = 500
MANY = 50_000  # tasks: the memory of so many is worth giving back
WORLD_GRACE_S = 0.5  # for a rank of a broken MPI world to end: it can't leave that in order
DEPARTED_KEPT = 1000  # engines that have left whose ids are known
REDIAL_S = 10.0  # how long those are whose connection broke ...
MOVE_S = 2.0  # ... before others get the work of their engines as well
TOLD_SECTIONS = 64  # an engine keeps at most about so many sections of results that have arrived
TOLD_TASKS = 16_384  # a client keeps at most about so many tasks that have arrived
SPECS_KEPT = 4096
FANS_KEPT = 64
HELLO_FIELDS = {"client": {"session": str, "host": str, "pid": int}, "agent": {"uuid": str, "host": str, "pid": int},
                "engine": {"uuid": str, "agent": str, "host": str, "pid": int}}
SIGNAL_MAX = 64
SECONDS_MAX = 1e12  # that an engine may say it has left
ENGINE_ID_MAX = 1 << 24  # that an engine may ask for: after it there must be room for those that do not ask
REASON_MAX = 1000  # characters of why a job has ended
COMPLAIN_S = 1.0  # at most one line about garbage in this time ...
COMPLAINT_MAX = 200  # ... that quotes at most so many characters of it


class Controller(Recovery):
    """Sockets, peers, and the loop between them and the scheduler.

    Args:
        options: what `config.parse("controller", ...)` returned.
        log: where to tell what happens.
    """

    def __init__(self, options: dict[str, Any], log: Any):
        self.options, self.log = options, log
        self.ping_s: float = options["HeartMonitor.period"] / 1000
        self.silence_s: float = self.ping_s * options["HeartMonitor.max_heartmonitor_misses"]
        self.run_id = secrets.token_hex(8)
        self.max_task_bytes = config.memory_limit() // 2
        self.clients: dict[bytes, ClientPeer] = {}  # by session
        self.engines: dict[int, EnginePeer] = {}
        self.away: dict[int, EnginePeer] = {}  # engines that can't be reached and may come back
        self.agents: dict[str, AgentPeer] = {}
        self._silent_agents: dict[str, float] = {}  # agents whose engines came before they did: since when
        self._orders: dict[str, list[Any]] = {}  # for them
        self._peers: dict[tuple[Any, bytes], Peer] = {}
        self._gathers: dict[tuple[bytes, int], Gather] = {}  # by the tasks that they wait for
        self._ids: dict[str, int] = {}  # engine uuid -> id, also of engines that have left
        self._next_id = 0
        self._specs: dict[bytes, Spec] = {}
        self._fans: dict[bytes, list[Spec]] = {}
        self.scheduler = Scheduler(crash_limit=options["TaskScheduler.crash_limit"], hwm=options["TaskScheduler.hwm"],
                                   policy=options["TaskScheduler.scheme_name"], rng=random.Random(),
                                   no_engine_s=options["TaskScheduler.no_engine_timeout"] or math.inf)
        self.db = open_db(options["IPController.db_class"], options, self._place_of)
        self.desk = Desk(self.scheduler, self.db, self._send_to, self._submit_again)
        self.restore: Optional[Restore] = None  # while a former run waits for those who were there
        self._ledger = Ledger()
        self._roster: Optional[Roster] = None
        self._reuse: bool = options["IPController.reuse_files"] or options["IPController.restore_engines"]
        self._durable = False  # as peers were told last
        self._slept = -math.inf  # when we woke up last
        self._past = False  # whether records tell of tasks that the scheduler never saw
        self._context: Any = None
        self._ports: Any = None
        self._watch: Any = None
        self._tokens: dict[str, str] = {}
        self._files: list[Path] = []
        self._sockets_dir: Optional[Path] = None
        self.end: Optional[str] = None
        self._complained = 0.0
        self._most = 0  # tasks at a time, since memory was last given back
        self._handlers: dict[tuple[str, bytes], Callable[[Any, list[Any]], None]] = {
            ("client", wire.TASKS): self._on_tasks, ("client", wire.FUNCTION): self._on_function,
            ("client", wire.FORGET): self._on_forget, ("client", wire.ABORT): self._on_abort,
            ("client", wire.QUERY): self._on_query, ("client", wire.BYE): self._on_client_bye,
            ("client", wire.PONG): self._on_confirm, ("client", wire.RESUME): self._on_resumed,
            ("engine", wire.RESULTS): self._on_results, ("engine", wire.OUTPUT): self._on_output,
            ("engine", wire.RETURNED): self._on_returned, ("engine", wire.BYE): self._on_engine_bye,
            ("agent", wire.PONG): self._on_pong, ("agent", wire.EXITED): self._on_exited,
            ("agent", wire.BYE): self._on_agent_bye,
        }
        self._queries: dict[str, Callable[[dict[str, Any]], Any]] = {
            "shutdown": self._query_shutdown, "signal": self._query_signal, "gone": self._query_gone,
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
        self.db.open(profile_dir, cluster_id)
        if self.options["IPController.restore_engines"] and not self.db.persists:
            raise ConfigError("--restore needs records that outlive the controller; add --sqlitedb.")
        reuse = self._reuse
        old = before if reuse and all(before.values()) and "server_secret" in before["client"] else {}
        self._check_old(old, paths)
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
            info = {"program": config.PROGRAM, "role": role, "url": urls[role], "ipc": ipc[role],
                    "ssh": self.options[SSH_KEYS[role]] or (old[role].get("ssh", "") if old else ""),
                    "location": self._location(urls[role], old.get(role, {})),
                    "public_key": keys[role].public, "secret_key": keys[role].secret,
                    "server_key": server.public if net.has_curve() else "", "cluster_id": cluster_id,
                    "run_id": self.run_id, "protocol": wire.VERSION, "version": __version__, "pid": os.getpid(),
                    "pid_start": config.process_start(os.getpid()), "host": socket.gethostname(), "started": time.time(),
                    "reuse": reuse}
            if self._ip(role) in net.ANY and not self.options["IPController.location"]:
                info["addresses"] = net.own_addresses()
            if reuse and role == "client":
                info["server_secret"] = server.secret
            config.write_json(path, info)
            self._files.append(path)
            self.log.info("wrote connection file %s", path)
        self._durable = self.db.persists
        if self._durable:
            self._roster = Roster(config.connection_file(profile_dir, cluster_id, "peers").with_suffix(""))
            try:
                if old:
                    self._carry_on(self._roster)
                else:
                    write_off(self.db)
            except ProtocolError as e:
                raise ConfigError(f"the records of unfinished tasks are damaged: {e}; restore them from a copy, or choose another place "
                                  "for new ones.") from None

    def _ip(self, role: str) -> str:
        return self.options[f"IPController.{role}_ip"] or self.options["IPController.ip"] or "127.0.0.1"

    def _location(self, url: str, old: dict[str, Any]) -> str:
        """What the connection file says of where this host is; what somebody wrote into it stays."""
        host = url[len("tcp://"):].rpartition(":")[0]
        if not self.options["IPController.location"] and old.get("url") == url and old.get("location"):
            return str(old["location"])
        return self.options["IPController.location"] or (
            socket.gethostname() if not host or net.is_loopback(host) else host.strip("[]"))

    def _listen(self, old: dict[str, Any]) -> tuple[dict[str, str], dict[str, str]]:
        """Listen for both roles, on the ports of the files `old` if there are any; returns sockets' paths and addresses."""
        chosen = {role: self.options[f"IPController.{role}_transport"] or self.options["IPController.transport"]
                  for role in ("client", "engine")}
        ipc, urls = {"client": "", "engine": ""}, {"client": "", "engine": ""}
        if set(chosen.values()) != {"tcp"}:
            self._sockets_dir = config.runtime_dir() / self.run_id
            self._sockets_dir.mkdir(mode=0o700)
            for role in [role for role in ipc if chosen[role] != "tcp"]:
                ipc[role] = str(self._sockets_dir / role)
                self._ports.listen_ipc(role, ipc[role])
                self.log.info("listening for %ss on ipc://%s", role, ipc[role])
        common = iter(self.options["IPController.ports"])
        for role in [role for role in urls if chosen[role] != "ipc"]:
            if old and old[role]["url"]:
                candidates: Any = [int(old[role]["url"].rpartition(":")[2])]
            elif self.options[f"IPController.{role}_ports"]:
                candidates = self.options[f"IPController.{role}_ports"]
            else:
                candidates = common if self.options["IPController.ports"] else [0]
            ip, port = self._ports.listen_tcp(role, self._ip(role), candidates)
            urls[role] = f"tcp://{net.public_host(ip, self.options['IPController.location'])}:{port}"
            self.log.info("listening for %ss on tcp://%s:%d", role, ip, port)
        return ipc, urls

    def _previous(self, path: Path) -> Optional[dict[str, Any]]:
        try:
            info = config.read_connection(path)
        except ConnectionFileError:
            return None
        here = info["host"] == socket.gethostname()
        unseen = not info["url"]  # from another host
        if not config.dead_run(info) if here else unseen or net.takes_connections(info):
            advice = f"; or remove {path} if it is gone" if unseen and not here else ""
            raise AlreadyRunning(f"a controller (pid {info['pid']} on {info['host']}) already serves {path}; stop it, or give this one "
                                 f"another --cluster-id{advice}")
        return info

    @staticmethod
    def _check_old(old: dict[str, Any], paths: dict[str, Path]) -> None:
        """Whether there is what we need in the connection files of the run before.

        Raises:
            ConfigError: somebody has changed them.
        """
        for role, info in old.items():
            port = info["url"].rpartition(":")[2] if info["url"] else "1"
            keys = [info.get("public_key"), info.get("secret_key")]
            if role == "client":
                keys += [info.get("server_key") if net.has_curve() else info["secret_key"], info["server_secret"]]
            if not (port.isascii() and port.isdigit() and 0 < int(port[:9]) < 65536 and all(map(net.is_key, keys))):
                raise ConfigError(f"{paths[role]} is damaged, so that its port and keys can't be used again; "
                                  "restore it from a copy, or remove it and start engines and clients anew.")

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
        self.desk.close()
        if not self._reuse:
            for path in [*self._files, *([self._roster.path] if self._roster is not None else [])]:
                path.unlink(missing_ok=True)
        if self._orphaned() and self._files:  # nobody else is left to remove it
            noted = config.cluster_file(self._files[0].parents[1], self.options["Application.cluster_id"])
            noted = Path(os.environ.get("IPP_CLUSTER_FILE") or noted)
            if not config.names_jobs(noted):
                noted.unlink(missing_ok=True)
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
        written = [self.db.wake_fd] if self.db.wake_fd is not None else []
        answered = [self.desk.wake_fd] if self.desk.wake_fd is not None else []
        self._watch = net.Watch([*self._ports.role_of, *self._ports.gates, wake_r, *written, *answered])
        next_ping = time.monotonic()
        try:
            while self.end is None:
                now = time.monotonic()
                if now >= next_ping:
                    self._sleep(now, now - next_ping)
                    self._beat(now)
                    next_ping = now + self.ping_s
                due = self._next_deadline()
                if due is not None and due <= now:
                    self._on_deadline(now)
                    due = self._next_deadline()
                wait_s = max(0.0, min(next_ping, due if due is not None else next_ping) - time.monotonic())
                ready = self._watch.wait(wait_s)
                self._sleep(now, time.monotonic() - now - wait_s)
                for sock in ready:
                    if sock in self._ports.gates:
                        for address, role in self._ports.gatekeep(self._admitted):
                            self._warn("refused somebody at %s, who has no key for the port of %ss", address, role)
                    elif sock == wake_r:
                        os.read(wake_r, 4096)
                    elif sock in written:
                        self._on_written()
                    elif sock in answered:
                        self.desk.collect()
                    else:
                        self._drain(sock)
        finally:
            signal.set_wakeup_fd(-1)
            os.close(wake_r)
            os.close(wake_w)

    def _next_deadline(self) -> Optional[float]:
        due = self.scheduler.next_deadline()
        if self._roster is None:
            return due
        # While a former run waits, its roster stays, for the case that we are killed, too.
        times = [due, self._roster.due if self.restore is None else self.restore.until]
        return min([t for t in times if t is not None], default=None)

    def _on_deadline(self, now: float) -> None:
        if self._roster is not None and self._roster.due is not None and self._roster.due <= now and self.restore is None:
            here = [*self.engines.values(), *self.away.values()]
            self._roster.write([e.info for e in here], [c.session for c in self.clients.values() if not c.gone or c.until])
        if self.restore is not None and self.restore.over(now):
            self._go_on(self.restore)
        self._carry_out(self.scheduler.handle(Tick(), now))

    def _sleep(self, now: float, late_s: float) -> None:
        """If we are so late that we were stopped or suspended, others have answered meanwhile, or given up and dial again."""
        if late_s > self.ping_s:
            self.log.warning("this process was stopped for %.0f s", late_s)
            self._slept = now + late_s
            for agent in self.agents.values():
                agent.seen += late_s

    def _orphaned(self) -> bool:
        """Is the process gone that started us, or had us started on its host?"""
        parent, (host, _, owner) = self.options["IPController.parent"], self.options["IPController.owner"].partition(":")
        pid, _, started = owner.partition(":")
        here = pid.isdigit() and host == socket.gethostname()
        return bool(parent and os.getppid() != parent or here and not config.process_alive(int(pid), started or None))

    def _beat(self, now: float) -> None:
        self._tidy()
        if self._orphaned():
            self.stop("its owner is gone")
        for peer in list(self._peers.values()):
            if peer.kind != "engine":
                self._send(peer, [wire.PING])
        silent = [agent for agent in self.agents.values() if now - agent.seen > self.silence_s]
        # When nobody from elsewhere is heard, it is most likely our own host that is cut off, and will not be for ever.
        cut_off = silent and all(agent in silent for agent in self.agents.values() if not agent.local)
        for agent in silent:
            self._drop_agent(agent, f"its host did not answer for {now - agent.seen:.0f} s",
                             patience_s=COMEBACK_S if cut_off and not agent.local else 0.0)
        for engine in [engine for engine in self.away.values() if now > engine.until]:
            self._drop_engine(engine, engine.why.partition(": ")[2], "unknown", False)
        moved = [engine for engine in self.away.values() if now > engine.move_at]
        for engine in moved:
            engine.move_at = math.inf
        if moved:
            self._carry_out(self.scheduler.handle(Away([(e.id, e.why) for e in moved], True), now))
        self._tell_what_came(now)
        for uuid, since in list(self._silent_agents.items()):
            if now - since > self.silence_s:
                del self._silent_agents[uuid]
                self._orders.pop(uuid, None)
                self._drop_engines_of(uuid, "its agent never said hello")

    def _tidy(self) -> None:
        """Give back memory when a long queue has been worked off."""
        self._most = max(self._most, len(self.scheduler.tasks))
        if self._most >= MANY and not self.scheduler.tasks:
            self._most = 0
            gc.collect()
            import ctypes

            trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
            if trim is not None:
                trim(0)

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

    def _handle(self, peer: Peer, handler: Callable[[Any, list[Any]], None], frames: list[Any]) -> None:
        """Take in a message that was put by."""
        try:
            handler(peer, frames)
        except (RecursionError, ProtocolError) as e:
            self._complain(peer, peer.sock, peer.route, str(e)[:COMPLAINT_MAX])

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
        id = task.engine if task is not None else None
        engine = self.engines.get(id) or self.away.get(id) if id is not None else None
        return None if task is None or engine is None else (engine.id, engine.uuid, task.attempt)

    def _send_to(self, session: bytes, frames: list[Any]) -> None:
        client = self.clients.get(session)
        if client is not None and frames[0] == wire.RESULTS:
            self._post(client, frames)
        elif client is not None and not client.gone:
            self._send(client, frames)

    def _post(self, client: ClientPeer, results: list[Any]) -> None:
        """Send RESULTS, and keep them until the client confirms them, also while it is lost and may come back."""
        if not client.gone:
            client.mail.add(results)
            self._send(client, results)
        elif client.until:
            client.mail.add(results)

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
            self._warn("refused a %s on %.100s with another protocol version, %.20s", kind, body.get("host"), body.get("protocol"))
            return self._refuse(sock, route, f"protocol version {str(body.get('protocol'))[:20]} (yours) is not {wire.VERSION} (ours): "
                                             f"install ipclite {__version__} there")
        for field, wanted in HELLO_FIELDS[kind].items():
            if not isinstance(body.get(field), wanted):
                return self._refuse(sock, route, f"{field} is missing or malformed")
        try:
            {"client": self._hello_client, "engine": self._hello_engine, "agent": self._hello_agent}[kind](sock, route, body)
        except ProtocolError as e:
            self._refuse(sock, route, f"malformed hello: {str(e)[:COMPLAINT_MAX]}")
            raise

    def _welcome(self, peer: Peer, **more: Any) -> None:
        self._peers[peer.sock, peer.route] = peer
        self._send(peer, wire.encode_json(wire.WELCOME, {
            "run_id": self.run_id, "cluster_id": self.options["Application.cluster_id"], "version": __version__, "ping_s": self.ping_s,
            "silence_s": self.silence_s, "max_task_bytes": self.max_task_bytes, "pid": os.getpid(),
            "host": socket.gethostname(), "durable": self._durable, **more}))

    def _hello_client(self, sock: Any, route: bytes, body: dict[str, Any]) -> None:
        try:
            session = bytes.fromhex(body["session"])
        except ValueError:
            session = b""
        client, resume = self.clients.get(session), body.get("resume")
        if len(session) != wire.SESSION_SIZE or client is not None and resume is None:
            return self._refuse(sock, route, "the session is malformed or taken")
        if client is None:
            client = ClientPeer(sock, route, "", session)
        more = self._resume(client, resume) if resume is not None else {}
        self.clients[session] = client
        self._peers.pop((client.sock, client.route), None)
        client.sock, client.route, client.name = sock, route, f"client {body['pid']} on {body['host']}"
        client.gone, client.until, client.told = False, 0.0, 0
        expected = list(self.restore.engines.values()) if self.restore is not None else []
        self._welcome(client, engines=[*[e.info for e in [*self.engines.values(), *self.away.values()]], *expected], **more)
        for frames in client.mail:
            self._send(client, frames)
        self._note_peers()
        self.log.info("%s %s", client.name, "connected" if resume is None else "came back")

    def _hello_engine(self, sock: Any, route: bytes, body: dict[str, Any]) -> None:
        uuid, wanted = body["uuid"], body.get("id") if type(body.get("id")) is int else None
        now, id, holds = time.monotonic(), self._ids.get(uuid), _holds(body)
        left_s, drain_s = _seconds(body, "left_s", math.inf), _seconds(body, "drain_s", 0.0)
        there = self.engines.get(id) or self.away.get(id) if id is not None else None
        if there is not None and there.uuid != uuid:
            id = there = None  # it was taken for gone, and another one has its id
        if there is not None and there.id in self.engines:
            self._miss([there], "it lost its connection", REDIAL_S)
        if there is None and wanted in self.away and self.away[wanted].agent == body["agent"]:
            self._drop_engine(self.away[wanted], "it ended while it could not be reached", "unknown", False)
        if id is None:
            if wanted in self.engines and "mpi" in body:  # a rank wants its number: is who has it still there?
                self._send(self.engines[wanted], [wire.PING])
            free = type(wanted) is int and 0 <= wanted < ENGINE_ID_MAX and wanted not in self.engines and wanted not in self.away
            id = wanted if free else self._next_id
            self._next_id = max(self._next_id, id + 1)
        self._ids[uuid] = id
        if len(self._ids) > len(self.engines) + len(self.away) + DEPARTED_KEPT:
            gone = [u for u, i in self._ids.items() if i not in self.engines and i not in self.away and i != id]
            for old in gone[: DEPARTED_KEPT // 2]:
                del self._ids[old]
        engine = EnginePeer(sock, route, id, body)
        self.engines[id] = engine
        self.away.pop(id, None)
        if engine.agent not in self.agents:
            self._silent_agents.setdefault(engine.agent, now)
        if self.restore is not None:
            self.scheduler.never_started(self.restore.engine_back(uuid, [key for key, _, _ in holds]))
        effects = self.scheduler.handle(EngineUp(id, now + left_s, drain_s, holds), now)
        void = [effect for effect in effects if type(effect) is Void]
        self._welcome(engine, id=id, void=[[key[0].hex(), key[1], attempt] for v in void for key, attempt in v.ids])
        if self.engines.get(id) is not engine:
            return self._carry_out([effect for effect in effects if type(effect) is Fail])  # it did not stay for its welcome
        self.log.info("engine %d connected (pid %s on %s)", id, body.get("pid"), body["host"])
        if there is None:
            self._tell_clients({"joined": [engine.info]})
        self._carry_out([effect for effect in effects if type(effect) is not Void])
        self._note_peers()
        self._maybe_go_on()

    def _hello_agent(self, sock: Any, route: bytes, body: dict[str, Any]) -> None:
        uuid, engines = body["uuid"], _running(body)
        if uuid in self.agents:
            self._peers.pop((self.agents[uuid].sock, self.agents[uuid].route), None)
        self._silent_agents.pop(uuid, None)
        agent = self.agents[uuid] = AgentPeer(sock, route, uuid, body["host"], time.monotonic(), self._ports.is_local(sock))
        agent.engines = engines
        self._welcome(agent)
        for message in self._orders.pop(uuid, ()):
            self._send(agent, message)
        self.log.info("%s connected", agent.name)
        for engine in [e for e in self._engines_of(uuid) if e.uuid not in agent.engines]:
            self._drop_engine(engine, "it ended while its host could not be reached", "unknown", False)

    def _on_pong(self, agent: AgentPeer, frames: list[Any]) -> None:
        agent.seen = time.monotonic()

    def _on_exited(self, agent: AgentPeer, frames: list[Any]) -> None:
        body = wire.decode_dict(frames)
        id = self._ids.get(str(body.get("uuid")))
        agent.engines.pop(str(body.get("uuid")), None)
        engine = self.engines.get(id) or self.away.get(id) if id is not None else None
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
        item = body.get("item", 0)
        if type(item) is not int or item < 0:
            raise ProtocolError("'item' is not a number from 0")
        self._drop_engine(engine, str(body.get("cause")), key, bool(body.get("crashed")), verdict and tuple(verdict),
                          item=item, replaced=bool(body.get("replaced")))

    def _on_agent_bye(self, agent: AgentPeer, frames: list[Any]) -> None:
        self._drop_agent(agent, str(wire.decode_dict(frames).get("reason", "its agent stopped")), in_order=True)

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
            final = peer.local and time.monotonic() - self._slept > REDIAL_S
            self._drop_agent(peer, "its host closed the connection", patience_s=0.0 if final else REDIAL_S)
        elif isinstance(peer, EnginePeer) and (peer.agent in self.agents or not self._ports.is_local(peer.sock)):
            self._miss([peer], "it closed its connection", REDIAL_S)  # if it has ended, its agent says so
        elif isinstance(peer, EnginePeer):
            self._drop_engine(peer, "it closed its connection", "unknown", False)

    def _drop_client(self, client: ClientPeer, how: str) -> None:
        self._peers.pop((client.sock, client.route), None)
        client.gone = True
        client.until = time.monotonic() + COMEBACK_S if how == "lost" else 0.0
        self.desk.left(client.session)
        self._note_peers()
        self.log.info("%s %s; %d of its tasks are unfinished", client.name, how, client.live)
        self._settle(client, 0)

    def _drop_agent(self, agent: AgentPeer, reason: str, in_order: bool = False, patience_s: float = 0.0) -> None:
        """An agent is gone, and its engines with it: at once, or if they are not back in `patience_s`."""
        self._peers.pop((agent.sock, agent.route), None)
        if self.agents.get(agent.uuid) is agent:
            del self.agents[agent.uuid]
            self.log.warning("%s is gone: %s", agent.name, reason)
            if patience_s:
                self._miss(self._engines_of(agent.uuid), reason, patience_s, 0.0 if patience_s > REDIAL_S else MOVE_S)
            else:
                self._drop_engines_of(agent.uuid, reason, in_order)

    def _engines_of(self, agent_uuid: str) -> list[EnginePeer]:
        return [e for e in [*self.engines.values(), *self.away.values()] if e.agent == agent_uuid]

    def _miss(self, engines: list[EnginePeer], reason: str, patience_s: float, move_s: float = math.inf) -> None:
        """Engines can't be reached, and may come back in `patience_s`: they keep what they hold, and clients are not told. After `move_s`
        others get what they can do as well."""
        now = time.monotonic()
        for engine in engines:
            self._peers.pop((engine.sock, engine.route), None)
            self.engines.pop(engine.id, None)
            self.away[engine.id] = engine
            engine.until, engine.move_at = now + patience_s, now + move_s
            engine.why = f"engine {engine.id} on {engine.info['host']} can not be reached: {reason}"
            self.log.warning("engine %d (pid %s on %s) can not be reached: %s", engine.id, engine.info["pid"], engine.info["host"], reason)
        self._carry_out(self.scheduler.handle(Away([(e.id, e.why) for e in engines], not move_s), now))

    def _drop_engines_of(self, agent_uuid: str, reason: str, in_order: bool = False) -> None:
        engines = self._engines_of(agent_uuid)
        for engine in engines if not in_order else ():  # what was on its way may yet arrive, its welcome even
            self._refuse(engine.sock, engine.route, "you were taken for dead")
        gone = [self._strike(e, reason, "unknown", False) for e in engines]
        for engine in engines if not in_order else ():
            gone += self._end_world(engine, reason)
        self._carry_out(self.scheduler.handle(HostDown([event for event in gone if event is not None]), time.monotonic()))

    def _drop_engine(self, engine: EnginePeer, reason: str, running: Any, crashed: bool,
                     verdict: Optional[tuple[str, str]] = None, **more: Any) -> None:
        event = self._strike(engine, reason, running, crashed, verdict)
        if event is not None:
            event = event._replace(**more)
            others = self._end_world(engine, reason) if crashed else []
            self._carry_out(self.scheduler.handle(HostDown([event, *others]) if others else event, time.monotonic()))

    def _end_world(self, engine: EnginePeer, cause: str) -> list[EngineDown]:
        """An MPI world that has lost a rank is of no use any more, and may hang for ever: its other ranks end, too."""
        mpi = engine.info.get("mpi", {"tag": ""})
        known = [*self.engines.values(), *self.away.values()]
        others = [e for e in known if mpi["tag"] and e.info.get("mpi", {"tag": ""})["tag"] == mpi["tag"]]
        self._control(others, {"op": "stop", "grace_s": WORLD_GRACE_S})
        gone = [self._strike(e, f"rank {mpi['rank']} of its MPI world is gone: {cause}", "unknown", False) for e in others]
        return [event for event in gone if event is not None]

    def _strike(self, engine: EnginePeer, reason: str, running: Any, crashed: bool,
                verdict: Optional[tuple[str, str]] = None) -> Optional[EngineDown]:
        """Take an engine off the list, and tell the clients; returns what the scheduler is to hear of it."""
        self._peers.pop((engine.sock, engine.route), None)
        if self.engines.get(engine.id) is not engine and self.away.get(engine.id) is not engine:
            return None
        if self.restore is not None:  # the results that it sent count
            self._deliver_mail(self.restore, engine)
        self.engines.pop(engine.id, None)
        self.away.pop(engine.id, None)
        self._note_peers()
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
            if self._past and (spec.after or spec.follow):
                self._learn(spec)
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
        if tasks and tasks[-1].key[1] >= client.received:
            client.received = tasks[-1].key[1] + 1
            if not self._durable and client.received - client.told > TOLD_TASKS:
                self._tell_saved(client, client.received)

    def _submit(self, client: ClientPeer, tasks: list[Task]) -> None:
        before = len(self.scheduler.tasks)
        if not client.late:
            effects = self.scheduler.handle(Submit(tasks), time.monotonic())
        else:
            effects = [effect for event in self._doubtful(tasks) for effect in self.scheduler.handle(event, time.monotonic())]
        # One that is here already does not count again, one that has failed by now does.
        client.live += len(self.scheduler.tasks) - before + sum([type(effect) is Fail for effect in effects])
        self._carry_out(effects)

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
        batch = Batch(client.session, spec.raw, seqs, payloads, time.time(), function, fan, frame)
        self.db.submitted(batch)
        if self._durable:
            self._ledger.note(batch, client, seqs[-1] + 1)

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
        if client.gone and client.live <= 0 and not client.until:
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
            return self.desk.answer(client, {**body, "what": what}, lambda answer: self._reply(client, {**reply, **answer}))
        query = self._queries.get(what)
        try:
            reply["value"] = query(body) if query else None
            if query is None:
                reply["error"] = f"the controller does not know the query {str(body.get('what'))[:COMPLAINT_MAX]!r}"
        except (KeyError, TypeError, ValueError, OverflowError) as e:
            reply["error"] = f"the query {body['what']!r} is malformed: {type(e).__name__}: {str(e)[:COMPLAINT_MAX]}"
        self._send(client, wire.encode_json(wire.REPLY, reply))

    def _reply(self, client: ClientPeer, reply: dict[str, Any]) -> None:
        if not client.gone:
            self._send(client, wire.encode_query(wire.REPLY, reply))

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

    def _query_gone(self, body: dict[str, Any]) -> Any:
        """A batch system says that a job has ended: so have its engines, whether their agent could tell or not."""
        if not isinstance(body["set"], str) or not body["set"]:
            raise ValueError("'set' is not the name of a set of engines")
        engines = [e for e in [*self.engines.values(), *self.away.values()] if e.info.get("set") == body["set"]]
        self._control(engines, {"op": "stop"})
        for engine in engines:
            self._drop_engine(engine, str(body["reason"])[:REASON_MAX], "unknown", False)

    def _control(self, engines: list[EnginePeer], order: dict[str, Any]) -> None:
        for engine in engines:
            agent, message = self.agents.get(engine.agent), wire.encode_json(wire.CONTROL, {**order, "uuid": engine.uuid})
            if agent is not None:
                self._send(agent, message)
            elif engine.agent in self._silent_agents:  # it is about to come
                self._orders.setdefault(engine.agent, []).append(message)

    # --- what engines send

    def _on_results(self, engine: EnginePeer, frames: list[Any]) -> None:
        if self.restore is not None:
            self.restore.mail.append((self._on_results, engine, frames))
            return
        for session, engine_id, records, section in wire.result_sections(frames):
            if engine_id != engine.id:
                raise ProtocolError("results of another engine")
            engine.received += 1
            effects = self.scheduler.handle(Finished(engine_id, session, records), time.monotonic())
            self._carry_out(effects, (records, section))
        if not self._durable and engine.received - engine.told >= TOLD_SECTIONS:
            self._tell_saved(engine, engine.received)

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
        if self.restore is not None:
            self.restore.mail.append((self._on_returned, engine, frames))
            return
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
            elif type(effect) is Void:
                self._void(effect)
            elif type(effect) is Settled:
                self._on_settled(effect)

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
        if effect.positions is not None or self._gathers:
            results = list(wire.section_results(records, section))
            if effect.positions is not None:
                results = [results[i] for i in effect.positions]
            self._answer(client, effect.engine_id, results)
        else:
            self._post(client, [wire.RESULTS, *section])
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
        noted = Section(effect.session, effect.engine_id, uuid, time.time(), [r[0] for r in records], section)
        self.db.finished(noted)
        if self._durable:
            self._ledger.note(noted, engine, engine.received if engine is not None else 0)
        if self.desk.watchers:
            self.desk.results(effect.session, section)

    def _fail(self, effect: Fail) -> None:
        client = self.clients.get(effect.task.key[0])
        result = self._keep_error(effect.task, effect.ename, effect.message)
        if client is not None:
            self._answer(client, wire.NO_ENGINE, [result])
            self._settle(client, 1)

    def _keep_error(self, task: Task, ename: str, message: str) -> wire.Result:
        """Put the end of a task on record that no engine has brought about; returns it."""
        session, seq = task.key
        payload = wire.encode_error({"ename": ename, "evalue": message, "own": True})
        result = wire.Result(seq, time.time(), 0.0, task.attempt, wire.ERROR, payload)
        self._keep(Accept(wire.NO_ENGINE, session, None), [result], wire.encode_results(session, wire.NO_ENGINE, [result]))
        return result

    def _void(self, effect: Void) -> None:
        """An engine may forget tasks that it said it holds."""
        engine = self.engines.get(effect.engine_id)
        for session in {key[0] for key, _ in effect.ids} if engine is not None else ():
            ids = [(key[1], attempt) for key, attempt in effect.ids if key[0] == session]
            self._send(engine, wire.encode_ids(wire.ABORT, session, ids))  # type: ignore[arg-type]

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
            self._post(client, message)

    def _recall(self, effect: Recall) -> None:
        engines = [self.engines[effect.engine_id]] if effect.engine_id in self.engines else []
        self._control(engines, {"op": "recall", "tasks": [[session.hex(), seq] for session, seq in effect.keys]})


def _running(body: dict[str, Any]) -> dict[str, Optional[wire.TaskKey]]:
    """The engines that an agent says it has, and what each runs."""
    try:
        return {str(uuid): (bytes.fromhex(pair[0]), int(pair[1])) if pair else None for uuid, pair in body.get("engines", {}).items()}
    except (AttributeError, TypeError, ValueError, LookupError, OverflowError) as e:
        raise ProtocolError(f"'engines' is malformed: {e}") from None


def _seconds(body: dict[str, Any], name: str, default: float) -> float:
    """A time in s that an engine may have said."""
    value = body.get(name)
    if value is None:
        return default
    if type(value) not in (int, float) or abs(value) > SECONDS_MAX or value != value:
        raise ProtocolError(f"{name!r} is not a number of seconds")
    return float(value)


def _holds(body: dict[str, Any]) -> list[Held]:
    """What an engine says it holds."""
    try:
        found = [((bytes.fromhex(session), seq), attempt, flag) for session, seq, attempt, flag in body.get("holds", ())]
    except (TypeError, ValueError) as e:
        raise ProtocolError(f"'holds' is malformed: {e}") from None
    for (session, seq), attempt, flag in found:
        if len(session) != wire.SESSION_SIZE or not all(type(n) is int and 0 <= n < end for n, end in (
                (seq, wire.SEQ_END), (attempt, ATTEMPTS_MAX + 1), (flag, 2))):
            raise ProtocolError("'holds' has tasks that are none")
    return found


def serve(argv: list[str]) -> int:
    """Run a controller until it is stopped. Returns the exit code."""
    settings = config.parse("controller", argv)
    log = config.setup_logging("ipcontroller", settings["Application.log_level"], settings.log_file)
    if settings["Application.log_url"]:
        from .logger import forward

        forward(settings, "ipcontroller")
    if settings["Application.work_dir"]:
        config.enter_work_dir(settings["Application.work_dir"])
    config.log_start(log, settings)
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
