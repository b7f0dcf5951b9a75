"""Decides which engine runs which task. No sockets, no clock, no global random.

    Submit Finished Returned EngineUp Away EngineDown Abort Tick  ──►  handle(event, now)  ──►  Run Accept Fail Recall Void

The controller turns messages into events, carries out the effects that `handle` returns, and sends a `Tick` when
`next_deadline()` has passed. `now` is in s on any clock that never goes back.

    Submit ─► WAITING for other tasks ─► READY in a queue ─► ASSIGNED to an engine ─► DONE
                                           ▲                  │  └─► RECALLED ─► given back, or finished after all
                                           └── lost, failed ──┘                  (FAILED, ABORTED: from anywhere)

Rules that hold here:
- There is one queue per constraint: who may run a task, and who has failed or refused it. An engine takes the oldest
  head among the queues it may take from, so what is pinned to one engine runs there in the order of submission.
- An engine is *open* while its estimated work is below `prefetch_s` (or its tasks are fewer than `hwm`). No task waits
  in a queue that an open engine may take from: `handle` does not return before that is so.
- An engine that is *away* keeps what it holds and is given nothing. What it says it holds when it comes back counts, if
  that is still its own; all else of its tasks it has never started.
- After `Hold`, tasks wait for `Release`; engines that come meanwhile keep those that they hold already.
- An assignment is named by the task's key and its attempt. Anything an engine says about another attempt is void.
- A task that has ended is forgotten at once, but for how and where it ended, which others may depend on: that is kept
  of the last `OUTCOMES` tasks. What happened to a task stays in a ring buffer for a while.
- An event may cost time for each of its tasks, but not for all engines or all tasks; save the end of an engine, and the
  search for work to take back, which is done once per `recall_s`.
"""

from __future__ import annotations

import math
import random
from collections import deque
from heapq import heapify, heappop, heappush
from typing import Any, Callable, Iterable, Optional, Sequence

from .queues import OUTCOMES, POLICIES, EngineState, Outcomes, Queue
from .tasks import (ABORTED, ASSIGNED, ATTEMPTS_MAX, DONE, FAILED, LOST_RESULT, READY, RECALLED, TRANSITIONS, UNKNOWN, WAITING, Abort,
                    Accept, Away, Effect, EngineDown, EngineUp, Fail, Finished, Held, Hold, HostDown, Ids, Outcome, Recall, Release,
                    Returned, Run, Settled, Spec, State, Submit, Tally, Task, Tick, Void, Wait)
from .wire import OK, UNMET, TaskKey, msg_id

CAP = 1024  # an engine holds at most this many tasks, however short they are
FLOOR_S = 5e-6  # what a task costs an engine at least
DECAY = 0.5  # how fast an estimate goes down; it goes up at once
FUNCTIONS = 10_000  # run times of more are not kept
ONCE = "retries=0 forbids to run it twice"
RING = 10_000  # transitions that `story` can tell of


