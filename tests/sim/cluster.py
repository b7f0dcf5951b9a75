"""A whole simulated cluster, drawn from one seed: the real controller among simulated clients, engines, agents, network and disk.

    Client ─┐            ┌─ Host: Agent, Engines        every link is two queues of messages, which keep their order
            ├─ links ── Controller (ours, no sockets)   and can be delayed, cut or lost at any step
            ┘            └─ Store: memory, and what of it is on disk

`Cluster(seed).play()` submits tasks; kills, freezes and restarts the controller, kills engines and clients, cuts links and whole
hosts off; then mends everything, waits for the end, and checks what was promised:

- each future of a living client resolves once, with the right value, or with an error that this run explains;
- a task whose end was on disk is not run again, and without deaths or long silences every task is run once;
- an attempt of 1 is the first to be given out; a task with `retries=0` is run twice only if nobody could know.
"""

from __future__ import annotations

import json
import random
from collections import Counter, deque
from datetime import datetime, timezone
from heapq import heappop, heappush
from types import SimpleNamespace

import ipclite.controller as controller_module
import ipclite.recovery as recovery_module
from ipclite import wire
from ipclite.controller import Controller
from ipclite.db import Unfinished
from ipclite.engine import Unsaved as EngineUnsaved
from ipclite.errors import NoRecord
from ipclite.options import OPTIONS
from ipclite.queries import Desk
from ipclite.records import read_arguments
from ipclite.restore import Roster
from ipclite.unsaved import Unsaved

PING_S = 0.5
LONG_S = 3.0  # a silence that breaks links
END_S = 600.0  # by then everything has ended
LONG_AGO = datetime(2000, 1, 1, tzinfo=timezone.utc)
DEFAULTS = {option.name: option.default for option in OPTIONS}


class Silent:
    """A log that nobody reads."""

    def __getattr__(self, name):
        return lambda *line: None


class Store:
    """Records: `rows` is what the controller sees, `disk` what outlives it. Implements what the controller asks of a `TaskDB`."""

    keeps, waits, wake_fd, failed = True, False, None, ""

    def __init__(self, persists: bool):
        self.persists = persists
        self.disk: dict = {}
        self.reopen()

    def reopen(self) -> None:
        """The controller has been killed."""
        self.rows = {key: dict(row) for key, row in self.disk.items()}
        self._behind: list = []  # (what was handed in, changes of rows)
        self._safe: list = []

    def write(self) -> None:
        """Put all on disk."""
        for item, changes in self._behind:
            for key, change in changes.items():
                self.disk.setdefault(key, {}).update(change)
            if item is not None:
                self._safe.append(item)
        self._behind = []

    def _change(self, item, changes) -> None:
        for key, change in changes.items():
            self.rows.setdefault(key, {}).update(change)
        if self.persists:
            self._behind.append((item, changes))

    def collect(self):
        safe, self._safe = self._safe, []
        return safe

    def submitted(self, batch) -> None:
        payloads = batch.payloads if batch.payloads is not None else list(read_arguments([batch.frame]).values())
        self._change(batch, {(batch.session, seq): {"spec": batch.spec, "payload": payload, "order": seq}
                             for seq, payload in zip(batch.seqs, payloads) if (batch.session, seq) not in self.rows})

    def assigned(self, session, engine_id, engine_uuid, tasks) -> None:
        self._change(None, {(session, seq): {"attempt": attempt, "engine": engine_uuid} for seq, attempt, _ in tasks})

    def finished(self, section) -> None:
        self._change(section, {(section.session, r.seq): {"result": (section.engine_id, r)} for r in section.results()})

    def output(self, session, pieces) -> None:
        pass

    def function(self, session, digest):
        return None

    def unfinished(self):
        for key, row in sorted(self.rows.items(), key=lambda item: (item[0][0], item[1].get("order", 0))):
            if "spec" in row and "result" not in row:
                yield Unfinished(key, row["spec"], row["payload"], row.get("attempt", 0), row.get("engine", ""), b"")

    def get_record(self, msg_id):
        row = self.rows.get(wire.task_key(msg_id))
        if row is None or "result" not in row:
            raise NoRecord(msg_id)
        engine_id, result = row["result"]
        return {"msg_id": msg_id, "completed": LONG_AGO, "started": LONG_AGO,
                "status": "error" if result.status else "ok", "engine_id": engine_id,
                "result_buffers": [result.payload], "attempt": result.attempt}

    def find_records(self, query, keys=None):
        ended = [m for m in query["msg_id"]["$in"] if "result" in self.rows.get(wire.task_key(m), {})]
        return [self.get_record(m) for m in ended]


