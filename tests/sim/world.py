"""A simulated cluster around the scheduler: engines, network and clock in one event queue, all drawn from one seed.

`World(seed).play()` submits tasks, lets engines run, crash, freeze and come back, delays and repeats messages, and
checks after every event that the scheduler's promises hold. It raises AssertionError if one does not.
"""

from __future__ import annotations

import random
from collections import Counter, deque
from heapq import heappop, heappush

from ipclite.queues import POLICIES
from ipclite.scheduler import Scheduler
from ipclite.tasks import (UNKNOWN, Abort, Accept, EngineDown, EngineUp, Fail, Finished, Needs, Recall, Returned, Run,
                           Spec, State, Submit, Task, Tick)
from ipclite.wire import ERROR, OK, UNMET, msg_id

LATENCY_S = (50e-6, 2e-3)
QUIET_S = 120.0  # after the last submission everything must have ended by then
DURATIONS = {
    "tiny": lambda rng: rng.uniform(1e-6, 20e-6),
    "short": lambda rng: rng.uniform(1e-4, 5e-3),
    "mixed": lambda rng: 5.0 if rng.random() < 0.03 else rng.uniform(1e-6, 1e-3),
    "heavy": lambda rng: min(20.0, rng.paretovariate(1.1) * 1e-3),
    "long": lambda rng: rng.uniform(0.5, 3.0),
}


class Engine:
    """Runs what it is sent, one task after the other, and reports in batches, as the real one does."""

    def __init__(self, world: World, id: int):
        self.world = world
        self.id = id
        self.queue: deque = deque()  # (key, attempt)
        self.running = None
        self.results: list = []
        self.alive = True
        self.frozen = False
        self.arrives_at = self.sent_at = 0.0  # messages from it, and tasks to it, keep their order
        self.highest = 0  # order of the newest task bound to this engine

    def receive(self, batch) -> None:
        if self.alive:
            self.queue.extend(batch)
            self.step()

    def step(self) -> None:
        if self.running is None and self.queue and self.alive and not self.frozen:
            self.running = key, attempt = self.queue.popleft()
            truth = self.world.truth[key]
            self.world.starts[key, attempt] += 1
            assert self.world.starts[key, attempt] == 1, "an attempt was run twice"
            self.world.later(truth.duration(attempt), self.finish, self.running)

    def finish(self, what) -> None:
        if not self.alive or self.running != what:
            return
        if self.frozen:
            self.world.later(0.5, self.finish, what)
            return
        key, attempt = what
        truth = self.world.truth[key]
        if truth.poison:
            self.world.crash(self, "its task killed it")
            return
        self.running = None
        status = truth.outcome(self.id, attempt)
        self.results.append((key[0], (key[1], 0.0, truth.duration(attempt), 0, 0, attempt, status)))
        if not self.queue or len(self.results) >= 20:
            self.flush()
        else:
            self.world.later(0.005, self.flush)
        self.step()

    def flush(self) -> None:
        if not self.alive or self.frozen:
            return
        by_session: dict = {}
        for session, record in self.results:
            by_session.setdefault(session, []).append(record)
        self.results = []
        for session, records in by_session.items():
            self.send(Finished(self.id, session, records))
            if self.world.rng.random() < self.world.repeats:
                self.world.later(self.world.rng.uniform(0, 3), self.world.deliver, Finished(self.id, session, records))

    def send(self, event) -> None:
        self.arrives_at = max(self.arrives_at, self.world.now + self.world.latency())
        self.world.at(self.arrives_at, self.world.deliver, event)

    def recall(self, keys) -> None:
        if not self.alive or self.frozen:
            return
        wanted = set(keys)
        for session in sorted({key[0] for key in keys}):
            back = [(k, a) for k, a in self.queue if k in wanted and k[0] == session]
            if back:
                self.queue = deque(entry for entry in self.queue if entry not in back)
                self.send(Returned(self.id, session, [(key[1], attempt) for key, attempt in back]))


class Truth:
    """What a task does when it runs."""

    def __init__(self, rng, kind: str, trouble: bool):
        self.times = [DURATIONS[kind](rng) for _ in range(3)]
        self.poison = trouble and rng.random() < 0.01
        self.fails = rng.choice((0, 0, 0, 0, 1, 2, 99)) if trouble else 0  # so many attempts raise
        self.accepts = rng.choice((1, 1, 1, 1, 2, 99)) if trouble else 1  # divides the ids of engines that take it
        self.order = 0
        self.submitted = 0.0

    def duration(self, attempt: int) -> float:
        return self.times[attempt % 3]

    def outcome(self, engine_id: int, attempt: int) -> int:
        if engine_id % self.accepts:
            return UNMET
        self.fails -= 1
        return ERROR if self.fails >= 0 else OK


