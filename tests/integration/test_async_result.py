"""AsyncResult beyond a Future: parts, output, metadata, asyncio, threads, interrupts, forks, the end of a process."""

from __future__ import annotations

import asyncio
import concurrent.futures as cf
import gc
import io
import multiprocessing
import os
import random
import select
import signal
import subprocess
import sys
import threading
import warnings
from datetime import datetime, timedelta, timezone

import numpy as np
import pytest
import tasks
from support import eventually

import ipclite as ipp


def talk(flag=None):
    print("out 1\nout 2")
    print("err", file=sys.stderr)
    if flag:
        tasks.hold(flag)
        print("out 3", end="")


class Picture:
    """Has a rich form."""

    def __repr__(self):
        return "a picture"

    def _repr_html_(self):
        return "<b>picture</b>"

    def _repr_png_(self):
        return b"\x89PNG"

    def _repr_svg_(self):
        raise RuntimeError("can't draw")


def script(rc, code, *args, **options):
    """Run code in a process of its own; {file} is the client's connection file."""
    file = str(rc.cluster.connection_file())
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.Popen([sys.executable, "-c", code, file, *map(str, args)], env=environ, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)


# --- waiting


def test_wait_for_the_first_to_end(rc, tmp_path):
    ar = rc[:].apply_async(tasks.hold, None)
    assert ar.wait(30, return_when=ipp.ALL_COMPLETED) == (set(ar.split()), set())
    ar = rc[:].apply_async(lambda flag, i=None: tasks.hold(flag if __import__("os").getpid() == i else None, "v"),
                           tmp_path / "flag", rc[1].apply_sync(os.getpid))
    done, pending = ar.wait(timeout=30, return_when=ipp.FIRST_COMPLETED)
    assert all(isinstance(part, ipp.AsyncResult) for part in done | pending)
    assert (done, pending) == ({ar.split()[0]}, {ar.split()[1]})
    assert ar.wait(0.01, return_when=ipp.ALL_COMPLETED) == (done, pending)
    assert next(iter(done)).get() == "v" and not ar.done()
    (tmp_path / "flag").touch()
    assert ar.wait(30) is True
    with pytest.raises(ValueError, match="return_when"):
        ar.wait(return_when="sometime")


def test_get_at_the_first_exception(rc, tmp_path):
    pid = rc[0].apply_sync(os.getpid)
    ar = rc[:].apply_async(lambda: 1 / 0 if __import__("os").getpid() == pid else tasks.hold(tmp_path / "flag"))
    with pytest.raises(ZeroDivisionError):
        ar.get(timeout=30, return_when=ipp.FIRST_EXCEPTION)
    assert not ar.done()
    with pytest.raises(TimeoutError):
        ar.get(timeout=0.01, return_when=ipp.ALL_COMPLETED)
    (tmp_path / "flag").touch()
    assert [type(v).__name__ for v in ar.get(30, return_exceptions=True)] == ["ZeroDivisionError", "NoneType"]
    assert rc[:].apply_async(abs, -1).get(30, return_when=ipp.FIRST_EXCEPTION) == [1, 1]
    held = rc[0].apply_async(tasks.hold, tmp_path / "other")
    with pytest.raises(TimeoutError):
        held.get(0.05, return_when=ipp.FIRST_EXCEPTION)
    (tmp_path / "other").touch()
    held.get(30)


def test_the_same_error_each_time(rc, balanced):
    for ar in (balanced.apply_async(lambda: 1 / 0), rc[:].apply_async(lambda: 1 / 0),
               balanced.map_async(lambda x: 1 / x, [0, 0, 1])):
        error, depths = ar.exception(30), set()
        for _ in range(4):
            with pytest.raises(ipp.RemoteError) as caught:
                ar.get()
            assert caught.value is error
            depths.add(len(caught.traceback))
        assert len(depths) == 1