class Link:
    """A connection: messages of each direction keep their order. `open` is as its owner sees it, `alive` as it is."""

    def __init__(self, world, owner, role: str):
        self.world, self.owner, self.role = world, owner, role
        self.route = b"%d" % world.number()
        self.alive = True
        self.up_at = self.down_at = 0.0

    def send(self, frames) -> None:
        """To the controller."""
        self.up_at = max(self.up_at, self.world.arrival(self.owner))
        self.world.at(self.up_at, self._up, frames)

    def _up(self, frames) -> None:
        if self.alive:
            self.world.to_controller(self, frames)

    def receive(self, frames) -> None:
        """From the controller."""
        self.down_at = max(self.down_at, self.world.arrival(self.owner))
        self.world.at(self.down_at, self._down, frames)

    def _down(self, frames) -> None:
        if self.alive and self.owner.link is self:
            self.owner.on_message(frames)

    def cut(self) -> None:
        """It breaks: what is under way is lost, and its owner learns of it."""
        if self.alive:
            self.alive = False
            self.world.later(self.world.rng.uniform(0, 0.2), self.owner.on_lost, self)


class Dialler:
    """Whoever keeps a link to the controller."""

    link = None
    alive = True
    host = ""

    def dial(self) -> None:
        """Try to get a link; again, if there is none to be had."""
        if not self.alive or self.link is not None:
            return
        if self.world.controller is None or self.world.frozen or self.host in self.world.isolated:
            self.world.later(self.world.rng.uniform(0.1, 0.5), self.dial)
            return
        self.link = Link(self.world, self, self.role)
        self.link.send(wire.encode_json(wire.HELLO, {**self.hello(), "token": "t", "protocol": wire.VERSION, "host": self.host, "pid": 1}))

    def on_lost(self, link) -> None:
        if self.link is link:
            self.link = None
            self.dial()

    def die(self) -> None:
        """Its process ends; the controller is not told."""
        self.alive = False
        if self.link is not None:
            self.link.alive = False
            self.link = None


class Engine(Dialler):
    """Runs what it is sent, one task after the other, as the real one does."""

    role = "engine"

    def __init__(self, host):
        self.agent, self.world, self.host = host, host.world, host.host
        self.uuid = f"e{self.world.number()}"
        self.id = None
        self.queue: deque = deque()
        self.running = None
        self.results: list = []
        self.unsaved = EngineUnsaved()
        self.forgotten: list = []
        self.dial()

    def hello(self):
        sent = self.unsaved.take()
        self.results[:0] = sent
        tasks = [*([self.running] if self.running else ()), *self.queue]
        holds = dict.fromkeys([(session, r.seq, r.attempt) for session, r in self.results])
        holds.update(dict.fromkeys(tasks))
        return {"role": "engine", "uuid": self.uuid, "agent": self.agent.uuid, "id": self.id,
                "holds": [[session.hex(), seq, attempt, 0] for session, seq, attempt in holds]}

    def on_message(self, frames) -> None:
        kind = frames[0]
        if kind == wire.WELCOME:
            body = wire.decode_dict(frames)
            self.id, self.durable = body["id"], body["durable"]
            self.drop({(bytes.fromhex(s), seq): attempt for s, seq, attempt in body["void"]})
            self.flush()
        elif kind == wire.TASKS:
            self.queue.extend((session, seq, attempt) for _, session, tasks in wire.decode_tasks(frames) for seq, attempt, _ in tasks)
        elif kind == wire.SAVED:
            self.unsaved.saved(wire.decode_number(frames))
        elif kind == wire.ABORT:
            session, ids = wire.decode_ids(frames)
            self.drop({(session, seq): attempt for seq, attempt in ids})
        self.step()

    def drop(self, void) -> None:
        self.queue = deque(t for t in self.queue if void.get(t[:2]) != t[2])
        if not self.durable:
            self.results = [(s, r) for s, r in self.results if void.get((s, r.seq)) != r.attempt]

    def step(self) -> None:
        if self.alive and self.running is None and self.queue:
            self.running = session, seq, attempt = self.queue.popleft()
            self.world.on_start((session, seq), attempt, self)
            self.world.later(self.world.durations[session, seq], self.finish, self.running)

    def finish(self, task) -> None:
        if not self.alive or self.running != task:
            return
        session, seq, attempt = task
        self.running = None
        self.results.append((session, wire.Result(seq, 0.0, 0.001, attempt, wire.OK, value((session, seq)))))
        if not self.queue or len(self.results) > 3:
            self.flush()
        self.step()

    def flush(self) -> None:
        if self.link is None or self.id is None:
            return
        results, self.results = self.results, []
        for session in dict.fromkeys(s for s, _ in results):
            mine = [r for s, r in results if s == session]
            frames = wire.encode_results(session, self.id, mine)
            self.unsaved.add(session, mine, frames, self.durable)
            self.link.send([wire.RESULTS, *frames])

    def recall(self, tasks) -> None:
        back = [t for t in self.queue if [t[0].hex(), t[1]] in tasks]
        if back and self.link is not None:
            self.queue = deque(t for t in self.queue if t not in back)
            for session in dict.fromkeys(t[0] for t in back):
                self.link.send(wire.encode_ids(wire.RETURNED, session, [(t[1], t[2]) for t in back if t[0] == session]))

    def crash(self) -> None:
        """The agent sees it end."""
        running = self.running
        self.agent.engines.remove(self)
        self.die()
        self.agent.exited(self.uuid, running and [running[0].hex(), running[1]])


