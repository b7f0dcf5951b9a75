"""What the scheduler talks about: tasks, what they need, what happens to them.

    Spec, Task, State, Needs      a task, the conditions it came with, how far it has got
    Submit ... Tick               events: what the scheduler is told
    Run ... Settled               effects: what it wants done

Records only: whoever decides is in scheduler.py, whoever sends in controller.py.
"""

from __future__ import annotations

import json
import math
from enum import Enum
from typing import Any, NamedTuple, Optional, Sequence, Tuple, Union

from .errors import ProtocolError
from .wire import Payload, TaskKey, task_key

UNKNOWN = "unknown"  # EngineDown.running when nobody saw which task was running
FOREVER_S = 1e9  # a longer timeout is a mistake
LOST_RESULT = 1  # of a task that an engine held: it has run, but its result is not there any more
ATTEMPTS_MAX = 0xFFFF  # what their two bytes hold; after it they start again, as only recent ones must differ


class State(Enum):
    WAITING = "waiting for other tasks"
    READY = "ready"
    ASSIGNED = "assigned"
    RECALLED = "asked back"
    DONE = "done"
    FAILED = "failed"
    ABORTED = "aborted"

    __hash__ = object.__hash__  # that of Enum is written in Python, and `_move` runs thrice per task


WAITING, READY, ASSIGNED, RECALLED, DONE, FAILED, ABORTED = State

TRANSITIONS: dict[State, frozenset[State]] = {
    WAITING: frozenset((READY, ASSIGNED, DONE, FAILED, ABORTED)),
    READY: frozenset((ASSIGNED, FAILED, ABORTED)),
    ASSIGNED: frozenset((DONE, READY, RECALLED, FAILED)),
    RECALLED: frozenset((DONE, READY, FAILED, ABORTED)),
    DONE: frozenset(),
    FAILED: frozenset(),
    ABORTED: frozenset(),
}

Ids = frozenset[int]
Outcome = tuple[bool, Optional[int]]  # whether a task succeeded, and the engine that ran it


class Needs(NamedTuple):
    """Tasks that must have ended before another may run: `all` of them or one, by `success`, `failure` or either."""

    ids: tuple[TaskKey, ...]
    all: bool = True
    success: bool = True
    failure: bool = False

    @classmethod
    def from_dict(cls, body: Any) -> Optional[Needs]:
        """Check what a client sent; None stays None."""
        if body is None:
            return None
        try:
            flags = {k: body[k] for k in cls._fields[1:] if k in body}
            needs = cls(tuple(dict.fromkeys(map(task_key, body["ids"]))), **flags)
        except (AttributeError, KeyError, TypeError, ValueError) as e:
            raise ProtocolError(f"{body!r} is not a dependency: {e}") from None
        if not all(type(flag) is bool for flag in needs[1:]) or not (needs.success or needs.failure):
            raise ProtocolError(f"{body!r} is not a dependency: it must name success, failure or both")
        return needs