def test_an_array_may_be_changed_when_it_has_been_sent(rc):
    big = np.arange(2_000_000)
    ars = []
    for i in range(5):
        big[0] = i
        ar = rc[0].apply_async(lambda a: int(a[0]), big)
        assert ar.wait_for_send(timeout=30) is True and ar.sent
        ars.append(ar)
    assert [ar.get(60) for ar in ars] == list(range(5))


def test_waiting_for_a_send_that_is_held_up(rc):
    big = np.zeros(50_000_000, dtype=np.uint8)
    ars = [rc[0].apply_async(len, big) for _ in range(2)]
    try:
        for ar in ars:
            ar.wait_for_send(0)
    except TimeoutError as e:
        assert "still being sent" in str(e)
    ars[-1].wait_for_send(60)
    assert [ar.get(60) for ar in ars] == [len(big)] * 2


def test_wait_for_output(balanced):
    ar = balanced.apply_async(talk)
    assert ar.wait_for_output(30) is True
    assert ar.stdout == "out 1\nout 2\n"


def test_running(balanced, tmp_path):
    ar = balanced.apply_async(tasks.hold, tmp_path / "flag")
    eventually(ar.running)
    (tmp_path / "flag").touch()
    ar.get(30)
    assert not ar.running()


# --- parts


def test_split_and_join(rc, balanced):
    ar = rc[:].apply_async(os.getpid)
    parts = ar.split()
    assert len(parts) == 2 and [part.get(30) for part in parts] == ar.get()
    assert [part.msg_ids for part in parts] == [[i] for i in ar.msg_ids]
    assert [part.engine_id for part in parts] == ar.engine_id == [0, 1]
    assert parts[1].metadata == ar.metadata[1]
    again = ipp.AsyncResult.join(*parts)
    assert again.get(30) == ar.get() and again.msg_ids == ar.msg_ids
    assert again.get_dict() == ar.get_dict() and len(again) == 2
    single = balanced.apply_async(abs, -1)
    assert single.split() == (single,) and ipp.AsyncResult.join(single) is single
    mixed = ipp.AsyncResult.join(single, ar, balanced.apply_async(abs, -2))
    assert mixed.get(30) == [1, *ar.get(), 2] and mixed.progress == 4
    assert list(mixed) == mixed.get() and mixed[1:3] == ar.get()
    with pytest.raises(ValueError, match="at least one"):
        ipp.AsyncResult.join()
    with ipp.Client(rc.cluster.connection_file()) as other, pytest.raises(ValueError, match="different clients"):
        ipp.AsyncResult.join(single, other[:].apply_async(abs, 1))


