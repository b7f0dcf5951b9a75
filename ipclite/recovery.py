"""What the controller does about connections that break, and about the run of a controller that was killed.

    what the database has written ──► SAVED ──► clients, engines     HELLO of a client that came back ──► what it missed
    Roster, unfinished tasks ──► _carry_on ──► Hold ─── engines, clients come back ───► _go_on ──► Release

A base class of `Controller`, which has the sockets, the peers and the scheduler. See restore.py for who keeps what.

Rule that holds here: nothing is given out before all who may have it have had time to say so.
"""

from __future__ import annotations

import math
import time
from typing import Any, Optional

from . import wire
from .errors import NoRecord, ProtocolError
from .peers import ClientPeer, EnginePeer
from .restore import Ledger, Restore, Roster
from .tasks import EngineUp, Hold, Release, Settled, Spec, Submit, Task

COMEBACK_S = 150.0  # how long clients that were lost, and hosts that we may be cut off from, are waited for


class Recovery:
    """See above. The attributes are those of `Controller` that are used here."""

    options: dict[str, Any]
    log: Any
    db: Any
    scheduler: Any
    run_id: str
    clients: dict[bytes, ClientPeer]
    engines: dict[int, EnginePeer]
    away: dict[int, EnginePeer]
    agents: dict[str, Any]
    restore: Optional[Restore]
    _peers: dict[Any, Any]
    _ids: dict[str, int]
    _next_id: int
    _gathers: dict[Any, Any]
    _ledger: Ledger
    _roster: Optional[Roster]
    _durable: bool
    _past: bool
    _send: Any
    _carry_out: Any
    _tell_clients: Any
    _settle: Any
    _spec: Any
    _keep_error: Any
    _handle: Any

    def _resume(self, client: ClientPeer, body: Any) -> dict[str, Any]:
        """A client came back, and says what it waits for: drop what it has; returns what its WELCOME says of that."""
        fields = {"run": str, "taken": int, "next": int, "pending": list, "done": list}
        if not isinstance(body, dict) or any(type(body.get(name)) is not kind for name, kind in fields.items()):
            raise ProtocolError("'resume' is malformed")
        pending = wire.decode_ranges(body["pending"])
        if body["run"] == self.run_id:
            client.mail.confirm(body["taken"])
        messages = [*client.mail, *[[wire.RESULTS, *gather.sections] for key, gather in self._gathers.items() if key[0] == client.session]]
        coming = {r[0] for frames in messages for session, _, records, _ in wire.result_sections(frames) if session == client.session
                  for r in records}
        waits = {seq for run in pending for seq in run}
        done = {seq for run in wire.decode_ranges(body["done"]) for seq in run} if body["run"] != self.run_id else set()
        tasks = self.scheduler.tasks
        client.late = body["run"] != self.run_id and self.restore is None
        if client.late:
            done = set()  # nobody will tell how they ended, and they are not to be run again
        if self.restore is not None:
            self.restore.settled.update(key for key in tasks
                                        if key[0] == client.session and key[1] < body["next"] and key[1] not in waits)
            self.restore.settled.update((client.session, seq) for seq in done)
        absent = [seq for seq in sorted(waits | done) if (client.session, seq) not in tasks and seq not in coming]
        return {"taken": client.mail.before, "absent": wire.encode_ranges(absent)}

    def _on_resumed(self, client: ClientPeer, frames: list[Any]) -> None:
        """It has sent again what was not here."""
        client.late = False
        if self.restore is not None:
            self.restore.clients.discard(client.session)
            self._maybe_go_on()

    def _doubtful(self, tasks: list[Task]) -> list[Any]:
        """Events that submit tasks which a controller before us may have given out, without anybody who can tell."""
        for task in tasks:
            task.attempt = 1
        return [Hold(), Submit(tasks), Release()]

    def _on_confirm(self, client: ClientPeer, frames: list[Any]) -> None:
        client.mail.confirm(wire.decode_number(frames))

    def _note_peers(self) -> None:
        if self._roster is not None:
            self._roster.changed(time.monotonic(), len(self.engines) + len(self.clients))

    def _on_written(self) -> None:
        """The database has something on disk, or has given up."""
        for peer, number in self._ledger.safe(self.db.collect()).items():
            self._tell_saved(peer, number)
        if self._durable and not self.db.persists:
            self._durable = False
            self._ledger.clear()
            self.log.error("%s", self.db.failed)
            self._tell_clients({"durable": False})
            self._tell_what_came(time.monotonic())

    def _tell_saved(self, peer: Any, number: int) -> None:
        if number > peer.told and self._peers.get((peer.sock, peer.route)) is peer:
            peer.told = number
            self._send(peer, wire.encode_number(wire.SAVED, min(number, wire.SEQ_END - 1)))

    def _tell_what_came(self, now: float) -> None:
        """Without records that last, what has arrived need not be kept by those who sent it. Forget clients that stay away."""
        if not self._durable:
            for peer in [*self.clients.values(), *self.engines.values()]:
                self._tell_saved(peer, peer.received)
        for client in [c for c in self.clients.values() if c.gone and 0.0 < c.until < now]:
            client.until = 0.0
            self._note_peers()
            self._settle(client, 0)

    def _carry_on(self, roster: Roster) -> None:
        """Take over the unfinished tasks of the run before, and wait for those who were there."""
        engines, clients = roster.read()
        now = time.monotonic()
        grace_s = self.options["TaskScheduler.restore_grace"] if engines or clients else 0.0
        self.restore = restore = Restore(engines, clients, now + grace_s)
        self.scheduler.handle(Hold(), now)
        self._past = True
        for uuid, info in engines.items():
            self._ids[uuid] = info["id"]
            self._next_id = max(self._next_id, info["id"] + 1)
        for session in clients:
            self._former_client(session, now)
        count = 0
        tasks: list[Task] = []
        for left in self.db.unfinished():
            client = self._former_client(left.key[0], now)
            client.live += 1
            digest = left.digest.hex()
            if digest and digest not in client.functions:
                function = self.db.function(left.key[0], left.digest)
                if function is not None:
                    client.functions[digest] = function
            spec = self._spec(left.spec)
            self._learn(spec)
            task = Task(left.key, spec, left.payload)
            task.attempt = left.attempt
            if left.engine_uuid:
                restore.placed(left.key, left.engine_uuid)
            tasks.append(task)
            count += 1
        self._carry_out(self.scheduler.handle(Submit(tasks), now))
        self.log.info("carrying on: %d unfinished tasks, %d engines and %d clients to wait for", count, len(engines), len(clients))

    def _former_client(self, session: bytes, now: float) -> ClientPeer:
        client = self.clients.get(session)
        if client is None:
            client = self.clients[session] = ClientPeer(None, b"", f"client {session.hex()} of a former run", session)
            client.gone, client.until = True, now + COMEBACK_S
        return client

    def _learn(self, spec: Spec) -> None:
        """Look up how tasks ended that others depend on, and of which only records know."""
        for needs in (spec.after, spec.follow):
            for key in needs.ids if needs is not None else ():
                if not self.scheduler.knows(key):
                    try:
                        record = self.db.get_record(wire.msg_id(key))
                    except NoRecord:
                        continue  # the scheduler says so
                    if record["completed"] is not None:
                        self.scheduler.learn(key, record["status"] == "ok", record["engine_id"])

    def _maybe_go_on(self) -> None:
        if self.restore is not None and self.restore.over(time.monotonic()):
            self._go_on(self.restore)

    def _deliver_mail(self, restore: Restore, engine: Optional[EnginePeer] = None) -> None:
        """Take in what engines (or one) have sent while the run was waiting."""
        mail, restore.mail = restore.mail, []
        self.restore = None
        for handler, sender, frames in mail:
            if engine in (None, sender):
                self._handle(sender, handler, frames)
            else:
                restore.mail.append((handler, sender, frames))
        self.restore = restore

    def _go_on(self, restore: Restore) -> None:
        """Whoever was to come back is here, or late: give out what is to be done."""
        now = time.monotonic()
        self._deliver_mail(restore)
        self.restore = None
        late = {}
        for uuid, info in restore.engines.items():
            agent = self.agents.get(info["agent"])
            if agent is None or uuid not in agent.engines:
                late[str(info["id"])] = "it did not come back to the restarted controller"
                continue
            engine = EnginePeer(None, b"", info["id"], info)  # busy: user code keeps it from talking to us
            engine.until, engine.move_at, engine.why = math.inf, math.inf, ": it is busy"
            self.away[engine.id] = engine
            running = agent.engines[uuid]
            task = self.scheduler.tasks.get(running) if running is not None else None
            holds = [(task.key, max(1, task.attempt), 0)] if task is not None else []
            self._carry_out(self.scheduler.handle(EngineUp(engine.id, holds=holds, away=True), now))
        if late:
            self._tell_clients({"left": late})
        self.log.info("carrying on%s", f" without the engines {', '.join(late)}" if late else "")
        self._carry_out(self.scheduler.handle(Release(frozenset(restore.settled), bool(late)), now))
        self._note_peers()

    def _on_settled(self, effect: Settled) -> None:
        for task in effect.tasks:
            self._keep_error(task, "NoRecord", "its result reached the client that submitted it, but was not on record when the controller "
                                               "was killed")
            client = self.clients.get(task.key[0])
            if client is not None:
                self._settle(client, 1)
