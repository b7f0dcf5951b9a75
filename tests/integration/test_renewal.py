"""New engines in the place of those that crashed, or are worn."""

from __future__ import annotations

import os

import pytest
import tasks
from support import eventually

import ipclite as ipp


def engines(*args):
    """Settings of a cluster whose engines get these arguments."""
    return {"EngineLauncher": {"engine_args": list(args)}}


def test_an_engine_that_crashes_is_replaced(start, tmp_path):
    rc = start(1, config=engines("--restarts=2"))
    old = rc[0].apply_sync(os.getpid)
    view = rc.load_balanced_view()
    again = view.apply_async(tasks.die_at_first, tmp_path / "mark")
    behind = view.apply_async(abs, -1)  # it waits for the new engine, though there is no other
    assert again.get(30) not in (old, None) and behind.get(30) == 1
    assert rc.ids == [0] and rc[0].apply_sync(os.getpid) == again.get()


def test_a_pinned_task_ends_with_its_engine_all_the_same(start):
    rc = start(1, config=engines("--restarts=1"))
    with pytest.raises(ipp.EngineError, match="SIGKILL"):
        rc[0].apply_sync(tasks.die)
    rc.wait_for_engines(1, timeout=20)
    assert rc[0].apply_sync(abs, -1) == 1


def test_engines_that_crash_again_and_again_are_given_up(start):
    rc = start(2, config=engines("--restarts=1"))
    view = rc.load_balanced_view([0])
    for left in ([0, 1], [1]):
        with pytest.raises(ipp.EngineError, match="SIGKILL"):
            rc[0].apply_sync(tasks.die)
        eventually(lambda left=left: rc.ids == left, what=f"the engines {left}")
    with pytest.raises(ipp.EngineError, match="not registered"):
        view.apply_sync(abs, -1)


def test_engines_are_renewed_after_so_many_tasks(start):
    rc = start(2, config=engines("--max-tasks=10"))
    view = rc.load_balanced_view()
    pids = [ar.get(60) for ar in [view.apply_async(os.getpid) for _ in range(100)]]
    assert len(pids) == 100 and max(pids.count(pid) for pid in pids) <= 10
    eventually(lambda: rc.ids == [0, 1])


def test_engines_are_renewed_when_they_hold_too_much(start):
    def keep():
        globals().setdefault("kept", []).append(b"x" * (20 << 20))
        return os.getpid()

    rc = start(1, config=engines("--max-rss=150"))
    view = rc.load_balanced_view()
    pids = [view.apply_sync(keep) for _ in range(16)]
    assert 2 <= len(set(pids)) <= 8