class Scheduler:
    """All tasks and engines of a controller.

    Args:
        prefetch_s: estimated work that is sent to an engine before its results are in.
        hwm: at most so many tasks on an engine; 0 = no limit; None = as `prefetch_s` says.
        recall_s: an engine that finishes nothing for so long gives its unstarted tasks to idle ones.
        crash_limit: how often a task that was running when its engine crashed is tried again.
        no_engine_s: how long tasks wait for a first engine.
        policy: a key of POLICIES.
        rng: what the policies draw from.
    """

    def __init__(self, prefetch_s: float = 0.010, hwm: Optional[int] = None, recall_s: float = 0.020,
                 crash_limit: int = 1, no_engine_s: float = 30.0, policy: str = "leastload",
                 rng: Optional[random.Random] = None):
        if policy not in POLICIES:
            raise ValueError(f"there is no policy {policy!r}; choose one of {', '.join(POLICIES)}")
        self.prefetch_s = prefetch_s
        self.recall_s = recall_s
        self.crash_limit = crash_limit
        self.no_engine_s = no_engine_s
        self._rank, self._choices = POLICIES[policy]
        self._rng = rng or random.Random(0)
        self._limit_s = prefetch_s if hwm is None else math.inf
        self._cap = CAP if hwm is None else hwm or math.inf
        self.tasks: dict[TaskKey, Task] = {}
        self.engines: dict[int, EngineState] = {}
        self.ended = {DONE: 0, FAILED: 0, ABORTED: 0}
        self._any = Queue(None, None)
        self._queues: dict[tuple[Optional[Ids], Optional[Ids]], Queue] = {}  # the others, none of them empty
        self._held: Optional[Wait] = None  # all that comes, between Hold and Release; and what engines hold of what has not come yet
        self._claims: dict[TaskKey, tuple[int, int, int]] = {}  # engine, attempt, flag
        self._too_long: dict[TaskKey, Task] = {}  # READY, but every engine leaves before they would be done
        self._open: dict[EngineState, None] = {}
        self._idle: dict[EngineState, None] = {}  # those without tasks
        self._loaded: dict[EngineState, None] = {}  # those with two or more
        self._heap: list[tuple[float, int, EngineState]] = []  # the open ones, best first, and void entries
        self._estimates: dict[str, float] = {}  # s by function
        self._outcomes = Outcomes()
        self._dependents: dict[TaskKey, dict[Tally, Wait]] = {}  # who waits for the task
        self._ends: deque[tuple[TaskKey, Outcome]] = deque()  # of tasks that others wait for; to be told
        self._timeouts: list[tuple[float, int, TaskKey]] = []  # heap of (when, order, key); may hold assigned ones
        self._ring: deque[tuple[float, TaskKey, State, Optional[int], int, str]] = deque(maxlen=RING)
        self._orders = 0
        self._stamps = 0
        self._turn = 0.0
        self._left_at = -math.inf  # when the last engine went
        self._recall_at: Optional[float] = None
        self._now = 0.0
        self._effects: list[Effect] = []
        self._runs: dict[EngineState, list[Task]] = {}
        self._touched: dict[EngineState, None] = {}  # their load has changed
        self._fed: dict[Queue, None] = {}  # queues that gained tasks

    def handle(self, event: Any, now: float) -> list[Effect]:
        """What to do about an event.

        Args:
            event: one of the classes above.
            now: monotonic time in s.
        """
        self._now = now
        _HANDLERS[type(event)](self, event)
        while True:
            while self._ends:
                self._tell(*self._ends.popleft())
            while self._touched or self._fed:
                self._assign()
            if not self._expire():
                break
        self._take_back()
        effects = self._effects
        for engine, tasks in self._runs.items():
            if tasks:
                effects.append(Run(engine.id, tasks))
        self._effects, self._runs = [], {}
        return effects

    def next_deadline(self) -> Optional[float]:
        """When a Tick is due at the latest, in s; None = nothing depends on time."""
        head = None if self.engines else self._any.head()
        times = [] if head is None else [max(head.submitted, self._left_at) + self.no_engine_s]
        if self._recall_at is not None:
            times.append(self._recall_at)
        if self._timeouts:
            times.append(self._timeouts[0][0])
        return min(times) if times else None

    def queue_status(self, ids: Iterable[int]) -> dict[Any, Any]:
        """How much there is to do: for each engine the unfinished tasks that only it may run (`queue`), the others
        that it holds (`tasks`), and how many it has `completed`; and how many are `unassigned` and not bound to one."""
        status: dict[Any, Any] = {}
        for engine in [self.engines[i] for i in ids if i in self.engines]:
            only = frozenset((engine.id,))
            held = len(engine.outstanding)
            bound = sum(t.allowed == only for t in engine.outstanding.values())
            queued = sum(q.count for q in engine.queues if q.allowed == only)
            status[engine.id] = {"queue": bound + queued, "tasks": held - bound, "completed": engine.done}
        bound = sum(q.count for q in self._queues.values() if q.allowed is not None and len(q.allowed) == 1)
        status["unassigned"] = len(self.tasks) - sum(len(e.outstanding) for e in self.engines.values()) - bound
        return status

    def story(self, key: TaskKey) -> list[str]:
        """What happened to a task, as far as it is remembered."""
        lines = []
        for when, which, state, engine, attempt, note in self._ring:
            if which == key:
                where = "" if engine is None else f", engine {engine}, attempt {attempt}"
                lines.append(f"{when:.6f} {state.value}{where}{': ' + note if note else ''}")
        return lines

    def check(self) -> None:
        """Assert all that must hold between two events. Slow: for tests."""
        seen: dict[TaskKey, State] = {}
        for queue in (self._any, *self._queues.values()):
            tasks = queue.tasks()
            assert queue.count == len(tasks) and (tasks or queue is self._any), "a queue miscounts, or is kept"
            assert all(a.order < b.order for a, b in zip(tasks, tasks[1:])), "a queue holds a task twice"
            for task in tasks:
                assert (task.allowed, task.excluded) == (queue.allowed, queue.barred), f"{task!r} is in a wrong queue"
                assert task.key not in seen and not task.aborted
                seen[task.key] = READY
            if queue is not self._any:
                assert self._queues[queue.allowed, queue.barred] is queue
                assert set(queue.engines) == {e for e in self.engines.values() if queue.admits(e.id)} != set()
                assert all(queue in e.queues for e in queue.engines)
            takers = [e for e in self.engines.values() if e.open and queue.admits(e.id)]
            assert not tasks or not takers, "work is held back"
        for key, task in self._too_long.items():
            assert key not in seen and self.engines
            assert all(e.until < math.inf or e.id in (task.refused or ()) for e in self.engines.values())
            seen[key] = READY
        valid = {e for _, stamp, e in self._heap if e.stamp == stamp}
        for engine in self.engines.values():
            held = len(engine.outstanding)
            assert all(q.count and engine in q.engines for q in engine.queues)
            assert abs(engine.backlog - sum(t.est for t in engine.outstanding.values())) < 1e-6
            here = not engine.away
            assert not here or held <= self._cap and (held or engine.open and not engine.stuck), "flooded, or idle and closed"
            assert engine.open == (engine in self._open) == (engine in valid) and (here or not engine.open)
            assert (engine in self._idle) == (here and not held) and (engine in self._loaded) == (here and held > 1)
            for key, task in engine.outstanding.items():
                assert task.key == key not in seen and task.engine == engine.id and task.attempt > 0
                assert task.allowed is None or engine.id in task.allowed
                seen[key] = task.state
        assert set(self._open) | set(self._idle) | set(self._loaded) <= set(self.engines.values())
        waits = {t.wait for t in self.tasks.values() if t.wait is not None} - {self._held}
        watched = [(key, tally, wait) for key, found in self._dependents.items() for tally, wait in found.items()]
        assert {wait for _, _, wait in watched} == waits and {key for key, _, _ in watched} <= set(self.tasks)
        for wait in waits:
            assert all(t.wait is wait for t in wait.tasks.values())
            verdicts = [t.verdict() for t in wait.tallies]
            assert None in verdicts and False not in verdicts, "tasks wait for nothing"
            for tally in wait.tallies:
                assert tally.left == sum(t is tally for _, t, _ in watched)
            seen.update(dict.fromkeys(wait.tasks, WAITING))
        seen.update(dict.fromkeys(self._held.tasks if self._held else (), WAITING))
        assert seen == {k: t.state for k, t in self.tasks.items()}, "a task is lost, or not where its state says"
        timed = {order for _, order, _ in self._timeouts}
        assert all(t.order in timed for t in self.tasks.values() if t.spec.timeout is not None and not t.attempt)
        assert not self._timeouts or self._unassigned(self._timeouts[0][2]) and self._timeouts[0][0] > self._now
        assert not self._touched and not self._fed and not self._runs and not self._effects

    def _move(self, task: Task, state: State, note: str = "") -> None:
        """The only place where a task changes its state."""
        if state not in TRANSITIONS[task.state]:
            raise RuntimeError(f"{task!r} can not become {state.name}")
        task.state = state
        self._ring.append((self._now, task.key, state, task.engine, task.attempt, note))

    def _fail(self, task: Task, ename: str, message: str) -> None:
        """End a task that is in no queue and on no engine any more."""
        state = ABORTED if ename == "TaskAborted" else FAILED
        self._move(task, state, message)
        self.ended[state] += 1
        del self.tasks[task.key]
        task.payload = b""  # its queue may keep the task until it comes up
        self._outcomes.note(task.key[0], [task.key[1]], False, None)
        if task.key in self._dependents:
            self._ends.append((task.key, (False, None)))
        self._effects.append(Fail(task, ename, message))

    # events

    def _on_submit(self, event: Submit) -> None:
        if self._held is not None:
            return self._withhold(event.tasks, self._held)
        tasks, now = self.tasks, self._now
        spec: Optional[Spec] = None
        queue: Optional[Queue] = None
        wait: Optional[Wait] = None
        for task in event.tasks:
            if task.key in tasks:
                continue  # a client that reconnects may send what is here already
            self._orders += 1
            task.order = self._orders
            task.submitted = now
            tasks[task.key] = task
            if spec is None or task.spec is not spec:
                if wait is not None:
                    self._depend(wait)
                spec = task.spec
                wait = Wait(spec) if spec.after or spec.follow else None
                if wait is None:
                    queue = self._queue(spec.allowed, None)
            if spec.timeout is not None:
                self._limit_waiting(task, spec.timeout)
            if wait is not None:
                task.wait = wait
                wait.tasks[task.key] = task
                continue
            if queue is None:
                self._fail(task, "EngineError", self._unregistered(spec))
                continue
            self._move(task, READY)
            queue.fresh.append(task)
            queue.count += 1
        if wait is not None:
            self._depend(wait)

    def _limit_waiting(self, task: Task, timeout: float) -> None:
        heappush(self._timeouts, (self._now + timeout, task.order, task.key))
        if len(self._timeouts) > 64 + 2 * len(self.tasks):
            self._timeouts = [entry for entry in self._timeouts if self._unassigned(entry[2])]
            heapify(self._timeouts)

    def _unassigned(self, key: TaskKey) -> Optional[Task]:
        """The task, if it has not been assigned yet."""
        task = self.tasks.get(key)
        return None if task is None or task.attempt else task

    def _unregistered(self, spec: Spec) -> str:
        names = ", ".join(map(str, spec.targets or ()))
        which = f"engine {names} is not" if len(spec.targets or ()) == 1 else f"none of the engines {names} is"
        return f"{which} registered; see `ids` of the client for those that are"

    def _on_finished(self, event: Finished) -> None:
        engine_id, session, records = event
        engine = self.engines.get(engine_id)
        if engine is None:
            return
        outstanding, tasks, dependents = engine.outstanding, self.tasks, self._dependents
        good, bad = (True, engine_id), (False, engine_id)
        succeeded: list[int] = []
        counted: list[int] = []
        spec: Optional[Spec] = None
        total, n = 0.0, 0
        for at, record in enumerate(records):
            key = (session, record[0])
            task = outstanding.get(key)
            if task is None or task.attempt != record[5]:
                continue
            del outstanding[key]
            engine.backlog -= task.est
            if task.spec is not spec:
                self._measure(spec, total, n)
                spec, total, n = task.spec, 0.0, 0
            total += record[2]
            n += 1
            if record[6] == OK:
                outcome = good
                succeeded.append(record[0])
            elif self._again(task, record[6]):
                continue
            else:
                outcome = bad
                self._outcomes.note(session, [record[0]], False, engine_id)
            self._move(task, DONE)
            del tasks[key]
            counted.append(at)
            if dependents and key in dependents:
                self._ends.append((key, outcome))
        if not tasks:
            tasks.clear()  # gives back the room of as many tasks as there ever were at a time
        if n:
            self._measure(spec, total, n)
            engine.progress, engine.stuck = self._now, False
            engine.done += len(counted)
            self.ended[DONE] += len(counted)
            if succeeded:
                self._outcomes.note(session, succeeded, True, engine_id)
            self._touched[engine] = None
        if counted:
            everything = len(counted) == len(records)
            self._effects.append(Accept(engine_id, session, None if everything else counted))

    def _measure(self, spec: Optional[Spec], total: float, n: int) -> None:
        if spec is not None:
            recent = total / n
            if not FLOOR_S <= recent < math.inf:
                recent = FLOOR_S
            if len(self._estimates) > FUNCTIONS:
                self._estimates.clear()
            old = self._estimates.get(spec.function)
            self._estimates[spec.function] = recent if old is None or recent > old else old + DECAY * (recent - old)

    def _again(self, task: Task, status: int) -> bool:
        """Whether the result of a task that raised, or that its engine refused, does not count."""
        engine_id = task.engine or 0
        if status != UNMET:
            if task.aborted or task.failures >= task.spec.retries:
                return False
            task.failures += 1
            note = f"failed {task.failures} times of at most {task.spec.retries + 1}"
        else:
            task.refused = (task.refused or frozenset()) | {engine_id}
            note = "refused"
        task.excluded = (task.excluded or frozenset()) | {engine_id}
        if task.aborted:
            self._fail(task, "TaskAborted", "the task was aborted before it started")
        elif self._fits(task):
            self._move(task, READY, note)
            self._place(task)
        else:
            self._fail(task, "ImpossibleDependency", "no engine meets the dependencies of the task")
        return True

    def _on_returned(self, event: Returned) -> None:
        engine = self.engines.get(event.engine_id)
        if engine is None:
            return
        self._touched[engine] = None
        for seq, attempt in event.ids:
            task = engine.outstanding.get((event.session, seq))
            if task is None or task.attempt != attempt:
                continue
            del engine.outstanding[task.key]
            engine.backlog -= task.est
            if task.aborted:
                self._fail(task, "TaskAborted", "the task was aborted before it started")
            else:
                self._move(task, READY, "given back")
                self._place(task)

    def _on_engine_up(self, event: EngineUp) -> None:
        engine = self.engines.get(event.engine_id)
        if engine is None:
            engine = self.engines[event.engine_id] = EngineState(event.engine_id, self._now, event.until, event.drain_s)
            for queue in self._queues.values():
                if queue.admits(engine.id):
                    queue.engines[engine] = None
                    engine.queues[queue] = None
        elif not engine.away:
            raise ValueError(f"engine {event.engine_id} is up already")
        engine.until, engine.drain_s, engine.progress = event.until, event.drain_s, self._now
        engine.away = engine.stuck = False
        if event.holds or engine.outstanding:
            self._compare(engine, event.holds)
        if event.away:
            self._on_away(Away([(engine.id, "")]))
        else:
            self._touched[engine] = None
        self._think_again()

    def _compare(self, engine: EngineState, holds: Sequence[Held]) -> None:
        """An engine that came back says what it holds: see what of that, and of what it was given, is still valid."""
        mine, void, recalled = engine.outstanding, [], []
        kept: dict[TaskKey, Task] = {}
        lost = {key for key, _, flag in holds if flag == LOST_RESULT}
        engine.outstanding = kept
        for key, attempt, flag in holds:
            task = self.tasks.get(key)
            if task is not None and key in mine and task.attempt == attempt and key not in lost:
                kept[key] = task
                if task.state is RECALLED:
                    recalled.append(key)
            elif task is None and self._held is not None:
                self._claims[key] = engine.id, attempt, flag
            elif task is None or task.wait is not self._held or task.wait is None or not self._adopt(engine, task, attempt, flag):
                void.append((key, attempt))
        gone = [task for key, task in mine.items() if key not in kept]
        for task in gone:
            engine.backlog -= task.est
            if task.aborted:
                self._fail(task, "TaskAborted", "the task was aborted before it started")
            elif task.spec.once and task.key in lost:
                self._fail(task, "EngineError", f"the task ran on engine {engine.id}, its result was lost on the way, and {ONCE}")
            else:
                self._move(task, READY, "result lost on the way" if task.key in lost else "never arrived")
                self._place(task)
        if void:
            self._effects.append(Void(engine.id, void))
        if recalled:
            self._effects.append(Recall(engine.id, recalled))

    def _adopt(self, engine: EngineState, task: Task, attempt: int, flag: int) -> bool:
        """An engine holds a task that is withheld; returns whether it may keep it."""
        if flag == LOST_RESULT:
            task.attempt = max(task.attempt, attempt)  # it has run
            return False
        if task.allowed is not None and engine.id not in task.allowed:
            return False
        self._unqueue(task)
        task.wait, task.engine, task.attempt = None, engine.id, attempt
        task.est = self._estimates.get(task.spec.function) or self.prefetch_s
        engine.outstanding[task.key] = task
        engine.backlog += task.est
        self._move(task, ASSIGNED, "held by its engine")
        return True

    def _on_away(self, event: Away) -> None:
        away = [self.engines[i] for i, _ in event.engines if i in self.engines]
        for engine in away:
            engine.away, engine.open, engine.stamp = True, False, -1
            for group in (self._open, self._idle, self._loaded, self._touched):
                group.pop(engine, None)
        if not event.move:
            return
        why = dict(event.engines)
        for engine in away:
            for task in list(engine.outstanding.values()):
                ids = self.engines if task.allowed is None else [i for i in task.allowed if i in self.engines]
                if task.spec.once or all(self.engines[i].away or i in (task.excluded or ()) for i in ids):
                    continue
                del engine.outstanding[task.key]
                engine.backlog -= task.est
                self._lose(task, why[engine.id], False)

    # a former run that is carried on

    def _on_hold(self, event: Hold) -> None:
        self._held = self._held or Wait(Spec())

    def _withhold(self, tasks: Iterable[Task], held: Wait) -> None:
        for task in tasks:
            if task.key in self.tasks:
                continue
            self._orders += 1
            task.order, task.submitted, task.wait = self._orders, self._now, held
            self.tasks[task.key] = held.tasks[task.key] = task
            if task.spec.timeout is not None and not task.attempt:
                self._limit_waiting(task, task.spec.timeout)
            if task.key in self._claims:
                engine_id, attempt, flag = self._claims.pop(task.key)
                engine = self.engines.get(engine_id)
                if engine is not None and not self._adopt(engine, task, attempt, flag):
                    self._effects.append(Void(engine_id, [(task.key, attempt)]))
                elif engine is not None:
                    self._touched[engine] = None

    def never_started(self, keys: Iterable[TaskKey]) -> None:
        """The engine that these withheld tasks were last given to says that it has not got them."""
        for key in keys:
            task = self.tasks.get(key)
            if task is not None and task.spec.once and task.wait is self._held:
                task.attempt = 0

    def _on_release(self, event: Release) -> None:
        if self._held is None:
            return
        tasks, self._held = list(self._held.tasks.values()), None
        claims, self._claims = self._claims, {}
        self._effects += [Void(engine_id, [(key, attempt)]) for key, (engine_id, attempt, _) in claims.items()]
        settled: list[Task] = []
        ready: list[Task] = []
        for task in tasks:
            task.wait = None
            if task.key in event.settled:
                self._move(task, DONE, "its client has the result")
                self.ended[DONE] += 1
                self._outcomes.note(task.key[0], [task.key[1]], True, None)
                del self.tasks[task.key]
                settled.append(task)
            elif task.spec.once and task.attempt:
                self._fail(task, "EngineError", f"the controller was started anew, the task may have run before, and {ONCE}")
            else:
                if event.doubtful:
                    task.attempt = max(task.attempt, 1)
                del self.tasks[task.key]  # to be put in again
                ready.append(task)
        if settled:
            self._effects.append(Settled(settled))
        self._on_submit(Submit(ready))

    def knows(self, key: TaskKey) -> bool:
        """Whether tasks may depend on this one."""
        return key in self.tasks or self._outcomes.get(key) is not None

    def learn(self, key: TaskKey, ok: bool, engine_id: Optional[int]) -> None:
        """How a task ended of which only records know."""
        self._outcomes.note(key[0], [key[1]], ok, engine_id)

    def _on_engine_down(self, event: EngineDown) -> None:
        engine = self.engines.pop(event.engine_id, None)
        if engine is None:
            return
        if not self.engines:
            self._left_at = self._now
        engine.stamp = -1
        for group in (self._open, self._idle, self._loaded, self._touched):
            group.pop(engine, None)
        lost = list(engine.outstanding.values())
        running = lost[0].key if lost and event.running == UNKNOWN else event.running
        stranded: list[Task] = []
        for queue in engine.queues:
            del queue.engines[engine]
            if not queue.engines:
                del self._queues[queue.allowed, queue.barred]
                stranded += queue.tasks()
        why = event.reason
        ran = isinstance(running, tuple) and running in engine.outstanding
        # Results may have been under way, so that only what was behind the running task has surely not been started.
        unseen = event.running == UNKNOWN or not ran and (event.crashed or engine.away)
        for task in lost:
            if task.spec.once and (ran or unseen) and event.verdict is None and not task.aborted:
                self._fail(task, "EngineError", f"{why}; the task may have run, and {ONCE}")
                ran = ran and task.key != running
                continue
            if task.key == running:
                ran = False
                task.crashes += event.crashed
                note = why
                if event.verdict is not None and not task.aborted:
                    self._fail(task, *event.verdict)
                    continue
                if task.crashes > self.crash_limit and event.item:  # the other items of the chunk are innocent
                    before, verdict = task.spec, f"{why}; this item has ended {task.crashes} engines and is not tried again"
                    task.spec = before.without(event.item - 1, verdict)
                    task.crashes = task.crashes if task.spec is before else 0
            else:
                note = why + (" (may have run)" if ran else " (not started)")
            self._lose(task, note, event.crashed and not event.replaced)
        for task in stranded:
            if self._fits(task) or task.allowed is None and not self.engines:
                self._place(task)
            else:
                self._strand(task, why)
        self._think_again()

    def _on_host_down(self, event: HostDown) -> None:
        for engine in event.engines:
            self._on_engine_down(engine)

    def _lose(self, task: Task, why: str, crashed: bool) -> None:
        """The engine of a task is gone."""
        if task.aborted:
            self._fail(task, "TaskAborted", f"the task was aborted; {why}")
        elif task.crashes > self.crash_limit:
            self._fail(task, "EngineError", f"{why}; the task has ended {task.crashes} engines and is not tried again")
        elif self._fits(task) or task.allowed is None and not self.engines and not crashed:
            self._move(task, READY, why)  # in the latter case it waits for an engine to come back
            self._place(task)
        else:
            self._strand(task, why)

    def _strand(self, task: Task, why: str) -> None:
        ename = "ImpossibleDependency" if task.refused else "EngineError"
        self._fail(task, ename, f"{why}; no other engine may run the task")

    def _on_abort(self, event: Abort) -> None:
        recalls: dict[int, list[TaskKey]] = {}
        for seq in event.seqs:
            task = self.tasks.get((event.session, seq))
            if task is None:
                continue
            if task.state in (WAITING, READY):
                self._unqueue(task)
                self._fail(task, "TaskAborted", "the task was aborted before it started")
                continue
            task.aborted = True
            if task.state is ASSIGNED:
                self._move(task, RECALLED, "aborted")
                recalls.setdefault(task.engine or 0, []).append(task.key)
        self._effects += [Recall(engine_id, keys) for engine_id, keys in recalls.items()]

    # queues

    def _queue(self, allowed: Optional[Ids], barred: Optional[Ids]) -> Optional[Queue]:
        """The queue of a constraint, about to gain tasks; None if no engine satisfies it."""
        if allowed is None and barred is None:
            queue = self._any
        else:
            found = self._queues.get((allowed, barred))
            if found is None:
                found = Queue(allowed, barred)
                ids = self.engines if allowed is None else sorted(i for i in allowed if i in self.engines)
                found.engines = {self.engines[i]: None for i in ids if found.admits(i)}
                if not found.engines:
                    return None
                for engine in found.engines:
                    engine.queues[found] = None
                self._queues[allowed, barred] = found
            queue = found
        self._fed[queue] = None
        return queue

    def _fits(self, task: Task) -> bool:
        """Whether some engine may run the task. Forgets who failed it if that rules out every one."""
        allowed, barred, refused = task.allowed, task.excluded, task.refused
        ids = self.engines if allowed is None else [i for i in allowed if i in self.engines]
        if not ids:
            task.excluded = task.refused = None
            return False
        if barred and all(i in barred for i in ids):
            task.excluded = refused
            return not (refused and all(i in refused for i in ids))
        return True

    def _place(self, task: Task) -> None:
        """Put a READY task back into its old place in a queue."""
        queue = self._queue(task.allowed, task.excluded)
        assert queue is not None
        heappush(queue.back, (task.order, task))
        queue.count += 1
        task.engine = None

    def _unqueue(self, task: Task) -> None:
        """A WAITING or READY task is about to end."""
        if task.wait is not None:
            del task.wait.tasks[task.key]
            if not task.wait.tasks:
                self._undepend(task.wait)
            return
        if self._too_long.pop(task.key, None) is not None:
            return
        queue = self._any if task.allowed is task.excluded is None else self._queues[task.allowed, task.excluded]
        queue.forget()
        if not queue.count:
            self._drop(queue)

    def _pass_on(self, task: Task, engine: EngineState) -> None:
        """The engine would have to leave before the task, which is in no queue, is done."""
        task.excluded = (task.excluded or frozenset()) | {engine.id}
        if all(i in task.excluded for i in self.engines):  # then who failed it may try again
            task.excluded = frozenset(e.id for e in self.engines.values() if self._leaves_before(e, task.spec)).union(
                [engine.id], task.refused or ())
        if all(i in task.excluded for i in self.engines):
            self._too_long[task.key] = task
        else:
            self._place(task)

    def _leaves_before(self, engine: EngineState, spec: Spec) -> bool:
        """Would a task, sent to the engine now, be done too late?"""
        return engine.backlog + (self._estimates.get(spec.function) or engine.drain_s) > engine.until - self._now

    def _think_again(self) -> None:
        """Engines have come or gone: see which may run the tasks that took too long for those that were there."""
        tasks, self._too_long = self._too_long, {}
        for task in tasks.values():
            task.excluded = task.refused
            if self._fits(task) or not self.engines:
                self._place(task)
            else:
                self._fail(task, "ImpossibleDependency", "no engine meets the dependencies of the task")

    def _drop(self, queue: Queue) -> None:
        """The queue is empty."""
        if queue is not self._any:
            del self._queues[queue.allowed, queue.barred]
            for engine in queue.engines:
                del engine.queues[queue]

    # dependencies

    def _depend(self, wait: Wait) -> None:
        """Count what is known of the tasks that others wait for, and watch the rest."""
        for tally in wait.tallies:
            for key in tally.needs.ids:
                outcome = None if key in self.tasks else self._outcomes.get(key)
                if outcome is not None:
                    tally.note(outcome)
                elif key in self.tasks and key not in wait.tasks:
                    self._dependents.setdefault(key, {})[tally] = wait
                else:
                    tally.unknown = key
        self._judge(wait)

    def _undepend(self, wait: Wait) -> None:
        for tally in wait.tallies:
            for key in tally.needs.ids:
                watchers = self._dependents.get(key)
                if watchers is not None:
                    watchers.pop(tally, None)
                    if not watchers:
                        del self._dependents[key]

    def _tell(self, key: TaskKey, outcome: Outcome) -> None:
        """A task has ended that others wait for."""
        for tally, wait in self._dependents.pop(key, {}).items():
            tally.note(outcome)
            self._judge(wait)

    def _judge(self, wait: Wait) -> None:
        """Release the tasks of `wait`, or end them, if it is time."""
        verdicts = [tally.verdict() for tally in wait.tallies]
        unknown = [tally.unknown for tally in wait.tallies if tally.unknown]
        if None in verdicts and False not in verdicts and not unknown:
            return
        self._undepend(wait)
        tasks, wait.tasks = wait.tasks, {}
        for task in tasks.values():
            task.wait = None
            if unknown:
                self._fail(task, "InvalidDependency", f"the task depends on {msg_id(unknown[0])}, which the controller "
                                                      f"never saw, or forgot after {OUTCOMES} others")
            elif False in verdicts:
                self._fail(task, "ImpossibleDependency", "tasks that it depends on did not end as it asks for")
            else:
                self._release(task, wait.follow)

    def _release(self, task: Task, follow: Optional[Tally]) -> None:
        """What the task waited for is there."""
        if follow is not None and follow.needs.ids:
            where = frozenset(follow.engines)
            if follow.needs.all and len(where) > 1:
                self._fail(task, "ImpossibleDependency", "the tasks to follow ran on different engines")
                return
            task.allowed = where if task.allowed is None else where & task.allowed
            if not any(i in self.engines for i in task.allowed):
                self._fail(task, "ImpossibleDependency", "the engines where the tasks to follow ran are gone")
                return
        if self._fits(task) or task.allowed is None:
            self._move(task, READY)
            self._place(task)
        else:
            self._fail(task, "EngineError", self._unregistered(task.spec))

    # engines

    def _settle(self, engine: EngineState) -> None:
        """Take note of an engine's new load."""
        if engine.away:
            return
        held = len(engine.outstanding)
        if not held:
            engine.backlog, engine.stuck = 0.0, False
            self._idle[engine] = None
        else:
            self._idle.pop(engine, None)
        if held > 1:
            self._loaded[engine] = None
        else:
            self._loaded.pop(engine, None)
        self._stamps += 1
        engine.stamp = self._stamps
        engine.open = not held or not engine.stuck and held < self._cap and engine.backlog < self._limit_s
        if engine.open:
            self._open[engine] = None
            self._offer(engine)
            if len(self._heap) > 64 + 4 * len(self.engines):
                self._heap = [(e.rank, e.stamp, e) for e in self._open]
                heapify(self._heap)
        else:
            self._open.pop(engine, None)

    def _offer(self, engine: EngineState) -> None:
        engine.rank = self._rank(engine, self._turn, self._rng)
        heappush(self._heap, (engine.rank, engine.stamp, engine))

    def _pick(self) -> Optional[EngineState]:
        """The best of the open engines that have not been picked since they were settled."""
        found: list[EngineState] = []
        while self._heap and len(found) < self._choices:
            rank, stamp, engine = heappop(self._heap)
            if stamp == engine.stamp:
                self._turn = rank
                found.append(engine)
        if len(found) < 2:
            return found[0] if found else None
        best = min(found, key=lambda e: (e.backlog, e.stamp))
        for engine in found:
            if engine is not best:
                self._offer(engine)
        return best

    def _assign(self) -> None:
        """Give out READY tasks until there are none that an open engine may take."""
        touched, fed = self._touched, self._fed
        self._touched, self._fed = {}, {}
        for engine in touched:
            self._settle(engine)
        for queue in fed:
            touched.update(queue.engines)
        hungry = [e for e in touched if e.open and e.queues]
        while hungry:
            shares: dict[Queue, int] = {}
            hungry.sort(key=lambda e: (e.rank, e.stamp))
            for engine in hungry:
                if self._feed(engine, shares):
                    self._settle(engine)
            hungry = [e for e in hungry if e.open and e.queues]
        queue = self._any
        while queue.count:
            shares = {}
            served = []
            while queue.count:
                best = self._pick()
                if best is None:
                    break
                self._feed(best, shares)
                served.append(best)
            if not served:
                break
            for engine in served:
                self._settle(engine)

    def _feed(self, engine: EngineState, shares: dict[Queue, int]) -> bool:
        """Give an engine the oldest tasks it may take, of each queue no more than its share."""
        sources: list[tuple[int, Queue, int]] = []  # order of the head, queue, what may be taken of it
        for queue in (self._any, *engine.queues):
            head = queue.head()
            if head is not None:
                share = shares.get(queue)
                if share is None:
                    n = len(self._open) if queue is self._any else min(len(self._open), len(queue.engines))
                    share = shares[queue] = -(-queue.count // max(1, n))
                sources.append((head.order, queue, share))
        if not engine.outstanding:
            engine.progress = self._now
        self._stamps += 1
        engine.used = self._stamps
        before = len(engine.outstanding)
        while sources:
            sources.sort(key=lambda source: source[0])
            _, queue, share = sources.pop(0)
            taken = self._take(engine, queue, share, sources[0][0] if sources else math.inf)
            if not taken:
                break
            head = queue.head()
            if head is None:
                self._drop(queue)
            elif taken < share:
                sources.append((head.order, queue, share - taken))
        return len(engine.outstanding) > before

    def _take(self, engine: EngineState, queue: Queue, limit: int, before: float) -> int:
        """Assign up to `limit` tasks of a queue that are older than `before`, while the engine is open; returns how many left it."""
        outstanding, backlog = engine.outstanding, engine.backlog
        run = self._runs.get(engine)
        if run is None:
            run = self._runs[engine] = []
        spec: Optional[Spec] = None
        est, taken, held, leaves = 0.0, 0, len(outstanding), engine.until < math.inf
        while taken < limit and (not held or held < self._cap and backlog < self._limit_s):
            task = queue.head()
            if task is None or task.order > before:
                break
            queue.pop(task)
            if task.spec is not spec:
                spec = task.spec
                # A function that was never measured fills the engine, so that its first tasks spread.
                est = self._estimates.get(spec.function) or self.prefetch_s
            if leaves and task.allowed is None:
                engine.backlog = backlog
                if self._leaves_before(engine, task.spec):
                    self._pass_on(task, engine)
                    taken += 1
                    continue
            task.engine, task.est = engine.id, est
            task.attempt = task.attempt % ATTEMPTS_MAX + 1
            self._move(task, ASSIGNED)
            outstanding[task.key] = task
            run.append(task)
            backlog += est
            taken += 1
            held += 1
        engine.backlog = backlog
        return taken

    # time

    def _expire(self) -> bool:
        """End what has waited too long. Returns whether there was any."""
        expired = False
        while self._timeouts:
            when, order, key = self._timeouts[0]
            task = self._unassigned(key)
            if when > self._now and task is not None:
                break
            heappop(self._timeouts)
            if task is not None and task.order == order:
                ename = "TaskTimeout" if task.wait is None else "DependencyTimeout"
                self._unqueue(task)
                self._fail(task, ename, f"the task waited longer than its timeout of {task.spec.timeout:g} s")
                expired = True
        while not self.engines:
            head = self._any.head()
            if head is None or max(head.submitted, self._left_at) + self.no_engine_s > self._now:
                break
            self._any.pop(head)
            self._fail(head, "NoEnginesRegistered",
                       f"no engine has come for {self.no_engine_s:g} s; start some with `ipcluster engines`")
            expired = True
        return expired

    def _take_back(self) -> None:
        """Ask engines that get nowhere for their unstarted tasks when others are idle."""
        if not self._idle or not self._loaded:
            self._recall_at = None
            return
        now = self._now
        if self._recall_at is None:
            self._recall_at = now + self.recall_s
        if now < self._recall_at:
            return
        later = math.inf
        for engine in list(self._loaded):
            due = engine.progress + self.recall_s
            if due > now:
                later = min(later, due)
            if due <= now or engine.backlog > 2 * self.prefetch_s:
                self._recall(engine, due <= now)
        self._recall_at = later if later < math.inf else None

    def _recall(self, engine: EngineState, stuck: bool) -> None:
        """Ask for unstarted tasks of an engine that an idle one may run: all if it is stuck, else the later half.
        When `hwm` lets an engine hold much work it is half as well, lest all of it goes to and fro."""
        held = list(engine.outstanding.values())[1:]
        if not stuck or self._limit_s == math.inf:
            held = held[len(held) // 2 :]
        chosen = [t for t in held if t.state is ASSIGNED and self._movable(t)]
        for task in chosen:
            self._move(task, RECALLED, "wanted elsewhere")
        if stuck:
            engine.stuck = True
            self._settle(engine)
        if chosen:
            self._effects.append(Recall(engine.id, [t.key for t in chosen]))

    def _movable(self, task: Task) -> bool:
        allowed, barred = task.allowed, task.excluded or ()
        if allowed is None:
            return any(engine.id not in barred for engine in self._idle)
        return any(i not in barred and self.engines.get(i) in self._idle for i in allowed)


_HANDLERS: dict[type, Callable[[Scheduler, Any], None]] = {
    Submit: Scheduler._on_submit,
    Finished: Scheduler._on_finished,
    Returned: Scheduler._on_returned,
    EngineUp: Scheduler._on_engine_up,
    EngineDown: Scheduler._on_engine_down,
    HostDown: Scheduler._on_host_down,
    Away: Scheduler._on_away,
    Hold: Scheduler._on_hold,
    Release: Scheduler._on_release,
    Abort: Scheduler._on_abort,
    Tick: lambda scheduler, event: None,
}
