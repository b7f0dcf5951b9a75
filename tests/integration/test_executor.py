"""ViewExecutor: what the standard library asks of an executor and its futures, as far as it applies to one far away."""

from __future__ import annotations

import asyncio
import concurrent.futures as cf
import gc
import itertools
import logging
import os
import subprocess
import sys
import threading
import weakref

import pytest
import tasks
from support import eventually

import ipclite as ipp


@pytest.fixture
def executor(rc):
    with rc.executor() as executor:
        yield executor


@pytest.fixture
def held(executor, tmp_path):
    """A function that submits a task which runs until `held.end()`."""

    class Held:
        def __call__(self, value=None):
            return executor.submit(tasks.hold, tmp_path / "flag", value)

        def end(self):
            (tmp_path / "flag").touch()

    yield Held()
    (tmp_path / "flag").touch()


def whole(a, b=2, *rest, **more):
    return a, b, rest, more


class Thing:
    """Can be weakly referenced."""


# --- submit


def test_it_is_an_executor(rc, executor):
    assert isinstance(executor, cf.Executor) and isinstance(executor, ipp.ViewExecutor)
    assert executor._max_workers == 2
    assert rc.executor(targets=0)._max_workers == 1
    assert rc[:].executor._max_workers == 2
    assert "LoadBalancedView" in repr(executor)


def test_submit(executor):
    future = executor.submit(pow, 2, 8)
    assert isinstance(future, cf.Future)
    assert future.result(30) == 256 and future.exception() is None
    assert [f.result(30) for f in [executor.submit(abs, -i) for i in range(100)]] == list(range(100))


def test_arguments_of_any_name(executor):
    names = {"fn": 2, "self": 3, "f": 4, "block": 5}
    assert executor.submit(whole, 1, **names).result(30) == (1, 2, (), names)
    with pytest.raises(TypeError):
        executor.submit()
    with pytest.raises(TypeError):
        executor.submit(fn=abs)
    with pytest.raises(TypeError):
        executor.submit(fn=abs, arg=1)


def test_views_pass_on_arguments_of_any_name_too(balanced):
    assert balanced.apply_sync(whole, 1, f=2, self=3) == (1, 2, (), {"f": 2, "self": 3})


def test_one_engine_keeps_the_order_of_submission(rc, executor):
    rc[0].push({"seen": []}, block=True)
    with rc.executor(0) as one:
        cf.wait([one.submit(exec, f"import __main__; __main__.seen.append({i})") for i in range(50)], 30)
    assert rc[0]["seen"] == list(range(50))


def test_the_executor_of_a_direct_view_calls_each_engine(rc):
    with rc[:].executor as executor:
        assert executor.submit(pow, 2, 3).result(30) == [8, 8]
        assert list(executor.map(abs, range(-5, 0))) == [5, 4, 3, 2, 1]
    with rc[1].executor as executor:
        assert executor.submit(pow, 2, 3).result(30) == 8


