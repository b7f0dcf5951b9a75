"""AsyncResult: a Future, awaitable, iterable as results arrive, with metadata and progress."""

from __future__ import annotations

import asyncio
import concurrent.futures
import os
import threading
from datetime import datetime, timedelta

import pytest
import tasks
from support import eventually

import ipclite as ipp

# --- as a Future


def test_it_is_a_future(balanced):
    ar = balanced.apply_async(abs, -1)
    assert isinstance(ar, concurrent.futures.Future)
    assert (ar.get(30), ar.result(), ar.r, ar.exception()) == (1, 1, 1, None)
    assert ar.done() and ar.ready() and ar.successful() and not ar.running() and not ar.cancelled()


def test_futures_wait_and_as_completed(balanced, tmp_path):
    flag = tmp_path / "flag"
    held = balanced.apply_async(tasks.hold, flag, "held")
    quick = [balanced.apply_async(abs, -i) for i in range(10)]
    done, pending = concurrent.futures.wait([held, *quick], return_when=concurrent.futures.FIRST_COMPLETED, timeout=30)
    assert done and held in pending
    done, pending = concurrent.futures.wait(quick, timeout=30)
    assert len(done) == 10 and not pending
    flag.touch()
    assert [ar.result() for ar in concurrent.futures.as_completed([held], timeout=30)] == ["held"]


def test_wait_until_the_first_exception(balanced, tmp_path):
    flag = tmp_path / "flag"
    held, bad = balanced.apply_async(tasks.hold, flag), balanced.apply_async(lambda: 1 / 0)
    done, pending = concurrent.futures.wait([held, bad], return_when=concurrent.futures.FIRST_EXCEPTION, timeout=30)
    assert (done, pending) == ({bad}, {held})
    flag.touch()
    held.get(30)


def test_callbacks(balanced):
    results, called = [], threading.Event()
    ar = balanced.apply_async(abs, -5)
    ar.add_done_callback(lambda f: (results.append(f.result()), called.set()))
    assert called.wait(30)
    ar.add_done_callback(lambda f: results.append(f is ar))
    assert results == [5, True]


def test_a_callback_may_submit_and_may_fail(balanced):
    second, came = [], threading.Event()

    def callback(f):
        second.append(balanced.apply_async(abs, -f.result()))
        came.set()
        raise RuntimeError("in a callback")

    balanced.apply_async(abs, -7).add_done_callback(callback)
    assert came.wait(30)
    assert second[0].get(30) == 7
    assert balanced.apply_sync(abs, -1) == 1


# --- asyncio


def test_await_gather_and_wrap(balanced):
    async def main():
        assert await balanced.apply_async(abs, -1) == 1
        assert await asyncio.gather(*[balanced.apply_async(abs, -i) for i in range(20)]) == list(range(20))
        assert await asyncio.wrap_future(balanced.apply_async(abs, -2)) == 2
        assert await asyncio.wait_for(balanced.map_async(abs, [-1, -2]), 30) == [1, 2]
        with pytest.raises(ZeroDivisionError):
            await balanced.apply_async(lambda: 1 / 0)

    asyncio.run(main())


def test_awaiting_leaves_the_loop_free(balanced, tmp_path):
    flag = tmp_path / "flag"

    async def main():
        waiting = asyncio.ensure_future(asyncio.wait_for(balanced.apply_async(tasks.hold, flag, "value"), 60))
        await asyncio.sleep(0)
        assert await asyncio.wait_for(balanced.apply_async(abs, -3), 30) == 3
        assert not waiting.done()
        flag.touch()
        assert await waiting == "value"

    asyncio.run(main())


def test_a_timeout_of_asyncio(balanced, tmp_path):
    async def main():
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(balanced.apply_async(tasks.hold, tmp_path / "flag"), 0.05)

    asyncio.run(main())
    (tmp_path / "flag").touch()
    assert balanced.apply_sync(abs, -1) == 1


# --- waiting


def test_timeouts(balanced, tmp_path):
    ar = balanced.apply_async(tasks.hold, tmp_path / "flag", "value")
    with pytest.raises(TimeoutError):
        ar.get(0.05)
    with pytest.raises(ipp.TimeoutError):
        ar.result(timeout=0)
    with pytest.raises(TimeoutError):
        ar.exception(0.01)
    assert ar.wait(0) is False and not ar.ready()
    with pytest.raises(RuntimeError, match="not ended"):
        ar.successful()
    with pytest.raises(ValueError, match="not ended"):
        print(ar.wall_time)
    (tmp_path / "flag").touch()
    assert ar.wait(-1) is True
    assert ar.get(0) == "value"


def test_a_timeout_error_of_the_task_is_its_result(balanced):
    def f():
        raise TimeoutError("of the task")

    ar = balanced.apply_async(f)
    ar.wait(30)
    with pytest.raises(TimeoutError, match="of the task"):
        ar.get(30)
    assert isinstance(ar.exception(30), TimeoutError)
    assert not ar.successful()