class Agent(Dialler):
    """A host: answers heartbeats for its engines, tells how they end, starts others."""

    role = "engine"

    def __init__(self, world, n: int):
        self.world = world
        self.uuid, self.host = f"a{world.number()}", f"host{world.number()}"
        self.engines: list = []
        self.untold: list = []
        for _ in range(n):
            self.engines.append(Engine(self))
        self.dial()

    def hello(self):
        return {"role": "agent", "uuid": self.uuid,
                "engines": {e.uuid: e.running and [e.running[0].hex(), e.running[1]] for e in self.engines}}

    def on_message(self, frames) -> None:
        if frames[0] == wire.PING:
            self.link.send([wire.PONG])
        elif frames[0] == wire.CONTROL:
            order = wire.decode_dict(frames)
            for engine in self.engines:
                if engine.uuid == order["uuid"] and order["op"] == "recall":
                    engine.recall(order["tasks"])
        elif frames[0] == wire.REFUSED:  # we were taken for dead
            self.link.alive, self.link = False, None
            self.dial()
        elif frames[0] == wire.WELCOME:
            for engine in self.engines:  # may have been, too
                if engine.link is not None:
                    engine.link.alive, engine.link = False, None
                    engine.dial()

    def exited(self, uuid, running) -> None:
        if self.link is not None:
            self.link.send(wire.encode_json(wire.EXITED, {"uuid": uuid, "cause": "crashed", "crashed": True, "running": running}))