def test_parts_of_a_map(balanced):
    ar = balanced.map_async(lambda x: 10 // x, [1, 2, 0, 5, 0], chunksize=2)
    parts = ar.split()
    assert parts[0].get(30) == [10, 5]
    assert isinstance(parts[1].exception(30), ZeroDivisionError)
    assert parts[1].get(30, return_exceptions=True).args
    done, _ = ar.wait(30, ipp.FIRST_EXCEPTION)
    assert any(part.exception() for part in done)
    good = balanced.map_async(abs, range(-5, 0), chunksize=2)
    assert ipp.AsyncMapResult.join(*good.split()).get(30) == [5, 4, 3, 2, 1]
    forgiving = balanced.map_async(lambda x: 1 / x, [1, 0], chunksize=1, return_exceptions=True)
    assert forgiving.exception(30) is None and forgiving.successful()
    assert [part.exception(30) for part in forgiving.split()] == [None, None]


def test_parts_that_are_cancelled_or_aborted(rc, tmp_path):
    rc[0].apply_async(tasks.hold, tmp_path / "flag")
    joined = ipp.AsyncResult.join(*[rc[0].apply_async(abs, i) for i in range(3)])
    joined.abort()
    assert isinstance(joined.exception(30), ipp.CompositeError)
    assert all(isinstance(e, ipp.TaskAborted) for e in joined.exception().elist)
    whole = rc[[0, 0]].apply_async(abs, 1)
    part = whole.split()[0]
    assert part.cancel() and part.cancelled() and not whole.cancelled()
    (tmp_path / "flag").touch()
    whole.wait(30)


def test_parts_of_thousands_that_arrive_meanwhile(balanced):
    for _ in range(5):
        ar = balanced.map_async(abs, range(2000), chunksize=1)
        done, pending = ar.wait(60, ipp.ALL_COMPLETED)
        assert len(done) == 2000 and not pending and ar.get(30) == list(range(2000))


# --- output


def test_streaming(rc, tmp_path, capsys):
    ar = rc[1].apply_async(talk, tmp_path / "flag")
    eventually(lambda: ar.stderr, what="output before we look")
    with ar.stream_output():
        eventually(lambda: "[stderr:1] err\n" in capsys.readouterr().err)
        (tmp_path / "flag").touch()
        ar.wait(30)
    assert capsys.readouterr().out == "[stdout:1] out 3\n"
    with ar.stream_output():
        pass
    assert capsys.readouterr() == ("[stdout:1] out 1\n[stdout:1] out 2\n[stdout:1] out 3\n", "[stderr:1] err\n")


def test_streaming_of_several(rc, capsys):
    ar = rc[:].apply_async(talk)
    with ar.stream_output():
        ar.wait(30)
    out = capsys.readouterr().out.splitlines()
    assert sorted(out) == [f"[stdout:{i}] out {k}" for i in (0, 1) for k in (1, 2)]
    with ar.split()[1].stream_output():
        pass
    assert capsys.readouterr().out == "[stdout:1] out 1\n[stdout:1] out 2\n"


def test_a_stream_that_breaks_stops_nothing(rc, tmp_path, monkeypatch):
    class Broken(io.StringIO):
        def write(self, text):
            raise OSError("no room")

    ar = rc[0].apply_async(talk, tmp_path / "flag")
    with pytest.raises(OSError, match="no room"), ar.stream_output():
        monkeypatch.setattr(sys, "stdout", Broken())
        (tmp_path / "flag").touch()
        ar.wait(30)
    monkeypatch.undo()
    assert rc[0].apply_sync(abs, -1) == 1


@pytest.mark.parametrize("groupby, order", [("type", [0, 1, 2, 3]), ("engine", [0, 2, 1, 3]), ("order", [1, 3, 0, 2])])
def test_display_outputs(rc, capsys, monkeypatch, groupby, order):
    monkeypatch.setattr(sys, "stderr", sys.stdout)
    ar = rc[[1, 0] if groupby == "order" else [0, 1]].apply_async(talk)
    ar.display_outputs(groupby)
    blocks = [f"[stdout:{i}] out 1\n[stdout:{i}] out 2\n" for i in (0, 1)] + [f"[stderr:{i}] err\n" for i in (0, 1)]
    assert capsys.readouterr().out == "".join(blocks[i] for i in order)
    ar.display_outputs(groupby, result_only=True)
    assert capsys.readouterr().out == ""
    with pytest.raises(ValueError, match="groupby"):
        ar.display_outputs("colour")


def test_display_of_one_and_of_execute(rc, balanced, capsys):
    balanced.apply_async(talk).display_outputs()
    assert capsys.readouterr() == ("out 1\nout 2\n", "err\n")
    rc[1].clear(block=True)
    ar = rc[:].execute("print('said')\n6 * 7", silent=False)
    ar.display_outputs()
    counts = [reply.execution_count for reply in ar.get()]
    assert capsys.readouterr().out == "[stdout:0] said\n[stdout:1] said\n" + "".join(
        f"Out[{i}:{count}]: 42\n" for i, count in enumerate(counts))
    reply = rc[0].execute("6 * 8", silent=False, block=True)
    assert reply.execution_count == counts[0] + 1
    reply.display()
    assert capsys.readouterr().out == f"Out[0:{counts[0] + 1}]: 48\n"
    rc[0].execute("7", block=True).display()
    assert capsys.readouterr().out == ""


def test_an_execute_reply(rc):
    rc[0].push({"picture": Picture()}, block=True)
    ar = rc[0].execute("picture", silent=False)
    reply = ar.get(30)
    assert isinstance(reply, ipp.ExecuteReply)
    assert repr(reply) == "<ExecuteReply[0]: a picture>" and reply.source == "picture" and reply.result == "a picture"
    assert reply.data == {"text/plain": "a picture", "text/html": "<b>picture</b>", "image/png": "iVBORw=="}
    bundle = reply._repr_mimebundle_()
    assert bundle["text/html"] == "<b>picture</b>"
    assert bundle["text/plain"] == f"Out[0:{reply.execution_count}]: a picture"
    assert reply.engine_id == 0 and reply["status"] == "ok" and "can't draw" in reply.stderr
    assert ar.execute_input == "picture" and ar.execute_result["data"] == reply.data
    with pytest.raises(AttributeError, match="nonsense"):
        print(reply.nonsense)
    silent = rc[0].execute("y = 1", block=True)
    assert silent._repr_mimebundle_() == {"text/plain": "<ExecuteReply[0]>"} and silent.data == {}


# --- metadata and times


def test_metadata_has_attributes(rc, balanced):
    ar = balanced.apply_async(abs, -1)
    ar.get(30)
    assert ar.metadata.engine_id == ar.metadata["engine_id"] == ar.engine_id == ar["engine_id"]
    with pytest.raises(AttributeError, match="no metadata 'nonsense'"):
        print(ar.metadata.nonsense)
    with pytest.raises(AttributeError, match="nonsense"):
        print(ar.nonsense)
    with pytest.raises(KeyError):
        print(ar["nonsense"])
    assert ar.owner is True
    several = rc[:].apply_async(abs, -1)
    several.get(30)
    assert several.metadata[1].engine_id == several.engine_id[1] == 1


def test_metadata_of_dependencies_and_broadcasts(rc, balanced):
    first = balanced.apply_async(abs, -1)
    with balanced.temp_flags(after=first, follow=ipp.Dependency([first], failure=True)):
        for ar in (balanced.apply_async(abs, -2), balanced.map_async(abs, [-2, -3], chunksize=1).split()[0]):
            ar.wait(30)
            assert ar.after == {"dependencies": first.msg_ids, "all": True, "success": True, "failure": False}
            assert ar.follow["dependencies"] == first.msg_ids and ar.follow["failure"] is True
    assert (first.after, first.follow, first.is_broadcast, first.is_coalescing) == (None, None, False, False)
    view = rc.broadcast_view(is_coalescing=True)
    for ar in (view.apply_async(abs, -1), view.execute("a = 1"), view.push({"a": 1})):
        assert (ar.is_broadcast, ar.is_coalescing) == ([True, True], [True, True])
    assert rc.broadcast_view().apply_async(abs, -1).is_coalescing == [False, False]


def test_what_tasks_display(rc, balanced, capsys):
    def draw(picture):
        print("before")
        display(picture, None)  # noqa: F821

    ar = balanced.apply_async(draw, Picture())
    ar.get(30)
    shown, nothing = ar.outputs
    assert shown["output_type"] == "display_data" and nothing["data"] == {"text/plain": "None"}
    assert shown["data"] == {"text/plain": "a picture", "text/html": "<b>picture</b>", "image/png": "iVBORw=="}
    ar.display_outputs()
    assert capsys.readouterr().out == "before\na picture\nNone\n"
    ar.display_outputs(result_only=True)
    assert capsys.readouterr().out == ""
    with ar.stream_output():
        pass
    assert sorted(capsys.readouterr().out.splitlines()) == ["None", f"[stdout:{ar.engine_id}] before", "a picture"]
    ar = rc[:].execute("display(1); 2", silent=False)
    ar.wait(30)
    assert [outputs[0]["data"]["text/plain"] for outputs in ar.outputs] == ["1", "1"]


def test_the_status_of_what_was_given_up(rc, tmp_path):
    ar = rc[0].apply_async(tasks.hold, tmp_path / "flag")
    ar.cancel()
    assert (ar.status, ar.error, ar.successful()) == ("cancelled", None, False)
    (tmp_path / "flag").touch()
    assert rc[0].apply_sync(abs, -1) == 1


def test_a_wrong_return_when(balanced):
    ar = balanced.apply_async(abs, -1)
    for call in (ar.get, ar.wait, ar.wait_interactive):
        with pytest.raises(ValueError, match="return_when must be"):
            call(return_when="SOON")
    assert ar.get(30, return_when=ipp.FIRST_COMPLETED) == 1


def test_timedelta(rc):
    ar = rc[:].apply_async(abs, -1)
    ar.get(30)
    assert 0 <= ar.timedelta(ar.submitted, ar.received) == pytest.approx(ar.wall_time, abs=0.01)
    at = datetime(2020, 1, 1, tzinfo=timezone.utc)
    times = [at, at + timedelta(seconds=3)]
    assert ar.timedelta(at, times) == 3 and ar.timedelta(times, times, start_key=max) == 0
    assert ar.timedelta(times, times, end_key=min) == 0 and ar.timedelta(times[1], at) == -3


def test_reprs_of_notebooks(rc, balanced):
    ar = rc[:].apply_async(lambda: 1 / 0)
    ar.wait(30)
    html = ar._repr_html_()
    assert html.count("<tr>") == 3 and "error" in html and "<lambda>" not in html and "&lt;lambda&gt;" in html
    assert balanced.map_async(abs, range(100), chunksize=1)._repr_html_().count("<tr>") == 21
    for thing in (rc, rc[:], balanced, rc.direct_view()):
        assert thing._repr_html_().count("<tr>") == 3 and type(thing).__name__ in thing._repr_html_()
    assert rc[0]._repr_html_().count("<tr>") == 2


def test_progress_is_shown(rc, balanced, tmp_path, capsys, monkeypatch):
    assert rc.wait_interactive(timeout=30) is True
    ars = [balanced.apply_async(tasks.hold, tmp_path / "flag") for _ in range(3)]
    assert rc.wait_interactive(ars, interval=0.01, timeout=0.05) is False
    (tmp_path / "flag").touch()
    assert rc.wait_interactive(ars, interval=0.01, timeout=30) is True
    assert "3/3" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "tqdm", None)
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    assert rc.wait_interactive(ars[0], timeout=30) is True
    assert balanced.map_async(abs, range(10)).wait_interactive(0.01, 30) is True
    assert "10/10" in capsys.readouterr().err and "it/s" not in capsys.readouterr().err


