"""LoadBalancedView: flags, imap, policies and high-water marks."""

from __future__ import annotations

import gc
import itertools
import os
import threading
from collections import Counter
from datetime import timedelta

import numpy as np
import pytest
import tasks
from support import eventually

import ipclite as ipp

# --- flags


@pytest.mark.parametrize("flags, kind", [({"timeout": -1}, ValueError), ({"timeout": float("nan")}, ValueError),
                                         ({"timeout": float("inf")}, ValueError), ({"timeout": "1"}, TypeError),
                                         ({"retries": -1}, ValueError), ({"retries": 1.5}, ValueError), ({"after": 5}, TypeError),
                                         ({"follow": "x"}, ValueError), ({"run_timeout": "1"}, TypeError),
                                         ({"run_timeout": 0}, ValueError), ({"run_timeout": float("nan")}, ValueError),
                                         ({"run_timeout": -1}, ValueError), ({"run_timeout": True}, TypeError),
                                         ({"targets": "some"}, TypeError), ({"targets": 9}, IndexError),
                                         ({"targets": [0, 9]}, IndexError), ({"targets": []}, ValueError)])
def test_wrong_flags_are_told_before_anything_is_sent(rc, balanced, flags, kind):
    before = rc.outstanding
    with pytest.raises(kind):
        balanced.set_flags(**flags).apply(abs, 1)
    assert rc.outstanding == before


@pytest.mark.parametrize("targets, chosen", [(None, None), ("all", None), (0, [0]), (-1, [1]), ([1, 0], [1, 0]), (slice(1), [0]),
                                             (np.int64(1), [1]), (np.array([0, 1]), [0, 1]), (range(2), [0, 1])], ids=str)
def test_targets_may_be_set_at_any_time(rc, balanced, targets, chosen):
    assert rc.load_balanced_view(targets).targets == chosen
    balanced.targets = targets
    assert balanced.targets == balanced.set_flags(targets=targets).targets == chosen
    pids = rc[:].apply_sync(os.getpid)
    assert balanced.apply_sync(os.getpid) in [pids[i] for i in chosen or (0, 1)]
    with balanced.temp_flags(targets=0):
        assert balanced.apply_sync(os.getpid) == pids[0]
    assert balanced.targets == chosen
    assert rc.ids == [0, 1]


def test_times_may_be_timedeltas(balanced):
    with balanced.temp_flags(timeout=timedelta(seconds=20), run_timeout=timedelta(milliseconds=50)):
        with pytest.raises(ipp.TaskTimeout, match="run_timeout of 0.05 s"):
            balanced.apply_sync(tasks.hold, "/nowhere")


def test_targets_that_have_gone_do_not_matter_while_others_are_there(start):
    rc = start(3)
    view = rc.load_balanced_view([0, 1])
    rc.shutdown(0)
    eventually(lambda: rc.ids == [1, 2])
    assert len(view) == 1
    assert view.apply_sync(abs, -1) == 1
    assert view.map_sync(abs, range(-3, 0)) == list(view.imap(abs, range(-3, 0))) == [3, 2, 1]
    rc.shutdown(1)
    eventually(lambda: rc.ids == [2])
    for call in (lambda: view.apply_sync(abs, -1), lambda: view.map_sync(abs, [1]), lambda: list(view.imap(abs, [1]))):
        with pytest.raises(ipp.EngineError, match="registered"):
            call()


def test_an_item_that_kills_its_engine_fails_alone(start):
    def f(x):
        if x in (13, 14):
            tasks.die()
        return -x

    rc = start(6)
    view = rc.load_balanced_view()
    values = view.map_async(f, range(40), chunksize=20).get(60, return_exceptions=True)
    bad = [values.pop(13) for _ in range(2)]
    assert values == [-x for x in range(40) if x not in (13, 14)]
    assert [type(e) for e in bad] == [ipp.EngineError] * 2
    assert all("SIGKILL" in str(e) and "this item has ended 2 engines" in str(e) for e in bad)
    assert len(rc.ids) == 2


def test_a_task_that_must_not_wait(rc, balanced, tmp_path):
    assert balanced.set_flags(timeout=0).apply_sync(abs, -1) == 1
    flag = tmp_path / "flag"
    busy = [rc[i].apply_async(tasks.hold, flag) for i in rc.ids]
    eventually(lambda: all(rc.queue_status()[i]["queue"] for i in rc.ids))
    with pytest.raises(ipp.TaskTimeout, match="timeout of 0 s"):
        balanced.set_flags(targets=[0], timeout=0).apply_sync(tasks.hold, None)
    flag.touch()
    assert [ar.get(30) for ar in busy] == [None, None]


