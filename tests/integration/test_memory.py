"""Memory stays flat: what many tasks leave behind, in each process. `bench/memory.py` is the same with a million."""

from __future__ import annotations

import gc

from bench.memory import FIRST, measure, run

LAST = 6 * FIRST
SLACK_MIB = 3.0  # on top of the tenth that a process may grow by: what allocators and page sizes make of it


def test_after_many_tasks_everything_is_where_it_was_after_ten_thousand(start):
    rc = start(2)
    view = rc.load_balanced_view()
    table = measure(view, [FIRST, LAST])
    assert set(table[FIRST]) == set(table[LAST]) and len(table[LAST]) == 1 + 1 + 1 + 2
    for name, (before, _) in table[FIRST].items():
        assert table[LAST][name][0] < 1.1 * before + SLACK_MIB, f"{name} has grown: {table}"
    assert len(rc.history) == LAST and not rc.outstanding and len(rc.results) == 0


def test_a_client_keeps_no_object_per_task(start):
    rc = start(1)
    view = rc.load_balanced_view()
    run(view, 2000)
    gc.collect()
    before = len(gc.get_objects())
    run(view, 4000)
    gc.collect()
    assert len(gc.get_objects()) - before < 200


def test_functions_that_come_and_go_are_forgotten_everywhere(start):
    rc = start(1)
    view = rc.load_balanced_view()
    alive = "len([o for o in __import__('gc').get_objects() if getattr(o, '__qualname__', '') == '<lambda>'])"
    before = rc[0].pull(alive, block=True)
    for i in range(1000):
        assert view.apply_sync(eval(f"lambda: {i}")) == i
    assert len(rc._connection._functions) <= 256
    assert 0 < rc[0].pull(alive, block=True) - before <= 300