def test_an_interactive_wait_for_the_first(rc, balanced, tmp_path):
    ar = ipp.AsyncResult.join(balanced.apply_async(tasks.hold, tmp_path / "flag"), balanced.apply_async(lambda: 1 / 0))
    for when in (ipp.FIRST_COMPLETED, ipp.FIRST_EXCEPTION):
        assert ar.wait_interactive(0.01, 30, return_when=when) is False
    (tmp_path / "flag").touch()
    assert ar.wait_interactive(0.01, 30, widget=False) is True


def test_waiting_for_engines_in_the_background(rc):
    assert rc.wait_for_engines(2, block=False).result(30) is None
    assert isinstance(rc.wait_for_engines(3, block=False, timeout=0.1).exception(30), TimeoutError)
    with ipp.Client(rc.cluster.connection_file()) as other:
        future = other.wait_for_engines(3, block=False)
        assert not future.done()
    assert isinstance(future.exception(30), ipp.ControllerLost)


def test_what_is_not_needed_any_more(rc):
    for name in ("spin", "spin_thread", "stop_spin_thread"):
        with pytest.warns(DeprecationWarning, match="no effect") as caught:
            getattr(rc, name)()
        assert caught[0].filename == __file__
    file = rc.cluster.connection_file()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with ipp.Client(url_file=file, debug=True, key=b"") as other:
            assert other.ids == [0, 1]
    assert [(w.filename, w.category) for w in caught] == [(__file__, DeprecationWarning)] * 3
    assert "connection_info" in str(caught[0].message)
    with pytest.raises(TypeError, match="no argument 'nonsense'"):
        ipp.Client(file, nonsense=1)