def test_a_timeout_while_waiting_for_other_tasks(balanced, tmp_path):
    flag = tmp_path / "flag"
    first = balanced.apply_async(tasks.hold, flag)
    with balanced.temp_flags(after=first, timeout=0.05):
        second = balanced.apply_async(abs, 1)
    with pytest.raises(ipp.DependencyTimeout):
        second.get(30)
    flag.touch()
    first.get(30)


def test_retries_of_a_map(balanced, tmp_path):
    def fails_once(name):
        if not os.path.exists(name):
            open(name, "w").close()
            raise RuntimeError(name)
        return 1

    names = [str(tmp_path / str(i)) for i in range(10)]
    assert balanced.set_flags(retries=1).map_sync(fails_once, names) == [1] * 10
    names = [str(tmp_path / f"again{i}") for i in range(10)]
    assert list(balanced.imap(fails_once, names)) == [1] * 10


@pytest.mark.parametrize("chunksize", [0, -1, 1.5, "2", True])
def test_a_wrong_chunksize(balanced, chunksize):
    with pytest.raises(ValueError, match="chunksize"):
        balanced.map(abs, [1], chunksize=chunksize)


@pytest.mark.parametrize("options", [{}, {"chunksize": 3}, {"chunksize": 100}, {"ordered": False}])
def test_sequences_of_several_lengths(balanced, options):
    for a, b in ((range(7), range(3)), (range(3), range(7)), ([], range(7))):
        assert sorted(balanced.map_sync(lambda x, y: x + y, a, b, **options)) == [x + y for x, y in zip(a, b)]


# --- imap


@pytest.fixture
def gate(tmp_path):
    return tmp_path / "gate"


def test_engines_work_while_nobody_reads(balanced):
    done = threading.Event()

    def numbers():
        for i in range(30):
            yield i
        done.set()

    results = balanced.imap(abs, numbers(), max_outstanding=8)
    assert done.wait(20), "they wait for the reader"
    assert list(results) == list(range(30))


def test_the_window_and_what_is_ahead_are_bounded(balanced, gate):
    taken = []

    def numbers():
        for i in itertools.count():
            taken.append(i)
            yield i

    held = balanced.imap(tasks.hold, itertools.repeat(gate), numbers(), max_outstanding=3)
    eventually(lambda: len(taken) == 3)
    gate.touch()
    eventually(lambda: len(taken) == 12)  # four times as many, and nobody has read
    assert [next(held) for _ in range(20)] == list(range(20))
    assert len(taken) <= 20 + 12
    held.close()
    assert list(held) == []


def test_no_limit(balanced, gate):
    taken = itertools.count()
    results = balanced.imap(tasks.hold, itertools.repeat(gate, 3000), taken, max_outstanding=0)
    eventually(lambda: results._run._fed)
    gate.touch()
    assert list(results) == list(range(3000))


@pytest.mark.parametrize("ordered", [True, False])
def test_failed_items_do_not_lose_others(balanced, ordered):
    def f(x):
        return 1 // (x % 3)

    results = balanced.imap(f, range(300), ordered=ordered)
    values, errors = [], 0
    while True:
        try:
            values.append(next(results))
        except ZeroDivisionError:
            errors += 1
        except StopIteration:
            break
    assert errors == 100 and Counter(values) == {1: 100, 0: 100}
    kept = list(balanced.imap(f, range(30), ordered=ordered, return_exceptions=True))
    assert sum(isinstance(v, ZeroDivisionError) for v in kept) == 10
    if ordered:
        assert [v for v in kept if not isinstance(v, Exception)] == [1, 0] * 10


def test_items_that_can_not_be_sent_fail_alone(balanced):
    items = [1, (x for x in []), 3]
    values = list(balanced.imap(lambda x: x, itertools.chain(items, range(100)), return_exceptions=True))
    assert isinstance(values[1], ipp.PackError)
    assert [values[0], *values[2:]] == [1, 3, *range(100)]


def test_an_input_that_raises(balanced):
    def numbers():
        yield from range(5)
        raise LookupError("the input")

    results, values = balanced.imap(abs, numbers()), []
    with pytest.raises(LookupError, match="the input"):
        for value in results:
            values.append(value)
    assert values == list(range(5)) and list(results) == []


def test_an_input_that_depends_on_the_output(balanced):
    """No item may be kept back to fill a chunk."""
    import queue

    feed = queue.Queue()
    feed.put(1)
    results = balanced.imap(lambda x: x + 1, iter(feed.get, None))
    for i in range(2, 200):
        assert next(results) == i
        feed.put(i)
    feed.put(None)
    assert list(results) == [200]


def test_cancel_ends_the_input_and_keeps_what_is_under_way(balanced):
    taken = itertools.count()
    results = balanced.imap(abs, taken)
    assert next(results) == 0
    results.cancel()
    rest = list(results)
    assert rest == list(range(1, len(rest) + 1)) and next(taken) <= len(rest) + 2
    results.cancel()
    results.close()