def test_waiting_for_several(rc, balanced, tmp_path):
    ars = [balanced.apply_async(tasks.hold, tmp_path / "flag", i) for i in range(3)]
    assert rc.wait(ars, timeout=0.05) is False
    assert rc.wait(timeout=0) is False
    (tmp_path / "flag").touch()
    assert balanced.wait(ars, timeout=30) is True
    assert rc.wait(timeout=30) is True
    assert rc.outstanding == set()


# --- iteration


@pytest.mark.parametrize("ordered", [True, False])
def test_iteration_gives_results_as_they_arrive(balanced, tmp_path, ordered):
    flag = tmp_path / "flag"
    flags = [None, None, flag] if ordered else [flag, None, None]
    ar = balanced.map_async(tasks.hold, flags, "abc", chunksize=1, ordered=ordered)
    values = iter(ar)
    first = [next(values), next(values)]
    assert sorted(first) == (["a", "b"] if ordered else ["b", "c"])
    assert not ar.done() and ar.progress == 2
    flag.touch()
    assert list(values) == (["c"] if ordered else ["a"])
    assert ar.get(30) == ["a", "b", "c"]  # in order, whichever way


def test_iteration_over_engines(rc, tmp_path):
    view, flag = rc[:], tmp_path / "flag"
    view.scatter("flag", [None, str(flag)], flatten=True, block=True)
    view.push({"hold": tasks.hold}, block=True)
    ar = view.execute("hold(flag)")
    values = iter(ar)
    assert next(values).metadata["engine_id"] == 0
    assert not ar.done()
    flag.touch()
    assert next(values).metadata["engine_id"] == 1


def test_a_single_result_is_not_iterable(rc, balanced):
    for ar in (balanced.apply_async(list, "ab"), rc[0].apply_async(list, "ab")):
        with pytest.raises(TypeError, match="one result"):
            iter(ar)
        assert ar.get(30) == ["a", "b"]
    assert list(rc[[0]].apply_async(abs, -1)) == [1]