class Spec:
    """What the tasks of a section have in common.

    Attributes:
        targets: ids of the engines that may run them; None = any.
        retries: how often a task that raised is tried again.
        once: whether a task that may have run must not be run again.
        fn: digest of the function, in hex; None if the task needs none.
        function: key under which run times are estimated.
        raw: the JSON it was read from.
        after, follow: tasks that must have ended; `follow` also means on an engine where they ran.
        timeout: s that a task may wait for its first assignment; None = for ever.
    """

    __slots__ = ("targets", "allowed", "retries", "fn", "function", "raw", "after", "follow", "timeout", "once")

    def __init__(self, targets: Optional[tuple[int, ...]] = None, retries: int = 0, fn: Optional[str] = None,
                 op: str = "", raw: bytes = b"", after: Optional[Needs] = None, follow: Optional[Needs] = None,
                 timeout: Optional[float] = None, once: bool = False):
        self.targets = targets
        self.allowed: Optional[Ids] = None if targets is None else frozenset(targets)
        self.retries = retries
        self.fn = fn
        self.function = fn or op
        self.raw = raw
        self.after = after
        self.follow = follow
        self.timeout = timeout
        self.once = once

    @classmethod
    def from_json(cls, raw: bytes) -> Spec:
        """Read a spec; keys that mean nothing to the scheduler are ignored.

        Raises:
            ProtocolError: it is not a spec.
        """
        try:
            body = json.loads(raw)
        except (ValueError, RecursionError) as e:
            raise ProtocolError(f"a spec is not JSON: {e}") from None
        if not isinstance(body, dict):
            raise ProtocolError("a spec is not a JSON object")
        targets, retries = body.get("targets"), body.get("retries", 0)
        if targets is not None and not (isinstance(targets, list) and targets and all(type(t) is int for t in targets)):
            raise ProtocolError(f"targets of a task must be engine ids, not {targets!r}")
        if type(retries) is not int or retries < 0:
            raise ProtocolError(f"retries must be a number from 0, not {retries!r}")
        fn, op = body.get("fn"), body.get("op", "")
        if not isinstance(fn or "", str) or not isinstance(op, str):
            raise ProtocolError(f"the function of a task must be text, not {fn!r} or {op!r}")
        for name in ("timeout", "run_timeout"):
            seconds = body.get(name)
            if seconds is not None and not (type(seconds) in (int, float) and 0 <= seconds < FOREVER_S):
                raise ProtocolError(f"{name} must be a number of seconds from 0, not {seconds!r}")
        return cls(None if targets is None else tuple(targets), retries, fn or None, op, raw,
                   Needs.from_dict(body.get("after")), Needs.from_dict(body.get("follow")), body.get("timeout"),
                   body.get("once") is True)


    def without(self, item: int, why: str) -> Spec:
        """The same for a chunk of a map that is to run without one of its items; itself if it is nothing of the kind."""
        body = json.loads(self.raw)
        if body.get("op") != "map" or str(item) in body.get("skip", {}):
            return self
        body["skip"] = {**body.get("skip", {}), str(item): why}
        raw = json.dumps(body, separators=(",", ":")).encode()
        spec = Spec(self.targets, self.retries, self.fn, "", raw, self.after, self.follow, self.timeout, self.once)
        spec.function = self.function
        return spec


class Task:
    """One task that has not ended. `attempt` is 1 for its first execution."""

    __slots__ = ("key", "spec", "payload", "state", "attempt", "engine", "crashes", "failures", "excluded", "refused",
                 "aborted", "order", "submitted", "est", "allowed", "wait")

    def __init__(self, key: TaskKey, spec: Spec, payload: Payload):
        self.key = key
        self.spec = spec
        self.payload = payload
        self.state = WAITING
        self.attempt = 0
        self.engine: Optional[int] = None
        self.crashes = 0
        self.failures = 0
        self.excluded: Optional[Ids] = None  # engines that failed or refused it
        self.refused: Optional[Ids] = None  # those of them that refused it
        self.allowed = spec.allowed  # engines that may run it; `follow` narrows it
        self.wait: Optional[Wait] = None
        self.aborted = False
        self.order = 0
        self.submitted = 0.0
        self.est = 0.0  # s that its present attempt was expected to take

    def __repr__(self) -> str:
        return f"<Task {self.key[0].hex()}-{self.key[1]} {self.state.name} engine={self.engine} attempt={self.attempt}>"


class Tally:
    """How far the tasks of a dependency have got."""

    __slots__ = ("needs", "left", "good", "bad", "engines", "unknown")

    def __init__(self, needs: Needs):
        self.needs = needs
        self.left = len(needs.ids)
        self.good = self.bad = 0
        self.engines: dict[int, None] = {}  # where the good ones ran
        self.unknown: Optional[TaskKey] = None  # a task that nobody knows

    def note(self, outcome: Outcome) -> None:
        """Count a task that has ended."""
        ok, engine = outcome
        self.left -= 1
        if self.needs.success if ok else self.needs.failure:
            self.good += 1
            if engine is not None:
                self.engines[engine] = None
        else:
            self.bad += 1

    def verdict(self) -> Optional[bool]:
        """True = met, False = can not be met any more, None = wait."""
        if self.needs.all:
            return False if self.bad else None if self.left else True
        return True if self.good or not self.needs.ids else None if self.left else False


