"""The scheduler among simulated engines that crash, freeze and repeat themselves, one seed after the other.

SIM_SEED=n plays that seed alone; SIM_RUNS=n plays so many.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections import deque

import pytest
from sim.world import LATENCY_S, World

from ipclite.scheduler import Scheduler
from ipclite.tasks import EngineUp, Finished, Run, Spec, State, Submit, Task
from ipclite.wire import OK

RUNS = int(os.environ.get("SIM_RUNS", "300"))
BATCHES = 10


def seeds(batch: int):
    """The seeds that one test plays."""
    one = os.environ.get("SIM_SEED")
    return [int(one)] if one else range(batch, RUNS, BATCHES)


@pytest.mark.parametrize("batch", range(1 if os.environ.get("SIM_SEED") else BATCHES))
def test_whatever_happens_every_task_ends_once(batch):
    for seed in seeds(batch):
        try:
            World(seed).play()
        except Exception:
            pytest.fail(f"SIM_SEED={seed} fails:\n{traceback.format_exc()}")


@pytest.mark.parametrize("kind", ["mixed", "heavy", "long"])
def test_engines_are_kept_busy(kind):
    """Even when tasks take a thousand times longer than the ones before, others do not idle for long."""
    for seed in range(10):
        world = World(seed, trouble=False)
        world.scheduler = Scheduler()
        world.kinds = [kind]
        world.play(tasks=300, engines=4, targets=None)
        assert world.busy_s > 0.1
        allowed_s = 0.05 * world.busy_s + 300 * LATENCY_S[1]
        assert world.wasted_s < allowed_s, f"seed {seed}: {world.wasted_s} of {world.busy_s} s"


class Unread(dict):
    """A dict that must not be gone through."""

    def _refuse(self):
        raise AssertionError("all engines, or all tasks, were looked at")

    __iter__ = keys = values = items = _refuse


@pytest.mark.parametrize("pinned", [False, True])
@pytest.mark.parametrize("n, took", [(100_000, 1e-5), (10_000, 1.0)])
def test_a_thousand_engines_and_a_hundred_thousand_tasks(pinned, n, took):
    """No event makes the scheduler go through them all. The cost is counted in calls, not seconds."""
    engines, batch = 1000, 200
    scheduler = Scheduler()
    for i in range(engines):
        scheduler.handle(EngineUp(i), 0.0)
    specs = [Spec((i,)) for i in range(engines)] if pinned else [Spec()]
    scheduler.engines, scheduler.tasks = Unread(scheduler.engines), Unread(scheduler.tasks)
    scheduler._idle = Unread(scheduler._idle)
    calls = events = 0

    def count(frame, what, arg):
        nonlocal calls
        calls += what in ("call", "c_call")

    def handle(event, now):
        nonlocal events
        sys.setprofile(count)
        effects = scheduler.handle(event, now)
        sys.setprofile(None)
        events += 1
        sent.extend((e.engine_id, [(t.key[1], 0.0, took, 0, 0, t.attempt, OK) for t in e.tasks])
                    for e in effects if type(e) is Run)

    sent: deque = deque()
    for start in range(0, n, batch):
        tasks = [Task((b"session1", i), specs[i // 10 % len(specs)], b"") for i in range(start, start + batch)]
        handle(Submit(tasks), 1.0)
    now = 1.0
    while sent:
        engine, records = sent.popleft()
        now += took * len(records) / engines
        handle(Finished(engine, b"session1", records), now)
    assert scheduler.ended[State.DONE] == n and not len(scheduler.tasks)
    assert calls / (n + events) < 80, f"{calls / (n + events)} calls per task and event"
