"""What the scheduler keeps: its queues, its view of each engine, and how tasks ended.

    Queue        READY tasks with the same constraint        EngineState  what an engine holds, and how it is ranked
    Outcomes     how the last tasks ended, for those that depend on them

Records with the few methods that keep them whole; whoever decides is in scheduler.py.
"""

from __future__ import annotations

import math
import random
from array import array
from collections import deque
from heapq import heappop
from typing import Callable, Optional

from .tasks import READY, Ids, Outcome, Task
from .wire import TaskKey, slots

OUTCOMES = 100_000  # of so many tasks it is known how they ended
OUTCOME_BLOCK = 8192  # of them are kept together: many small pieces that stay would keep much memory from being given back
ID_MAX = (1 << 31) - 1  # of an engine that takes four bytes there
BLOCK_COST = 16  # what a block takes room for besides


class EngineState:
    """An engine that is there. `outstanding` is in the order sent, so its first task may be running."""

    __slots__ = ("id", "outstanding", "backlog", "progress", "stuck", "open", "rank", "stamp", "used", "queues", "done", "until",
                 "drain_s", "away")

    def __init__(self, engine_id: int, now: float, until: float = math.inf, drain_s: float = 0.0):
        self.id = engine_id
        self.until, self.drain_s = until, drain_s  # as in EngineUp
        self.outstanding: dict[TaskKey, Task] = {}
        self.backlog = 0.0  # estimated s of all outstanding tasks
        self.progress = now  # when it last finished something, or was given work while idle
        self.stuck = False  # its running task takes long: nothing is sent behind it
        self.open = self.away = False
        self.rank = 0.0  # what the policy says; the least is served first
        self.used = 0  # grows when it is given tasks
        self.stamp = 0  # grows when its load changes; an entry of `_heap` with another stamp is void
        self.queues: dict[Queue, None] = {}  # those that name it and are not empty
        self.done = 0


class Queue:
    """READY tasks with the same constraint, oldest first.

    `fresh` holds those that never left, in order; `back` is a heap of those that came back. Tasks that ended in here
    are skipped when they come up: `count` does not include them.
    """

    __slots__ = ("allowed", "barred", "fresh", "back", "count", "engines")

    def __init__(self, allowed: Optional[Ids], barred: Optional[Ids]):
        self.allowed = allowed
        self.barred = barred
        self.fresh: deque[Task] = deque()
        self.back: list[tuple[int, Task]] = []
        self.count = 0
        self.engines: dict[EngineState, None] = {}  # who may take from it; not kept for the queue of any engine

    def admits(self, engine_id: int) -> bool:
        """May this engine take from it?"""
        return (self.allowed is None or engine_id in self.allowed) and (
            self.barred is None or engine_id not in self.barred)

    def head(self) -> Optional[Task]:
        """The oldest task, which stays."""
        fresh, back = self.fresh, self.back
        while fresh and fresh[0].state is not READY:
            fresh.popleft()
        if back:
            while back and back[0][1].state is not READY:
                heappop(back)
            if back and (not fresh or back[0][0] < fresh[0].order):
                return back[0][1]
        return fresh[0] if fresh else None

    def pop(self, task: Task) -> None:
        """Take out `task`, which is what `head` returned."""
        self.count -= 1
        if self.fresh and self.fresh[0] is task:
            self.fresh.popleft()
        else:
            heappop(self.back)

    def forget(self) -> None:
        """One of the tasks in here has ended."""
        self.count -= 1
        if not self.count:
            self.fresh.clear()
            self.back.clear()

    def tasks(self) -> list[Task]:
        """All tasks, oldest first."""
        found = [t for t in self.fresh if t.state is READY] + [t for _, t in self.back if t.state is READY]
        return sorted(found, key=lambda t: t.order)


class Outcomes:
    """How tasks ended: the last `OUTCOMES` of them at least, and at most twice as many; fewer if they are of very many clients.

    There is no object per task, but a number in a block of those of a session: 0 if nothing is known, else 1 if it ran on no
    engine or the engine's id + 2, negative if it failed.
    """

    __slots__ = ("count", "blocks", "new", "old")

    def __init__(self) -> None:
        self.count = self.blocks = 0
        self.new: dict[bytes, dict[int, array[int]]] = {}
        self.old: dict[bytes, dict[int, array[int]]] = {}

    def note(self, session: bytes, seqs: list[int], ok: bool, engine: Optional[int]) -> None:
        """Tasks of a session have ended in the same way."""
        if self.count >= OUTCOMES or self.blocks >= OUTCOMES:
            self.old, self.new, self.count, self.blocks = self.new, {}, 0, 0
        blocks = self.new.setdefault(session, {})
        code = 1 if engine is None else engine + 2
        for number, a, b in slots(seqs, OUTCOME_BLOCK):
            block = blocks.get(number)
            if block is None:
                block = blocks[number] = array("i")
                self.blocks += BLOCK_COST
            if code > ID_MAX and block.typecode == "i":
                block = blocks[number] = array("q", block)
            if len(block) < b:
                block.frombytes(bytes(block.itemsize * (b - len(block))))
            block[a:b] = array(block.typecode, [code if ok else -code]) * (b - a)
        self.count += len(seqs)

    def get(self, key: TaskKey) -> Optional[Outcome]:
        """How a task ended, if it is known."""
        number, i = divmod(key[1], OUTCOME_BLOCK)
        for blocks in (self.new, self.old):
            block = blocks.get(key[0], {}).get(number)
            if block is not None and i < len(block) and block[i]:
                engine = abs(block[i]) - 2
                return block[i] > 0, None if engine < 0 else engine
        return None


Policy = tuple[Callable[[EngineState, float, random.Random], float], int]

# How open engines are ranked, least first, and of how many of the best the least loaded is taken; equals are served in
# turn. The random ones are a race of exponential clocks from `turn`, the rank of the last engine taken: as these have
# no memory, every engine always has the chance that its rate gives it, and none needs to be drawn anew.
POLICIES: dict[str, Policy] = {
    "leastload": (lambda engine, turn, rng: engine.backlog, 1),
    "lru": (lambda engine, turn, rng: engine.used, 1),
    "pure": (lambda engine, turn, rng: engine.used, 1),
    "plainrandom": (lambda engine, turn, rng: turn + rng.expovariate(1), 1),
    "twobin": (lambda engine, turn, rng: turn + rng.expovariate(1), 2),
    "weighted": (lambda engine, turn, rng: turn + rng.expovariate(1 / (1 + len(engine.outstanding))), 2),
}