def test_the_repr_of_an_imap(balanced):
    squares = balanced.imap(abs, itertools.count())
    assert next(squares) == 0
    assert repr(squares).startswith("<LazyMapIterator(abs): running, ")
    squares.cancel()
    assert "no more items" in repr(squares)
    squares.close()
    assert "closed" in repr(squares)


def test_an_abandoned_imap_stops(rc, balanced, gate):
    results = balanced.imap(tasks.hold, itertools.repeat(gate))
    eventually(lambda: any(t.name == "imap" for t in threading.enumerate()))
    del results
    gc.collect()
    eventually(lambda: not any(t.name == "imap" for t in threading.enumerate()), what="the end of the feeder")
    gate.touch()
    assert rc.wait(timeout=30)


def test_many_readers(balanced):
    results, read = balanced.imap(lambda x: x, range(5000)), [[] for _ in range(4)]
    threads = [threading.Thread(target=mine.extend, args=(results,)) for mine in read]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(itertools.chain(*read)) == list(range(5000))
    assert all(mine == sorted(mine) for mine in read)


def test_small_items_travel_together(rc, balanced):
    before = rc._connection.next_number
    assert sum(balanced.imap(abs, range(20_000))) == sum(range(20_000))
    assert rc._connection.next_number - before < 5_000
    with balanced.temp_flags(run_timeout=60):
        before = rc._connection.next_number
        assert len(list(balanced.imap(abs, range(100)))) == 100
        assert rc._connection.next_number - before == 100


def test_an_imap_when_the_client_is_closed(rc, gate):
    other = ipp.Client(rc.cluster.connection_file())
    results = other.load_balanced_view().imap(tasks.hold, itertools.repeat(gate, 10))
    eventually(lambda: rc.queue_status()[0]["tasks"])
    other.close()
    with pytest.raises(ipp.ControllerLost):
        next(results)
    gate.touch()


@pytest.mark.parametrize("wrong", [-1, 1.5, "many", True])
def test_a_wrong_window(balanced, wrong):
    with pytest.raises(ValueError, match="max_outstanding"):
        balanced.imap(abs, [1], max_outstanding=wrong)
    with pytest.raises(TypeError, match="sequence"):
        balanced.imap(abs)


# --- policies


def where_one_runs(view):
    ar = view.apply_async(abs, -1)
    ar.get(30)
    return ar.metadata["engine_id"]


@pytest.mark.parametrize("scheme", ["leastload", "lru", "pure", "plainrandom", "twobin", "weighted"])
def test_policies(start, scheme):
    rc = start(3, controller_args=[f"--scheme={scheme}"])
    ran = [where_one_runs(rc.load_balanced_view()) for _ in range(60)]
    counts = Counter(ran)
    in_turn = all(a == b for a, b in zip(ran, ran[3:]))
    if scheme in ("leastload", "lru", "pure"):  # all engines are idle, so the first as well serves them in turn
        assert in_turn and set(counts.values()) == {20}
    else:
        assert not in_turn and min(counts[i] for i in rc.ids) >= 6, counts  # the chance of fewer is below 1e-4
    # Of two that were drawn the last two do not take the one that was busy last.
    assert any(a == b for a, b in zip(ran, ran[1:])) == (scheme == "plainrandom")


def test_a_policy_from_the_configuration(start, ipython_dir):
    profile = ipython_dir / "profile_default"
    profile.mkdir(mode=0o700)
    (profile / "ipcontroller_config.py").write_text("c = get_config()\nc.TaskScheduler.scheme_name = 'lru'\nc.TaskScheduler.hwm = 1\n")
    view = start(3).load_balanced_view()
    ran = [where_one_runs(view) for _ in range(30)]
    assert all(a != b for a, b in zip(ran, ran[1:]))


def test_an_unknown_policy(ipython_dir):
    with pytest.raises(ipp.UserError, match="leastload, lru, plainrandom, twobin, weighted or pure"):
        ipp.Cluster(n=1, controller_args=["--scheme=best"]).start_cluster_sync()


@pytest.mark.parametrize("hwm, held", [(1, {1}), (3, {3})])
def test_high_water_mark(start, gate, hwm, held):
    rc = start(2, controller_args=[f"--hwm={hwm}"])
    ars = [rc.load_balanced_view().apply_async(tasks.hold, gate) for _ in range(20)]
    status = eventually(lambda: (s := rc.queue_status()) and s[0]["tasks"] + s[1]["tasks"] + s["unassigned"] == 20 and s)
    assert {status[i]["tasks"] for i in rc.ids} == held
    gate.touch()
    rc.wait(ars, timeout=30)