# --- asyncio


def test_asyncio_takes_them_as_they_are(rc, balanced):
    async def main():
        ars = [balanced.apply_async(abs, -i) for i in range(20)]
        found = [await f for f in asyncio.as_completed(ars)]
        assert sorted(found) == list(range(20))
        several, mapped = await asyncio.gather(rc[:].apply_async(abs, -1), balanced.map_async(abs, [-1, -2]))
        assert several == [1, 1] and mapped == [1, 2]
        failed = await asyncio.gather(balanced.apply_async(lambda: 1 / 0), return_exceptions=True)
        assert isinstance(failed[0], ZeroDivisionError)

    asyncio.run(main())


def test_a_timeout_or_cancellation_of_asyncio_cancels(rc, tmp_path):
    async def main():
        running = rc[0].apply_async(tasks.hold, tmp_path / "flag")
        late, given_up = (rc[0].apply_async(open, tmp_path / name, "w") for name in ("late", "given up"))
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(late, 0.05)
        waiting = asyncio.ensure_future(asyncio.wait_for(given_up, 60))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert late.cancelled() and given_up.cancelled()
        eventually(lambda: len(rc.outstanding) == 1, what="they are taken back")
        (tmp_path / "flag").touch()
        await running
        await rc[0].apply_async(abs, 1)
        assert not (tmp_path / "late").exists() and not (tmp_path / "given up").exists()

    asyncio.run(main())