class Client(Dialler):
    """Submits, waits, and comes back as the real one does."""

    role = "client"

    def __init__(self, world):
        self.world = world
        self.session = world.rng.getrandbits(64).to_bytes(8, "little")
        self.host = f"desk{world.number()}"
        self.pending: dict = {}
        self.outcomes: dict = {}
        self.unsaved = Unsaved()
        self.outbox: list = []
        self.next = self.sent_up_to = 1
        self.taken = 0
        self.run = ""
        self.durable = False
        self.resuming = True
        self.dial()

    def hello(self):
        self.resuming = True
        if not self.run:
            return {"role": "client", "session": self.session.hex()}
        pending = sorted(n for n in self.pending if n < self.sent_up_to)
        done = sorted(self.unsaved.numbers().difference(pending)) if self.durable else []
        return {"role": "client", "session": self.session.hex(), "resume": {
            "run": self.run, "taken": self.taken, "next": self.sent_up_to, "pending": wire.encode_ranges(pending),
            "done": wire.encode_ranges(done)}}

    def submit(self, n: int, spec: bytes, once: bool) -> None:
        if not self.alive:
            return
        numbers = list(range(self.next, self.next + n))
        self.next += n
        for seq in numbers:
            self.pending[seq] = True
            self.world.on_submit((self.session, seq), once)
        self.outbox.append((numbers, [wire.TASKS, *wire.encode_tasks(spec, self.session, [(seq, 1, b"p") for seq in numbers])]))
        self.flush()

    def flush(self) -> None:
        if self.link is None or self.resuming:
            return
        for numbers, message in self.outbox:
            self.link.send(message)
            self.unsaved.add(numbers[-1] + 1, message)
        self.outbox = []
        self.sent_up_to = self.next

    def on_message(self, frames) -> None:
        kind = frames[0]
        if kind == wire.WELCOME:
            body = wire.decode_dict(frames)
            self.anew, self.run, self.durable = body["run_id"] != self.run, body["run_id"], body["durable"]
            self.taken = body.get("taken", 0)
            if body.get("absent"):
                self.link.send(wire.encode_query(wire.QUERY, {"id": 1, "what": "missed", "runs": body["absent"]}))
            else:
                self.resumed({"unknown": []})
        elif kind == wire.REPLY:
            body = wire.decode_query(frames)
            assert "value" in body, body
            self.resumed(body["value"])
        elif kind == wire.PING:
            self.link.send(wire.encode_number(wire.PONG, self.taken))
        elif kind == wire.SAVED:
            self.unsaved.saved(wire.decode_number(frames))
        elif kind == wire.RESULTS:
            self.taken += 1
            for session, _, records, section in wire.result_sections(frames):
                for result in wire.section_results(records, section):
                    if session == self.session and self.pending.pop(result.seq, None):
                        self.outcomes[result.seq] = result

    def resumed(self, lost) -> None:
        unknown = {n for run in wire.decode_ranges(lost["unknown"]) for n in run}
        for message, numbers in self.unsaved.again(self.session, unknown):
            self.link.send(message)
            unknown.difference_update(numbers)
        for n in unknown:
            if self.pending.pop(n, None):
                self.outcomes[n] = "lost"
        if self.anew:
            self.link.send(wire.encode_json(wire.RESUME, {}))
        self.resuming = False
        self.flush()


class SimulatedRoster(Roster):
    """A roster whose file is an attribute of the world."""

    def __init__(self, world):
        super().__init__(None)
        self.world = world

    def write(self, engines, sessions) -> None:
        self.due = None
        self.world.roster = {e["uuid"]: dict(e) for e in engines}, set(sessions)

    def read(self):
        engines, clients = self.world.roster
        return dict(engines), set(clients)


class Subject(Controller):
    """The controller, without sockets."""

    def __init__(self, world):
        options = {**DEFAULTS, "HeartMonitor.period": int(PING_S * 1000), "IPController.db_class": "NoDB",
                   "IPController.reuse_files": True, "TaskScheduler.no_engine_timeout": 0, "IPController.parent": 0}
        super().__init__(options, Silent())
        self.world, self.links = world, {}
        self.run_id = f"run{world.number()}"
        self.scheduler._rng = random.Random(world.number())
        self.db = world.store
        self.desk = Desk(self.scheduler, self.db, self._send_to, self._submit_again)
        self._tokens = {"client": "t", "engine": "t"}
        self._ports = SimpleNamespace(role_of={"client": "client", "engine": "engine"}, is_local=lambda sock: world.local)
        self._watch = SimpleNamespace(used=set())
        self._durable = self.db.persists
        if self._durable:
            self._roster = SimulatedRoster(world)
            if world.roster is not None:
                self._carry_on(self._roster)

    def _send(self, peer, frames) -> None:
        link = self.links.get(peer.route)
        if link is not None and link.alive and not getattr(link, "shut", False):
            link.receive([bytes(f) if not isinstance(f, bytes) else f for f in frames])
        else:
            self._on_unreachable(peer)


    def _run_on(self, effect) -> None:
        for task in effect.tasks:
            assert "result" not in self.db.rows.get(task.key, {}), f"{task!r} is given out again, and its end is on record"
        super()._run_on(effect)


class Clock:
    """In place of the module `time`."""

    def __init__(self, world):
        self.monotonic = self.time = lambda: world.now


def value(key) -> bytes:
    """What a task returns."""
    return b"value of %d" % key[1]