class World:
    """One simulated run.

    Args:
        seed: decides everything.
        trouble: False for a run in which nothing goes wrong.
    """

    def __init__(self, seed: int, trouble: bool = True):
        rng = self.rng = random.Random(seed)
        self.trouble = trouble
        self.repeats = rng.choice((0, 0.1, 0.5)) if trouble else 0
        self.kinds = rng.sample(sorted(DURATIONS), rng.randint(1, 3))
        self.options = {"policy": rng.choice(["leastload"] * 5 + sorted(POLICIES)), "rng": random.Random(seed),
                        "hwm": rng.choice((None, None, None, 0, 1, 3)), "crash_limit": rng.choice((0, 1, 1, 3)),
                        "no_engine_s": rng.choice((1.0, 30.0))}
        self.scheduler = Scheduler(**self.options)
        self.now = 1000.0
        self.agenda: list = []
        self.serial = 0
        self.engines: dict[int, Engine] = {}
        self.next_engine = 0
        self.truth: dict = {}
        self.starts: Counter = Counter()
        self.attempts: dict = {}  # key -> (attempt, engine) that the scheduler counts on
        self.crashes: Counter = Counter()  # by key, as the scheduler was told
        self.recalled: set = set()
        self.free: set = set()  # keys whose last attempt is over, as far as the scheduler can know
        self.ended: dict = {}  # how
        self.outcomes: dict = {}  # (success, engine)
        self.aborted: set = set()
        self.events = 0
        self.busy_s = self.wasted_s = 0.0  # engine time spent running; and idle while other tasks had not started

    def latency(self) -> float:
        return self.rng.uniform(*LATENCY_S)

    def at(self, when: float, call, *args) -> None:
        self.serial += 1
        heappush(self.agenda, (when, self.serial, call, args))

    def later(self, delay: float, call, *args) -> None:
        self.at(self.now + delay, call, *args)

    def play(self, tasks: int = 60, engines: int = 0, **constraints) -> None:
        """Run until everything has ended.

        Args:
            tasks: so many are submitted.
            engines: so many are there from the start; 0 = a few, or none.
            constraints: of the specs, where they shall not be drawn.
        """
        rng = self.rng
        for _ in range(engines or rng.randint(0, 5)):
            self.start_engine()
        submitted = 0
        when = self.now
        while submitted < tasks:
            size = min(tasks - submitted, rng.choice((1, 1, 5, 30)))
            self.at(when, self.submit, size, constraints)
            submitted += size
            when += rng.choice((0.0, 1e-3, 0.1, 2.0))
        if self.trouble:
            for _ in range(rng.randint(0, 6)):
                self.at(self.now + rng.uniform(0, when - self.now + 3), self.misfortune)
            if not self.engines and rng.random() < 0.8:
                self.at(self.now + rng.uniform(0, 5), self.start_engine)
        end = when + QUIET_S + 25 * tasks
        while self.agenda or self.scheduler.next_deadline() is not None:
            due = self.scheduler.next_deadline()
            if due is not None and (not self.agenda or due < self.agenda[0][0]):
                self.pass_time(max(self.now, due))
                self.deliver(Tick())
                after = self.scheduler.next_deadline()
                assert after is None or after > self.now, "a deadline that has passed stays"
            else:
                when, _, call, args = heappop(self.agenda)
                self.pass_time(when)
                call(*args)
            assert self.now < end, f"still not ended: {self.scheduler.tasks}"
        self.at_the_end()

    def pass_time(self, when: float) -> None:
        engines = [e for e in self.engines.values() if e.alive]
        busy = sum(e.running is not None for e in engines)
        self.busy_s += busy * (when - self.now)
        if any(e.queue for e in engines) or any(t.state is State.READY for t in self.scheduler.tasks.values()):
            self.wasted_s += (len(engines) - busy) * (when - self.now)
        self.now = when

    # what happens

    def submit(self, size: int, constraints: dict) -> None:
        """Some tasks of one kind, with constraints as they come."""
        rng = self.rng
        kind = rng.choice(self.kinds)
        ids = [*self.engines, self.next_engine + 1] if self.trouble else list(self.engines)
        targets = rng.choice((None, None, (rng.choice(ids),), tuple(rng.sample(ids, min(len(ids), 2)))))
        timeout = rng.choice((None, None, None, 0, 0.1, 5.0)) if self.trouble else None
        drawn = {"targets": targets, "retries": rng.choice((0, 0, 1, 3)), "after": self.needs(), "follow": self.needs(),
                 "timeout": timeout}
        spec = Spec(fn=kind, **{**drawn, **constraints})
        session = rng.choice((b"session1", b"session2"))
        tasks = []
        for _ in range(size):
            key = session, len(self.truth)
            self.truth[key] = Truth(rng, kind, self.trouble)
            self.truth[key].order, self.truth[key].submitted = len(self.truth), self.now
            tasks.append(Task(key, spec, b"payload"))
        self.deliver(Submit(tasks))
        if self.trouble and rng.random() < 0.1:
            victims = [t.key[1] for t in tasks if rng.random() < 0.5] + [10**6]
            self.later(rng.uniform(0, 1), self.abort, session, victims)
        if self.trouble and rng.random() < 0.05:
            self.deliver(Submit([Task(t.key, spec, b"again") for t in tasks if t.key in self.scheduler.tasks]))

    def needs(self):
        """Some earlier tasks to depend on."""
        if not self.trouble or not self.truth or self.rng.random() < 0.8:
            return None
        known = list(self.truth)
        ids = self.rng.sample(known, self.rng.randint(1, min(4, len(known))))
        if self.rng.random() < 0.05:
            ids.append((b"nobody..", 1))
        flags = self.rng.choice(((True, False), (True, True), (False, True)))
        return Needs(tuple(ids), self.rng.random() < 0.5, *flags)

    def abort(self, session: bytes, seqs) -> None:
        self.aborted |= {(session, seq) for seq in seqs}
        self.deliver(Abort(session, seqs))

    def start_engine(self) -> None:
        engine = self.engines[self.next_engine] = Engine(self, self.next_engine)
        self.next_engine += 1
        if not self.trouble or self.rng.random() < 0.7:
            return self.deliver(EngineUp(engine.id))
        stay, drain = self.rng.uniform(0, 30), self.rng.uniform(0, 2)
        self.deliver(EngineUp(engine.id, self.now + stay, drain))
        self.later(stay + self.rng.uniform(0, 3), self.leave, engine)

    def leave(self, engine: Engine) -> None:
        """Its job ends: what it runs and holds is for others."""
        if engine.alive:
            engine.alive = False
            self.later(self.latency(), self.lose, engine, "its job ends", engine.running and engine.running[0], False)
            if self.rng.random() < 0.7:
                self.later(self.rng.uniform(0, 60), self.start_engine)

    def misfortune(self) -> None:
        live = [e for e in self.engines.values() if e.alive and not e.frozen]
        if not live or self.rng.random() < 0.3:
            self.start_engine()
        elif self.rng.random() < 0.6:
            self.crash(self.rng.choice(live), "it was killed")
        else:
            self.freeze(self.rng.choice(live))

    def crash(self, engine: Engine, reason: str) -> None:
        """The engine ends; that is noticed now or later, and with or without knowing what was running."""
        engine.alive = False
        running = engine.running and engine.running[0]
        poison = running is not None and self.truth[running].poison
        if self.rng.random() < 0.2:
            self.later(0, self.lose, engine, reason, UNKNOWN, True)
        else:
            self.later(self.latency(), self.lose, engine, reason, running, poison or self.rng.random() < 0.8)
        if self.rng.random() < 0.7:
            self.later(self.rng.uniform(0, 2), self.start_engine)

    def freeze(self, engine: Engine) -> None:
        """The engine stops for a while. It is given up or not; if it is, it comes back under a new id."""
        engine.frozen = True
        span = self.rng.uniform(0.01, 10)
        if self.rng.random() < 0.5:
            self.later(span / 2, self.lose, engine, "it does not answer", UNKNOWN, self.rng.random() < 0.5)
            self.later(span, self.start_engine)
        self.later(span, self.thaw, engine)

    def thaw(self, engine: Engine) -> None:
        engine.frozen = False
        engine.flush()
        engine.step()

    def lose(self, engine: Engine, reason: str, running, crashed: bool) -> None:
        if self.engines.pop(engine.id, None) is not None:
            state = self.scheduler.engines[engine.id]
            blamed = next(iter(state.outstanding), None) if running == UNKNOWN else running
            if crashed and blamed in state.outstanding:
                self.crashes[blamed] += 1
            self.deliver(EngineDown(engine.id, f"engine {engine.id} is gone: {reason}", running, crashed))

    # between scheduler and engines

    def deliver(self, event) -> None:
        """Hand an event to the scheduler, carry out what it says, and check what it promises."""
        self.events += 1
        self.free |= self.released_by(event)
        effects = self.scheduler.handle(event, self.now)
        self.scheduler.check()
        runs = Counter(e.engine_id for e in effects if type(e) is Run)
        assert all(n == 1 for n in runs.values()), "two messages to one engine"
        for effect in effects:
            if type(effect) is Accept:
                self.on_accept(event, effect)
            elif type(effect) is Fail:
                self.on_fail(effect)
            elif type(effect) is Recall:
                self.on_recall(effect)
        for effect in effects:
            if type(effect) is Run:
                self.on_run(effect)

    def released_by(self, event) -> set:
        """Keys whose attempt is over, as this event tells."""
        if type(event) is EngineDown:
            return {key for key, (_, engine) in self.attempts.items() if engine == event.engine_id}
        if type(event) is Returned:
            return {(event.session, seq) for seq, attempt in event.ids
                    if self.attempts.get((event.session, seq)) == (attempt, event.engine_id)}
        if type(event) is Finished:
            return {(event.session, r[0]) for r in event.records
                    if self.attempts.get((event.session, r[0])) == (r[5], event.engine_id)}
        return set()

    def on_accept(self, event, effect: Accept) -> None:
        records = event.records if effect.positions is None else [event.records[i] for i in effect.positions]
        assert records
        for record in records:
            key = effect.session, record[0]
            assert self.attempts.get(key) == (record[5], effect.engine_id), "a result of an old attempt was accepted"
            self.end(key, "result", (record[6] == OK, effect.engine_id))

    def on_fail(self, effect: Fail) -> None:
        key = effect.task.key
        known = self.attempts.get(key)
        if effect.ename == "TaskAborted":
            assert key in self.aborted
        if effect.ename == "EngineError" and "ended" in effect.message:
            assert self.crashes[key] > self.options["crash_limit"]
        assert known is None or key in self.free, "ended while it may run"
        spec, truth = effect.task.spec, self.truth[key]
        late = spec.timeout is not None and self.now >= truth.submitted + spec.timeout
        if effect.ename in ("TaskTimeout", "DependencyTimeout"):
            assert late and effect.task.attempt == 0
        elif effect.ename == "InvalidDependency":
            assert any(need and (b"nobody..", 1) in need.ids for need in (spec.after, spec.follow))
        elif effect.ename == "ImpossibleDependency":
            assert truth.accepts > 1 or spec.follow or not self.possible(spec.after)
        self.end(key, effect.ename, (False, None))

    def good(self, needs: Needs) -> list:
        """Engines of the tasks among `needs` that ended as they should."""
        return [self.outcomes[key][1] for key in needs.ids
                if key in self.outcomes and (needs.success if self.outcomes[key][0] else needs.failure)]

    def met(self, needs) -> bool:
        return needs is None or len(self.good(needs)) >= (len(needs.ids) if needs.all else 1)

    def possible(self, needs) -> bool:
        open = [key for key in needs.ids if key not in self.outcomes] if needs else []
        return needs is None or len(self.good(needs)) + len(open) >= (len(needs.ids) if needs.all else 1)

    def on_recall(self, effect: Recall) -> None:
        assert effect.keys
        for key in effect.keys:
            attempt, engine = self.attempts[key]
            assert engine == effect.engine_id and (key, attempt) not in self.recalled, "recalled twice"
            self.recalled.add((key, attempt))
        engine = self.engines.get(effect.engine_id)
        if engine is not None:
            self.later(self.latency(), engine.recall, effect.keys)

    def on_run(self, effect: Run) -> None:
        assert effect.tasks
        engine = self.engines[effect.engine_id]
        batch = []
        for task in effect.tasks:
            key = task.key
            known = self.attempts.get(key)
            if known is not None:
                assert key in self.free, "run again while an attempt may be under way"
                assert task.attempt == known[0] + 1
            else:
                assert task.attempt == 1
            assert key not in self.ended
            spec = task.spec
            assert self.met(spec.after) and self.met(spec.follow), "run before what it depends on"
            assert spec.follow is None or engine.id in self.good(spec.follow), "does not follow"
            waited = self.now - self.truth[key].submitted
            assert task.attempt > 1 or spec.timeout is None or waited <= spec.timeout + 1e-9
            self.free.discard(key)
            self.attempts[key] = task.attempt, engine.id
            if task.spec.targets is not None:
                assert engine.id in task.spec.targets
                if len(task.spec.targets) == 1 and task.attempt == 1 and not (spec.after or spec.follow):
                    assert self.truth[key].order > engine.highest, "tasks bound to an engine lost their order"
                    engine.highest = self.truth[key].order
            batch.append((key, task.attempt))
        engine.sent_at = max(engine.sent_at, self.now + self.latency())
        self.at(engine.sent_at, engine.receive, batch)

    def end(self, key, how: str, outcome) -> None:
        assert key not in self.ended, f"{msg_id(key)} ended as {self.ended[key]}, then as {how}"
        self.ended[key] = how
        self.outcomes[key] = outcome

    def at_the_end(self) -> None:
        assert set(self.ended) == set(self.truth), f"never ended: {set(self.truth) - set(self.ended)}"
        assert not self.scheduler.tasks
        assert sum(self.scheduler.ended.values()) == len(self.truth)
        assert self.trouble or set(self.ended.values()) <= {"result"}