class Wait:
    """Tasks submitted together that depend on the same others."""

    __slots__ = ("tasks", "tallies", "follow")

    def __init__(self, spec: Spec):
        self.tasks: dict[TaskKey, Task] = {}
        self.tallies = [Tally(needs) for needs in (spec.after, spec.follow) if needs]
        self.follow = self.tallies[-1] if spec.follow else None


class Submit(NamedTuple):
    tasks: list[Task]


class Finished(NamedTuple):
    """Results of tasks of one client: records as `wire.result_sections` yields them."""

    engine_id: int
    session: bytes
    records: list[tuple[Any, ...]]


class Returned(NamedTuple):
    """An engine gave back tasks that it had not started: (number, attempt) of each."""

    engine_id: int
    session: bytes
    ids: list[tuple[int, int]]


Held = Tuple[TaskKey, int, int]  # task, attempt, and 0 or LOST_RESULT


class EngineUp(NamedTuple):
    """An engine has come, or come back.

    Args:
        until: when it takes no more tasks, as its job ends; tasks that would take longer go elsewhere.
        drain_s: what a task is thought to take of which nobody knows.
        holds: tasks that it had before, or whose results it has, in the order in which it got them. It has started no others.
        away: it can't be reached yet.
    """

    engine_id: int
    until: float = math.inf
    drain_s: float = 0.0
    holds: Sequence[Held] = ()
    away: bool = False


class EngineDown(NamedTuple):
    """An engine is gone.

    Args:
        reason: a sentence that names the engine and the cause.
        running: key of the task that was running; None = no task was; `UNKNOWN` = nobody saw.
        crashed: it did not end on purpose, so the running task may be the cause.
        verdict: what the running task fails with: error class and message.
        item: number + 1 of the item that it was at, of the chunk of a map; 0: nobody knows.
        replaced: a new one will take its place.
    """

    engine_id: int
    reason: str
    running: Union[TaskKey, None, str] = UNKNOWN
    crashed: bool = True
    verdict: Optional[tuple[str, str]] = None
    item: int = 0
    replaced: bool = False


class Away(NamedTuple):
    """Engines can't be reached, and may come back; (id, a sentence that says why) of each. What they hold stays theirs, but for what
    others may run: with `move` that goes to them."""

    engines: list[tuple[int, str]]
    move: bool = False


class HostDown(NamedTuple):
    """All engines of a host are gone at once; no task of one of them goes to another of them."""

    engines: list[EngineDown]


class Abort(NamedTuple):
    session: bytes
    seqs: list[int]


class Hold(NamedTuple):
    """A former run is about to be carried on: nothing is given out before `Release`. Its tasks come with `Submit`, those that were
    given out with the attempt that is known of them."""


class Release(NamedTuple):
    """Who shall carry on has had time to come back: what no engine has claimed goes its way.

    Args:
        settled: tasks whose clients have their results.
        doubtful: an engine that was there is not back, so that tasks may have been started of which that is not known.
    """

    settled: frozenset[TaskKey] = frozenset()
    doubtful: bool = False


class Tick(NamedTuple):
    """Time has passed."""


class Run(NamedTuple):
    engine_id: int
    tasks: list[Task]


class Accept(NamedTuple):
    """The results at these positions of the Finished event count (None: all). The others are void."""

    engine_id: int
    session: bytes
    positions: Optional[list[int]]


class Fail(NamedTuple):
    """The scheduler ended a task: name of a class in errors.py, and a sentence."""

    task: Task
    ename: str
    message: str


class Recall(NamedTuple):
    """Ask an engine to give back these tasks if it has not started them."""

    engine_id: int
    keys: list[TaskKey]


class Void(NamedTuple):
    """What an engine that came back holds of these tasks, (key, attempt), does not count any more."""

    engine_id: int
    ids: list[tuple[TaskKey, int]]


class Settled(NamedTuple):
    """These tasks, whose clients have their results, are not run again."""

    tasks: list[Task]


Effect = Union[Run, Accept, Fail, Recall, Void, Settled]