def test_submit_from_many_threads(executor):
    def submit(k):
        found[k] = [f.result(60) for f in [executor.submit(pow, i, 2) for i in range(100)]]

    found = {}
    threads = [threading.Thread(target=submit, args=(k,)) for k in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found == {k: [i * i for i in range(100)] for k in range(8)}


def test_the_loop_of_asyncio_runs_calls_on_it(executor):
    async def main():
        loop = asyncio.get_running_loop()
        return await asyncio.gather(*[loop.run_in_executor(executor, pow, 2, i) for i in range(10)])

    assert asyncio.run(main()) == [2**i for i in range(10)]


# --- map


def test_map(executor):
    assert list(executor.map(pow, range(10), range(10))) == list(map(pow, range(10), range(10)))
    assert list(executor.map(pow, range(10), itertools.repeat(2, 5))) == [0, 1, 4, 9, 16]
    assert list(executor.map(abs, [])) == []
    assert list(executor.map(abs, (i for i in range(3)))) == [0, 1, 2]


@pytest.mark.parametrize("size", [1, 3, 7, 50])
def test_chunks_of_a_map(executor, size):
    assert list(executor.map(pow, range(40), range(40), chunksize=size)) == list(map(pow, range(40), range(40)))


@pytest.mark.parametrize("size", [0, -1, 1.5])
def test_a_chunksize_that_is_none(executor, size):
    with pytest.raises(ValueError, match="chunksize"):
        executor.map(abs, [1], chunksize=size)


def test_a_map_raises_where_the_failed_value_would_be(executor):
    values = executor.map(divmod, [1, 1, 1, 1], [2, 3, 0, 5])
    assert (next(values), next(values)) == ((0, 1), (0, 1))
    with pytest.raises(ZeroDivisionError):
        next(values)
    with pytest.raises(StopIteration):
        next(values)


def test_a_map_starts_before_it_is_read(executor, tmp_path):
    values = executor.map(tasks.report_and_hold, [tmp_path / "seen"] * 2, [None] * 2, range(2))
    eventually(lambda: (tmp_path / "seen").exists(), what="a call that nobody has read")
    assert list(values) == [0, 1]


def test_a_map_out_of_time(executor, tmp_path):
    found = []
    with pytest.raises(cf.TimeoutError):
        for value in executor.map(tasks.hold, [None, None, tmp_path / "flag"], range(3), timeout=2):
            found.append(value)
    (tmp_path / "flag").touch()
    assert found == [0, 1]
    assert list(executor.map(tasks.hold, [None] * 3, range(3), timeout=30)) == [0, 1, 2]


@pytest.mark.parametrize("how", ["an error", "closing"])
def test_a_map_that_ends_early_takes_the_rest_back(rc, tmp_path, how):
    first = (lambda: 1 / 0) if how == "an error" else (lambda: 1)
    with rc.executor(0) as executor:
        values = executor.map(lambda f: f(), [first, lambda: tasks.hold(tmp_path / "flag")]
                              + [lambda: open(tmp_path / "ran", "w").close()] * 20)
        if how == "an error":
            with pytest.raises(ZeroDivisionError):
                next(values)
        else:
            next(values)
            values.close()
        executor.submit(int).cancel()  # after it, what was to be taken back is
        eventually(lambda: len(rc.outstanding) <= 1, what="the rest taken back")
        (tmp_path / "flag").touch()
        assert executor.submit(abs, -1).result(30) == 1
        assert not (tmp_path / "ran").exists()


def test_a_map_keeps_no_value_that_was_read(executor):
    def make(i):
        return Thing()

    for thing in executor.map(make, range(5)):
        ref = weakref.ref(thing)
        del thing
        gc.collect()
        assert ref() is None


def test_a_map_over_an_endless_input(executor):
    values = executor.map(abs, itertools.count(), max_outstanding=10)
    assert list(itertools.islice(values, 50)) == list(range(50))
    values.close()
    with pytest.raises(TypeError, match="max_outstanding"):
        executor.map(abs, [1], timeout=1, max_outstanding=10)


# --- shutdown


def test_after_shutdown(rc):
    executor = rc.executor()
    futures = [executor.submit(abs, -i) for i in range(20)]
    executor.shutdown()
    assert all(f.done() for f in futures)
    with pytest.raises(RuntimeError, match="after shutdown"):
        executor.submit(abs, 1)
    with pytest.raises(RuntimeError, match="after shutdown"):
        executor.map(abs, [1])
    executor.shutdown()
    assert rc.ids == [0, 1]
    with rc.executor() as other:
        assert other.submit(abs, -1).result(30) == 1


def test_the_end_of_the_block_waits(rc):
    with rc.executor() as executor:
        futures = [executor.submit(abs, -i) for i in range(20)]
    assert all(f.done() for f in futures)


def test_shutdown_without_waiting(rc, tmp_path):
    executor = rc.executor()
    future = executor.submit(tasks.hold, tmp_path / "flag", 5)
    executor.shutdown(wait=False)
    assert not future.done()
    (tmp_path / "flag").touch()
    assert future.result(30) == 5


def test_shutdown_waits_for_its_own_futures_only(rc, tmp_path):
    others = rc.load_balanced_view(0).apply_async(tasks.hold, tmp_path / "flag")
    with rc.executor(1) as executor:
        future = executor.submit(abs, -3)
    assert future.done() and not others.done()
    (tmp_path / "flag").touch()
    others.get(30)


def test_shutdown_cancels_what_has_not_started(rc, tmp_path):
    executor = rc.executor(0)
    running = executor.submit(tasks.report_and_hold, tmp_path / "began", tmp_path / "flag", "value")
    eventually((tmp_path / "began").exists)
    queued = [executor.submit(abs, -i) for i in range(50)]
    executor.shutdown(wait=False, cancel_futures=True)
    done, pending = cf.wait(queued, timeout=30)
    assert not pending and all(f.cancelled() for f in queued)
    with pytest.raises(cf.CancelledError):
        queued[0].result()
    (tmp_path / "flag").touch()
    assert running.result(30) == "value" and not running.cancelled()


def test_the_end_of_the_interpreter_with_futures_that_wait(rc):
    code = ("import sys, ipclite, tasks\nrc = ipclite.Client(sys.argv[1])\n"
            "futures = [rc.executor().submit(tasks.hold, sys.argv[2]) for _ in range(20)]\n"
            "rc.load_balanced_view().map_async(tasks.hold, [sys.argv[2]] * 20)\n"
            "assert not futures[0].done()\nprint('end')\n")
    file = rc.cluster.connection_file()
    flag = str(file) + ".flag"
    try:
        done = subprocess.run([sys.executable, "-c", code, str(file), flag], capture_output=True, text=True, timeout=60,
                              env={**os.environ, "PYTHONPATH": ":".join(sys.path)})
    finally:
        open(flag, "w").close()
    assert (done.returncode, done.stdout, done.stderr) == (0, "end\n", "")
    rc.load_balanced_view().apply_sync(abs, 1)
    os.remove(flag)


# --- futures


def test_states(rc, held):
    future = held("value")
    eventually(future.running, what="sent")
    assert not future.done() and not future.cancelled()
    with pytest.raises(cf.TimeoutError):
        future.result(timeout=0)
    with pytest.raises(cf.TimeoutError):
        future.exception(timeout=0.01)
    held.end()
    assert future.result(timeout=30) == "value"
    assert future.done() and not future.running() and not future.cancelled()
    assert future.cancel() is False and future.result() == "value"
    assert future.set_running_or_notify_cancel() is True


def test_cancelling_what_is_queued(rc, tmp_path):
    with rc.executor(0) as executor:
        running = executor.submit(tasks.report_and_hold, tmp_path / "began", tmp_path / "flag")
        eventually((tmp_path / "began").exists)
        queued, called = executor.submit(open, tmp_path / "ran", "w"), []
        queued.add_done_callback(called.append)
        assert queued.cancel() is True
        assert queued.cancelled() and queued.done() and not queued.running() and called == [queued]
        assert queued.cancel() is True and queued.set_running_or_notify_cancel() is False
        for wrong in (queued.result, queued.exception):
            with pytest.raises(cf.CancelledError):
                wrong(timeout=30)
        eventually(lambda: len(rc.outstanding) == 1, what="it is taken back")
        (tmp_path / "flag").touch()
        running.result(30)
        executor.submit(abs, 1).result(30)
    assert not (tmp_path / "ran").exists()


def test_those_who_wait_hear_of_a_cancellation(executor, held):
    future, found = held(), []

    def wait(how):
        try:
            found.append(how())
        except cf.CancelledError:
            found.append("cancelled")

    threads = [threading.Thread(target=wait, args=(how,)) for how in (
        future.result, future.exception, future.wait, lambda: cf.wait([future], 30).done,
        lambda: next(cf.as_completed([future], 30)))]
    for thread in threads:
        thread.start()
    eventually(lambda: len(getattr(future, "_waiters", ())) == 2, what="those who wait")
    future.cancel()
    for thread in threads:
        thread.join(30)
    assert len(found) == 5
    assert [found.count(what) for what in ("cancelled", {future}, future, True)] == [2, 1, 1, 1]


def test_callbacks_run_in_order_and_at_once_if_it_has_ended(executor):
    future, seen, came = executor.submit(abs, -1), [], threading.Event()
    for i in range(3):
        future.add_done_callback(lambda f, i=i: seen.append((i, f.result())))
    future.add_done_callback(lambda f: came.set())
    assert came.wait(30)
    future.add_done_callback(lambda f: seen.append(("late", f is future)))
    assert seen == [(0, 1), (1, 1), (2, 1), ("late", True)]


@pytest.mark.parametrize("kind", [RuntimeError, SystemExit, KeyboardInterrupt])
def test_an_exception_in_a_callback_is_logged_and_stops_nothing(executor, held, caplog, kind):
    future, seen, came = held(5), [], threading.Event()

    def bad(f):
        raise kind("in a callback")

    future.add_done_callback(bad)
    future.add_done_callback(lambda f: (seen.append(f.result()), came.set()))
    with caplog.at_level(logging.ERROR, "concurrent.futures"):
        held.end()
        assert came.wait(30)
    assert seen == [5]
    assert "in a callback" in caplog.text and "exception calling callback" in caplog.text
    assert executor.submit(abs, -1).result(30) == 1


def test_a_callback_of_a_failed_or_cancelled_future(executor, held):
    seen, came = [], threading.Event()
    executor.submit(divmod, 1, 0).add_done_callback(lambda f: (seen.append(type(f.exception())), came.set()))
    assert came.wait(30) and issubclass(seen[0], ZeroDivisionError)
    future = held()
    future.add_done_callback(lambda f: seen.append(f.cancelled()))
    future.cancel()
    assert seen[1] is True


def test_the_same_exception_each_time(executor):
    future = executor.submit(divmod, 1, 0)
    error = future.exception(30)
    depths = []
    for _ in range(5):
        with pytest.raises(ZeroDivisionError) as caught:
            future.result()
        assert caught.value is error
        depths.append(len(caught.traceback))
    assert len(set(depths)) == 1


# --- wait and as_completed


def test_wait_for_the_first(executor, held):
    slow, quick = held(), executor.submit(abs, 1)
    done, pending = cf.wait([slow, quick], 30, cf.FIRST_COMPLETED)
    assert (done, pending) == ({quick}, {slow})
    done, pending = cf.wait([slow, quick], 30, cf.FIRST_COMPLETED)  # one had ended before
    assert (done, pending) == ({quick}, {slow})


def test_wait_for_the_first_exception(executor, held):
    slow, good, bad = held(), executor.submit(abs, 1), executor.submit(divmod, 1, 0)
    done, pending = cf.wait([slow, good, bad], 30, cf.FIRST_EXCEPTION)
    assert bad in done and slow in pending
    done, pending = cf.wait([slow, bad], 30, cf.FIRST_EXCEPTION)
    assert (done, pending) == ({bad}, {slow})


def test_wait_for_all_and_out_of_time(executor, held):
    slow, quick = held(), executor.submit(abs, 1)
    quick.result(30)
    done, pending = cf.wait([slow, quick, quick], 0.05)
    assert (done, pending) == ({quick}, {slow})
    cancelled = held()
    cancelled.cancel()
    held.end()
    done, pending = cf.wait([slow, quick, cancelled], 30)
    assert done == {slow, quick, cancelled} and not pending


def test_wait_for_hundreds(executor):
    futures = [executor.submit(abs, -i) for i in range(800)]
    done, pending = cf.wait(futures, 60)
    assert done == set(futures) and not pending
    for when in (cf.FIRST_COMPLETED, cf.FIRST_EXCEPTION):
        assert cf.wait([executor.submit(divmod, 1, 0) for _ in range(200)], 60, when).done


def test_wait_in_several_threads(executor, held):
    futures = [held(i) for i in range(2)] + [executor.submit(abs, i) for i in range(100)]
    found = []
    threads = [threading.Thread(target=lambda: found.append(len(cf.wait(futures, 30).done))) for _ in range(4)]
    for thread in threads:
        thread.start()
    held.end()
    for thread in threads:
        thread.join(30)
    assert found == [102] * 4


def test_as_completed(executor, held):
    slow, quick = held(), [executor.submit(abs, -i) for i in range(5)]
    cf.wait(quick, 30)  # before the call
    order = cf.as_completed([slow, *quick, *quick], 30)  # duplicates count once
    assert {next(order) for _ in range(5)} == set(quick)
    held.end()
    assert list(order) == [slow]


def test_as_completed_without_time(executor, held):
    slow, quick = held(), executor.submit(abs, 1)
    quick.result(30)
    found = []
    with pytest.raises(cf.TimeoutError):
        for future in cf.as_completed([slow, quick], timeout=0):
            found.append(future)
    assert found == [quick]


def test_as_completed_lets_go_of_what_it_yields(executor):
    def make(i):
        return Thing()

    futures = [executor.submit(make, i) for i in range(5)]
    for future in cf.as_completed(futures, 30):
        futures.remove(future)
        ref = weakref.ref(future.result())
        del future
        gc.collect()
        assert ref() is None


def test_a_forgotten_future_goes_with_its_result(executor):
    future = executor.submit(Thing)
    refs = weakref.ref(future), weakref.ref(future.result(30))
    del future
    gc.collect()
    assert [ref() for ref in refs] == [None, None]