def test_several_loops(balanced):
    async def main(k):
        return sum(await asyncio.gather(*[balanced.apply_async(pow, i, k) for i in range(50)]))

    with cf.ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda k: asyncio.run(main(k)), range(4)))
    assert found == [sum(i**k for i in range(50)) for k in range(4)]


# --- threads


def test_a_client_in_many_threads(rc):
    def work(k):
        balanced, each, mine = rc.load_balanced_view(), rc[:], random.Random(k)
        for n in range(60):
            x = (k + 1) * 1000 + n
            kind = mine.randrange(6)
            if kind == 0:
                assert balanced.apply_sync(abs, -x) == x
            elif kind == 1:
                ars = [balanced.apply_async(pow, x, i) for i in range(5)]
                assert [ar.get(60) for ar in ars] == [x**i for i in range(5)]
            elif kind == 2:
                assert balanced.map_sync(abs, range(-x, -x + 50), chunksize=7) == [x - i for i in range(50)]
            elif kind == 3:
                assert each.apply_sync(abs, -x) == [x, x]
            elif kind == 4:
                assert list(balanced.imap(abs, range(-x, -x + 20))) == [x - i for i in range(20)]
            else:
                with pytest.raises(ZeroDivisionError):
                    balanced.apply_sync(divmod, x, 0)

    with cf.ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    assert rc.outstanding == set()


def test_several_threads_read_one_result(rc):
    ar = rc[:].apply_async(lambda: list(range(1000)))
    with cf.ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: ar.get(30), range(16)))
    assert all(value[0] is found[0][0] for value in found)


# --- interrupts