class Cluster:
    """One simulated run.

    Args:
        seed: decides everything.
        gentle: nobody dies but controllers, and nobody stays away for long.
    """

    def __init__(self, seed: int, gentle: bool = False):
        self.rng = random.Random(seed)
        self.gentle = gentle
        self.durable = gentle or self.rng.random() < 0.7
        self.local = not gentle and self.rng.random() < 0.5  # a local agent whose connection ends has ended
        self.now, self.agenda, self.serial = 1000.0, [], 0
        self.controller = None
        self.frozen = False
        self.waiting: list = []  # what arrives while the controller is frozen
        self.isolated: dict = {}  # hosts that are cut off: until when
        self.store = Store(self.durable)
        self.roster = None
        self.durations: dict = {}
        self.once: set = set()
        self.starts: dict = {}  # key -> [(attempt, engine)]
        self.kills = self.deaths = self.breaks = 0
        self.links: list = []
        self.tick_at = None

    def number(self) -> int:
        self.serial += 1
        return self.serial

    def at(self, when, call, *args) -> None:
        heappush(self.agenda, (when, self.number(), call, args))

    def later(self, delay, call, *args) -> None:
        self.at(self.now + delay, call, *args)

    def arrival(self, owner) -> float:
        """When a message sent now is there. A short silence only delays it."""
        return max(self.now, self.isolated.get(owner.host, 0.0)) + self.rng.uniform(1e-4, 5e-3)

    # the controller

    def start_controller(self) -> None:
        if self.controller is None:
            self.frozen = False
            self.controller = Subject(self)
            self.beat(self.controller)
            self.wake()

    def kill_controller(self) -> None:
        if self.controller is None:
            return
        self.kills += 1
        for link in [*self.controller.links.values(), *[link for link, _ in self.waiting]]:
            link.cut()
        self.controller, self.waiting = None, []
        self.store.reopen()
        self.later(self.rng.choice((0.0, 0.3, 2.0)), self.start_controller)

    def freeze_controller(self) -> None:
        if self.controller is None or self.frozen:
            return
        self.frozen = True
        span = self.rng.uniform(0.1, 8.0)
        frozen = self.controller
        if span > LONG_S:
            for link in list(frozen.links.values()):
                self.later(LONG_S, link.cut)
        self.later(span, self.thaw_controller, frozen, span)

    def thaw_controller(self, frozen, span) -> None:
        if self.controller is not frozen:
            return
        self.frozen = False
        waiting, self.waiting = self.waiting, []
        frozen._sleep(self.now - span, span)
        for link, frames in waiting:
            self.to_controller(link, frames)
        self.wake()

    def to_controller(self, link, frames) -> None:
        if self.controller is None:
            link.cut()
            return
        if self.frozen:
            self.waiting.append((link, frames))
            return
        self.controller.links.setdefault(link.route, link)
        self.controller._on_message(link.role, [link.route, *frames])
        self.wake()

    def beat(self, subject) -> None:
        if subject is self.controller:
            if not self.frozen:
                subject._beat(self.now)
                self.wake()
            self.later(PING_S, self.beat, subject)

    def wake(self) -> None:
        """The controller has handled something."""
        if self.controller is not None:
            self.controller.scheduler.check()
            due = self.controller._next_deadline()
            if due is not None and (self.tick_at is None or due < self.tick_at or self.tick_at < self.now):
                self.tick_at = max(due, self.now)
                self.at(self.tick_at, self.tick)

    def tick(self) -> None:
        self.tick_at = None
        if self.controller is not None and not self.frozen:
            due = self.controller._next_deadline()
            if due is not None and due <= self.now:
                self.controller._on_deadline(self.now)
            self.wake()

    def write(self) -> None:
        """The disk is done with what was handed in; ever again."""
        if self.durable:
            self.store.write()
            if self.controller is not None and not self.frozen:
                self.controller._on_written()
                self.wake()
            self.later(self.rng.choice((0.02, 0.2, 1.0)), self.write)

    # misfortunes

    def cut_link(self) -> None:
        """One connection breaks."""
        owner = self.rng.choice([o for o in self.everybody() if o.link is not None] or [None])
        if owner is not None:
            self.breaks += 1
            owner.link.cut()

    def isolate(self) -> None:
        """A host is cut off."""
        host = self.rng.choice([o.host for o in self.everybody()])
        span = self.rng.uniform(0.01, 1.0) if self.gentle else self.rng.choice((0.1, 1.0, 5.0, 30.0))
        self.isolated[host] = self.now + span
        self.later(span, lambda: self.isolated.pop(host, None) if self.isolated.get(host, 0) <= self.now else None)
        if span > LONG_S:
            self.breaks += 1
            for owner in self.everybody():
                if owner.host == host and owner.link is not None:
                    owner.link.alive = False
                    self.later(self.rng.uniform(LONG_S, span), owner.on_lost, owner.link)

    def kill_engine(self) -> None:
        engines = [e for agent in self.agents for e in agent.engines]
        if engines:
            self.deaths += 1
            victim = self.rng.choice(engines)
            victim.crash()
            self.later(self.rng.uniform(0, 2), lambda: victim.agent.engines.append(Engine(victim.agent)))

    def kill_client(self) -> None:
        if len(self.clients) > 1:
            self.deaths += 1
            self.clients[-1].die()

    def everybody(self):
        return [o for o in [*self.clients, *self.agents, *[e for a in self.agents for e in a.engines]] if o.alive]

    # what tasks see

    def on_submit(self, key, once) -> None:
        self.durations[key] = self.rng.choice((0.001, 0.01, 0.2, 0.7))
        self.starts[key] = []
        if once:
            self.once.add(key)

    def on_start(self, key, attempt, engine) -> None:
        before = self.starts[key]
        # An engine that is cut off may start what it was given first after another one has started a later attempt.
        # And what a controller and an engine knew that died together may not have been on disk.
        told = attempt > 1 or all(a > 1 for a, _ in before) or self.kills and self.deaths
        assert told, f"{wire.msg_id(key)} was started before, and is not told"
        if key in self.once and before:
            assert self.kills, f"{wire.msg_id(key)} is run twice: {before}"
        before.append((attempt, engine.uuid))

    # the run

    def play(self) -> None:
        """Run until all has ended; raises AssertionError if a promise was broken."""
        real = controller_module.time
        controller_module.time = recovery_module.time = Clock(self)
        try:
            self._play()
        finally:
            controller_module.time = recovery_module.time = real

    def _play(self) -> None:
        rng = self.rng
        self.clients: list = []
        self.agents: list = []
        self.start_controller()
        self.agents += [Agent(self, rng.randint(1, 3)) for _ in range(rng.randint(1, 2))]
        self.clients += [Client(self) for _ in range(rng.randint(1, 2))]
        self.write()
        for _ in range(rng.randint(1, 6)):
            once = not self.gentle and rng.random() < 0.3
            spec = json.dumps({"op": "x", "retries": 0, **({"once": True} if once else {})}).encode()
            self.later(rng.uniform(0.01, 2), rng.choice(self.clients).submit, rng.choice((1, 3, 8)), spec, once)
        ways = [self.kill_controller, self.cut_link, self.isolate]
        if not self.durable:
            ways = [self.cut_link, self.isolate, self.freeze_controller, self.freeze_controller]
        if self.gentle:
            ways = [self.kill_controller, self.kill_controller, self.cut_link]
        else:
            ways += [self.kill_engine, self.kill_client, self.freeze_controller]
        for _ in range(rng.randint(1, 6)):
            self.later(rng.uniform(0.02, 4), rng.choice(ways))
        end = self.now + END_S
        while self.now < end and not (self.now > 1004 and not self.isolated and self.settled()):
            when, _, call, args = heappop(self.agenda)
            self.now = max(self.now, when)
            call(*args)
        self.at_the_end()

    def settled(self) -> bool:
        return self.controller is not None and not any(c.pending for c in self.clients if c.alive) and all(
            o.link is not None for o in self.everybody())

    def at_the_end(self) -> None:
        for client in [c for c in self.clients if c.alive]:
            assert not client.pending, f"never ended: {sorted(client.pending)} of {client.session.hex()}"
            for seq in range(1, client.next):
                self.check(client.session, seq, client.outcomes[seq])
        if self.gentle:
            assert all(len(starts) == 1 for starts in self.starts.values()), "a task was run twice, or never"

    def check(self, session, seq, outcome) -> None:
        if outcome == "lost":
            assert not self.durable and self.breaks, f"{seq} was lost"
        elif outcome.status == wire.OK:
            assert outcome.payload == value((session, seq))
        else:
            message = wire.decode_error(outcome.payload)[0]["evalue"]
            ended = Counter(engine for _, engine in self.starts[session, seq])
            known = "retries=0" in message and (session, seq) in self.once and (self.deaths or self.breaks or self.kills)
            known = known or self.deaths and ("no other engine may run the task" in message or "ended" in message and len(ended) > 1)
            assert known, message