def test_iteration_raises_at_the_failed_item(balanced):
    values = iter(balanced.map_async(lambda x: 1 // (x - 1), range(3), chunksize=1))
    assert next(values) == -1
    with pytest.raises(ZeroDivisionError):
        next(values)
    values = balanced.map_async(lambda x: 1 // (x - 1), range(3), chunksize=1, return_exceptions=True)
    assert [type(v) for v in values] == [int, next(type(e) for e in values if isinstance(e, Exception)), int]


def test_indexing(rc, balanced):
    ar = rc[:].apply_async(os.getpid)
    pids = ar.get(30)
    assert ar[0] == pids[0] and ar[-1] == pids[1] and ar[:] == pids
    assert ar["engine_id"] == [0, 1] and ar.engine_id == [0, 1]
    with pytest.raises(IndexError):
        ar[2]
    with pytest.raises(KeyError):
        ar["nonsense"]
    with pytest.raises(TypeError):
        ar[1.5]
    with pytest.raises(AttributeError):
        print(ar.nonsense)
    mapped = balanced.map_async(abs, range(-5, 0))
    assert mapped[1] == 4 and mapped[1:3] == [4, 3]


# --- taking back


def test_abort_takes_back_what_has_not_started(rc, tmp_path):
    view, flag = rc[0], tmp_path / "flag"
    running = view.apply_async(tasks.report_and_hold, tmp_path / "report", flag, "ran")
    eventually((tmp_path / "report").exists)
    behind = [view.apply_async(tasks.report_and_hold, tmp_path / "other", None) for _ in range(5)]
    behind[0].abort()
    rc.abort(behind[1:])
    for ar in behind:
        with pytest.raises(ipp.TaskAborted):
            ar.get(30)
    running.abort()
    flag.touch()
    assert running.get(30) == "ran"
    assert rc[0].apply_sync(abs, -1) == 1
    assert not (tmp_path / "other").exists()


def test_abort_of_balanced_tasks_and_of_everything(rc, balanced, tmp_path):
    flag = tmp_path / "flag"
    balanced.map_sync(tasks.hold, [None] * 200, chunksize=1)
    held = [rc[i].apply_async(tasks.report_and_hold, tmp_path / "report", flag) for i in rc.ids]
    eventually(lambda: (tmp_path / "report").exists() and len((tmp_path / "report").read_text().split()) == 2)
    ars = [balanced.apply_async(tasks.hold, None) for _ in range(100)]
    balanced.abort()
    for ar in ars:
        with pytest.raises(ipp.TaskAborted):
            ar.get(30)
    flag.touch()
    assert [ar.get(30) for ar in held] == [None, None]


def test_cancel(rc, tmp_path):
    view, flag = rc[0], tmp_path / "flag"
    running = view.apply_async(tasks.report_and_hold, tmp_path / "report", flag)
    eventually((tmp_path / "report").exists)
    behind = view.apply_async(tasks.report_and_hold, tmp_path / "other", None)
    assert behind.cancel() is True and behind.cancelled() and behind.done()
    with pytest.raises(concurrent.futures.CancelledError):
        behind.get(30)
    assert "cancelled" in repr(behind)
    called = threading.Event()
    behind.add_done_callback(lambda f: called.set())
    assert called.is_set()
    eventually(lambda: len(rc.outstanding) == 1, what="it is taken back")
    flag.touch()
    running.get(30)
    assert view.apply_sync(abs, -1) == 1
    assert running.cancel() is False
    assert not (tmp_path / "other").exists()


# --- by engine


def test_get_dict(rc, balanced):
    ar = rc[:].apply_async(os.getpid)
    pids = ar.get_dict(30)
    assert pids == ar.result_dict == dict(zip(rc.ids, ar.get()))
    assert rc[1].apply_async(abs, -1).get_dict(30) == {1: 1}
    with pytest.raises(ValueError):
        rc.load_balanced_view(0).map_async(abs, range(4), chunksize=1).get_dict(30)


# --- about the tasks


def test_metadata(rc):
    second = timedelta(seconds=1)  # clocks of a task are compared across processes
    before = datetime.now().astimezone() - second
    ar = rc[1].apply_async(abs, -1)
    ar.get(30)
    meta = ar.metadata
    times = [meta[key] for key in ("submitted", "started", "completed", "received")]
    assert all(t.tzinfo is not None for t in times)
    assert before < times[0] and times == sorted(times) and times[-1] < datetime.now().astimezone() + second
    assert (meta["engine_id"], meta["status"], meta["attempt"], meta["error"]) == (1, "ok", 1, None)
    assert isinstance(meta["engine_uuid"], str) and meta["msg_id"] == ar.msg_ids[0]
    failed = rc[1].apply_async(lambda: 1 / 0)
    failed.wait(30)
    assert failed.metadata["status"] == "error"
    assert isinstance(failed.metadata["error"], ZeroDivisionError)


def test_metadata_of_several(rc):
    ar = rc[:].apply_async(abs, -1)
    ar.get(30)
    assert [m["engine_id"] for m in ar.metadata] == [0, 1]
    assert len(set(ar.msg_ids)) == 2 and len(set(ar.engine_uuid)) == 2


def test_metadata_of_a_pending_task(balanced, tmp_path):
    ar = balanced.apply_async(tasks.hold, tmp_path / "flag")
    assert ar.metadata["status"] == "pending"
    assert ar.metadata["completed"] is None
    assert ar.msg_ids[0] in balanced.client.outstanding
    (tmp_path / "flag").touch()
    ar.get(30)
    assert ar.msg_ids[0] not in balanced.client.outstanding


def test_times(balanced, tmp_path):
    ar = balanced.map_async(tasks.hold, [None, tmp_path / "flag"], chunksize=1)
    first = ar.elapsed
    eventually(lambda: ar.elapsed > first)
    (tmp_path / "flag").touch()
    ar.get(30)
    assert 0 < ar.serial_time
    assert ar.wall_time == ar.elapsed > 0
    assert ar.sent is True and ar.owner is True


def test_progress_and_length(rc, balanced, tmp_path):
    flag = tmp_path / "flag"
    ar = balanced.map_async(tasks.hold, [None] * 9 + [flag], chunksize=1)
    eventually(lambda: ar.progress == 9)
    assert len(ar) == 10
    flag.touch()
    ar.get(30)
    assert ar.progress == 10
    assert len(rc[:].apply_async(abs, -1)) == 2
    assert len(balanced.map_async(abs, [])) == 0


def test_wait_interactive(balanced, tmp_path, capsys):
    flag = tmp_path / "flag"
    ar = balanced.map_async(tasks.hold, [None] * 3 + [flag], chunksize=1)
    eventually(lambda: ar.progress == 3)
    assert ar.wait_interactive(interval=0.01, timeout=0.1) is False
    assert "3/4" in capsys.readouterr().err
    flag.touch()
    assert ar.wait_interactive(timeout=30) is True
    out, err = capsys.readouterr()
    assert "4/4" in err and out == ""


def test_repr(rc, balanced, tmp_path):
    def work(flag):
        return tasks.hold(flag)

    ar = balanced.apply_async(work, tmp_path / "flag")
    assert "work" in repr(ar) and "pending" in repr(ar)
    (tmp_path / "flag").touch()
    ar.get(30)
    assert "finished" in repr(ar)
    bad = balanced.apply_async(lambda: 1 / 0)
    bad.wait(30)
    assert "failed" in repr(bad)
    assert "AsyncMapResult(abs)" in repr(balanced.map_async(abs, [1]))


def test_many_results_one_by_one(balanced):
    ars = [balanced.apply_async(abs, -i) for i in range(5000)]
    assert [ar.get(60) for ar in ars] == list(range(5000))
    assert len({ar.msg_ids[0] for ar in ars}) == 5000


def test_a_forgotten_result_does_no_harm(balanced):
    for i in range(1000):
        balanced.apply_async(abs, i)
    assert balanced.apply_sync(abs, -1) == 1