INTERRUPTED = """
import sys, signal, ipclite
rc = ipclite.Client(sys.argv[1])
view, each = rc.load_balanced_view(), rc[:]
calls = [lambda x: [view.apply_sync(abs, -x)] == [x],
         lambda x: view.map_sync(abs, range(-x, 0)) == list(range(x, 0, -1)),
         lambda x: each.apply_sync(abs, -x) == [x, x], lambda x: each.pull('1 + 1', block=True) == [2, 2],
         lambda x: [ar.get() for ar in [view.apply_async(bytes, x * 999) for _ in range(9)]] == [bytes(x * 999)] * 9,
         lambda x: isinstance(rc.queue_status(), dict),
         lambda x: list(rc.executor().map(abs, range(x))) == list(range(x))]
caught = n = 0
print('ready', flush=True)
while caught < int(sys.argv[2]):
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
        while True:
            assert calls[n % len(calls)](n % 97), n
            n += 1
    except KeyboardInterrupt:
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
        caught += 1
        print(caught, flush=True)
signal.signal(signal.SIGINT, signal.SIG_IGN)
for x in range(50):
    assert all([call(x) for call in calls])
assert rc.wait(timeout=30) and not rc.outstanding
print('end', n > 0)
"""


def test_ctrl_c_at_any_moment_leaves_the_session_usable(rc):
    times, moments, lost = 150, random.Random(17), 0
    process = script(rc, INTERRUPTED, times)
    assert process.stdout.readline() == "ready\n"
    pause = threading.Event()
    for i in range(times):
        pause.wait(moments.random() * 0.03)
        process.send_signal(signal.SIGINT)
        while not select.select([process.stdout], [], [], 5)[0]:  # pyzmq loses one that comes while it frees a message
            lost += 1
            assert lost <= 3, "it does not react"
            process.send_signal(signal.SIGINT)
        assert process.stdout.readline() == f"{i + 1}\n", process.stderr.read()
    out, err = process.communicate(timeout=120)
    assert (process.returncode, out) == (0, "end True\n"), err
    assert err.count("Exception ignored") == err.count("Frame.__dealloc__") == lost, err
    assert rc.load_balanced_view().apply_sync(abs, -1) == 1


def test_ctrl_c_takes_the_call_back(rc, tmp_path):
    process = script(rc, "import sys, ipclite, tasks\nrc = ipclite.Client(sys.argv[1])\n"
                     "rc[0].apply_async(tasks.hold, sys.argv[2])\n"
                     "try:\n    print('ready', flush=True); rc[0].apply_sync(open, sys.argv[3], 'w')\n"
                     "except KeyboardInterrupt:\n    print('interrupted', rc[1].apply_sync(abs, -1), flush=True)\n"
                     "rc[1].apply_sync(abs, 1)", tmp_path / "flag", tmp_path / "ran")
    assert process.stdout.readline() == "ready\n"
    def waiting():
        return rc.queue_status()[0]["queue"] + rc.queue_status()[0]["tasks"]

    eventually(lambda: waiting() >= 2, what="both submitted")
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (0, "interrupted 1\n", "")
    eventually(lambda: waiting() == 1, what="it is taken back")
    (tmp_path / "flag").touch()
    assert rc[0].apply_sync(abs, -1) == 1 and not (tmp_path / "ran").exists()


# --- forks, and the end

FORKED = """
import sys, os, ipclite, multiprocessing, tasks
rc = ipclite.Client(sys.argv[1])
view = rc.load_balanced_view()
done, pending = view.apply_async(abs, -1), None
done.get()
def child():
    assert done.get() == 1
    for call in (lambda: view.apply_async(abs, 1), lambda: view.apply_sync(abs, 1), lambda: rc.queue_status(),
                 lambda: pending.get(), lambda: view.map_sync(abs, [1]), lambda: pending.wait(5),
                 lambda: rc.send_signal(2)):
        try:
            call()
        except ipclite.ControllerLost as e:
            assert 'fork' in str(e) and 'new' in str(e), e
        else:
            sys.exit(f'no error from line {call.__code__.co_firstlineno}, {call.__code__.co_names}')
    rc.close()
    with ipclite.Client(sys.argv[1]) as own:
        assert own.load_balanced_view().apply_sync(abs, -7) == 7
pending = rc[0].apply_async(tasks.hold, sys.argv[3], 32)
if sys.argv[2] == 'fork':
    pid = os.fork()
    if not pid:
        code = 1
        try:
            child()
            code = 0
        except BaseException:
            import traceback; traceback.print_exc()
        finally:
            sys.stderr.flush(); os._exit(code)
    status = os.waitpid(pid, 0)[1]
else:
    process = multiprocessing.get_context('fork').Process(target=child)
    process.start(); process.join(60); status = process.exitcode
assert status == 0, status
open(sys.argv[3], 'w').close()
assert pending.get(30) == 32 and view.apply_sync(abs, -3) == 3
print('end')
"""


@pytest.mark.parametrize("how", ["fork", "multiprocessing"])
def test_a_fork_can_not_use_the_client_and_does_it_no_harm(rc, tmp_path, how):
    process = script(rc, FORKED, how, tmp_path / "flag")
    out, err = process.communicate(timeout=120)
    assert (process.returncode, out) == (0, "end\n"), err
    assert [line for line in err.splitlines() if "DeprecationWarning" not in line and "os.fork" not in line
            and "self.pid" not in line] == []


def _size_of(x):
    return len(x)


def test_processes_of_multiprocessing_beside_a_client(rc):
    ars = [rc.load_balanced_view().apply_async(abs, -i) for i in range(100)]
    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert pool.map(_size_of, ["a", "bb"]) == [1, 2]
        pool.close()
        pool.join()
    assert [ar.get(30) for ar in ars] == list(range(100))


def test_after_close(rc):
    client = ipp.Client(rc.cluster.connection_file())
    view, done = client.load_balanced_view(), client[:].apply_async(abs, -1)
    done.get(30)
    pending = client[0].apply_async(abs, -1)
    client.close()
    assert done.get() == [1, 1] and done.split()[0].get() == 1
    assert pending.done()
    for call in (lambda: view.apply_async(abs, 1), lambda: view.map_async(abs, [1]), client.queue_status,
                 lambda: client.executor().submit(abs, 1), lambda: list(view.imap(abs, [1]))):
        with pytest.raises(ipp.KernelError) as caught:
            call()
        assert "closed" in str(caught.value) or "no engines" in str(caught.value)
    assert "closed" in repr(client) and client._repr_html_() and pending._repr_html_()
    assert pending.cancel() is False and client.wait(timeout=1) is True
    pending.abort()
    client.abort()


@pytest.mark.parametrize("last", ["", "del rc", "import gc; gc.disable(); del view, rc", "sys.exit(0)",
                                  "rc.cycle = rc; del rc"])
def test_the_end_of_the_interpreter_without_close(rc, tmp_path, last):
    process = script(rc, "import sys, ipclite, tasks\n"
                     "rc = ipclite.Client(sys.argv[1])\nview = rc.load_balanced_view()\n"
                     "ars = [view.apply_async(tasks.hold, sys.argv[2]) for _ in range(5)]\n"
                     "ars.append(view.map_async(abs, range(100)))\n"
                     f"for ar in ars: ar.add_done_callback(lambda f: None)\n{last}\n", tmp_path / "flag")
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (0, "", "")
    (tmp_path / "flag").touch()
    assert rc[:].apply_sync(abs, -1) == [1, 1]


def test_results_that_nobody_keeps_take_no_room(balanced):
    import tracemalloc

    def round_trips(n):
        for _ in range(n):
            ars = [balanced.apply_async(bytes, 2000) for _ in range(100)]
            assert all(len(ar.get(30)) == 2000 for ar in ars)
        del ars, _
        gc.collect()

    round_trips(3)
    tracemalloc.start()
    try:
        round_trips(1)
        before = tracemalloc.get_traced_memory()[0]
        round_trips(20)
        after = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert after - before < 200_000
