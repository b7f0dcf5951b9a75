"""Views: whom they address, in which shape results come, maps, names, code."""

from __future__ import annotations

import itertools
import os
import threading

import numpy as np
import pytest
import tasks
from support import eventually

import ipclite as ipp

# --- whom a view addresses


def test_shapes_of_results(rc):
    pids = rc.direct_view("all").apply_sync(os.getpid)
    assert len(set(pids)) == 2
    assert rc[0].apply_sync(os.getpid) == pids[0]
    assert rc[[0]].apply_sync(os.getpid) == pids[:1]
    assert rc[:].apply_sync(os.getpid) == pids
    assert rc[[1, 0]].apply_sync(os.getpid) == pids[::-1]
    assert rc[1:].apply_sync(os.getpid) == pids[1:]
    assert rc[::-1].apply_sync(os.getpid) == pids[::-1]
    assert rc[-1].apply_sync(os.getpid) == pids[-1]
    assert [view.apply_sync(os.getpid) for view in rc] == pids
    assert rc.load_balanced_view().apply_sync(os.getpid) in pids
    assert rc.load_balanced_view([1]).apply_sync(os.getpid) == pids[1]
    assert rc.load_balanced_view(targets=0).apply_sync(os.getpid) == pids[0]


def test_all_is_lazy_and_a_slice_is_frozen(start):
    rc = start(1)
    lazy, frozen, balanced = rc.direct_view(), rc[:], rc.load_balanced_view()
    rc.cluster.start_engines_sync(1)
    rc.wait_for_engines(2, timeout=30)
    assert (len(lazy), len(frozen), len(balanced)) == (2, 1, 2)
    assert len(lazy.apply_sync(os.getpid)) == 2
    assert len(frozen.apply_sync(os.getpid)) == 1


@pytest.mark.parametrize("wrong, kind", [(7, IndexError), (-3, IndexError), ([0, 9], IndexError), ("some", TypeError),
                                         (True, TypeError), (1.5, TypeError)])
def test_targets_that_are_not_there(rc, wrong, kind):
    with pytest.raises(kind):
        rc.direct_view(wrong)
    with pytest.raises(kind):
        rc[wrong]
    assert rc.ids == [0, 1]


def test_targets_of_a_single_call(each):
    each.push({"a": 1}, targets=0, block=True)
    assert each.pull("a", targets=0, block=True) == 1
    with pytest.raises(NameError):
        each.pull("a", targets=[1], block=True)


def test_flags(rc):
    view = rc[0]
    assert not view.block
    assert isinstance(view.apply(abs, -1), ipp.AsyncResult)
    view.block = True
    assert view.apply(abs, -1) == 1
    with view.temp_flags(block=False, targets=[0, 1]):
        assert view.apply(abs, -2).get(30) == [2, 2]
    assert view.apply(abs, -3) == 3
    assert view.set_flags(block=False, label="mine") is view
    ar = view.apply(abs, -1)
    assert ar.get(30) == 1 and ar.metadata["label"] == "mine"
    with pytest.raises(TypeError, match="no flag"):
        view.set_flags(colour="red")
    with pytest.raises(TypeError):
        rc.load_balanced_view(nonsense=1)


def test_the_client_s_block_is_the_view_s(rc):
    rc.block = True
    try:
        assert rc[0].apply(abs, -1) == 1
        assert rc.load_balanced_view().map(abs, [-1, -2]) == [1, 2]
    finally:
        rc.block = False


def test_block_overrides(each):
    assert each.map(abs, [-1, -2, -3], block=True) == [1, 2, 3]
    assert each.map_async(abs, [-1]).get(30) == [1]
    each.block = True
    assert isinstance(each.push({"a": 1}, block=False), ipp.AsyncResult)
    assert isinstance(each.apply_async(abs, 1), ipp.AsyncResult)


def test_arguments_by_position_and_name(balanced):
    def f(a, b=2, *rest, c=3, **more):
        return a, b, rest, c, more

    assert balanced.apply_sync(f, 1) == (1, 2, (), 3, {})
    assert balanced.apply_sync(f, 1, 5, 6, c=7, d=8) == (1, 5, (6,), 7, {"d": 8})


# --- names


def test_push_and_pull(each):
    each.push({"a": 1, "b": [2]}, block=True)
    assert each.pull("a", block=True) == [1, 1]
    assert each.pull(["a", "b"], block=True) == [[1, [2]]] * 2
    assert each.pull("a + b[0] * 10", block=True) == [21, 21]
    each["c"] = 3
    assert each["c"] == [3, 3]
    assert each.get("c") == [3, 3]
    each.update({"c": 4}).get(30)
    assert each["a, c"] == [(1, 4)] * 2


def test_names_of_one_engine(rc, each):
    rc[0]["x"] = 5
    assert rc[0]["x"] == 5
    with pytest.raises(NameError, match="'x' is not defined"):
        rc[1]["x"]


def test_clear(each):
    each["x"] = 3
    each.clear(block=True)
    assert "x" not in each["list(globals())"][0]


@pytest.mark.parametrize("wrong", [{"not a name": 1}, {1: 2}])
def test_push_takes_names_only(each, wrong):
    with pytest.raises(ValueError):
        each.push(wrong)


@pytest.mark.parametrize("dist", ["b", "r"])
@pytest.mark.parametrize("seq", [[0, 1, 2, 3, 4, 5, 6], list("abcdefgh"), [1], []], ids=str)
def test_scatter_and_gather(each, seq, dist):
    each.scatter("part", seq, dist=dist, block=True)
    assert each.gather("part", dist=dist, block=True) == seq
    half = (len(seq) + 1) // 2
    assert each["part"] == ([seq[:half], seq[half:]] if dist == "b" else [seq[::2], seq[1::2]])


@pytest.mark.parametrize("dist", ["b", "r"])
@pytest.mark.parametrize("shape", [(10,), (7, 3), (1, 2)], ids=str)
def test_scatter_and_gather_of_arrays(each, shape, dist):
    array = np.arange(np.prod(shape), dtype="int16").reshape(shape)
    each.scatter("part", array, dist=dist, block=True)
    back = each.gather("part", dist=dist, block=True)
    assert type(back) is np.ndarray and back.dtype == array.dtype
    assert np.array_equal(back, array)


def test_scatter_what_can_not_be_sliced(each):
    each.scatter("part", (i * i for i in range(5)), block=True)
    assert each.gather("part", block=True) == [0, 1, 4, 9, 16]
    each.scatter("part", range(4), block=True)
    assert each["part"] == [range(2), range(2, 4)]


def test_scatter_flat(each):
    each.scatter("rank", [10, 20], flatten=True, block=True)
    assert each["rank"] == [10, 20]


def test_scatter_is_an_async_result(each):
    ar = each.scatter("part", [1, 2])
    assert isinstance(ar, ipp.AsyncResult)
    ar.get(30)
    assert each.gather("part").get(30) == [1, 2]
    with pytest.raises(ValueError, match="dist"):
        each.scatter("part", [1], dist="x")
    with pytest.raises(ValueError, match="dist"):
        each.gather("part", dist="x")


# --- code


def test_execute(each):
    replies = each.execute("import math\ny = math.floor(3.7)", block=True)
    assert [reply.result for reply in replies] == [None, None]
    assert each["y"] == [3, 3]


def test_execute_shows_the_last_expression(rc):
    reply = rc[0].execute("y = 20\nprint('printed')\ny + 1", silent=False, block=True)
    assert (reply.result, reply.stdout) == ("21", "printed\n")
    assert "21" in repr(reply)
    assert rc[0]["_"] == 21
    assert rc[0].execute("y + 2", silent=True, block=True).result is None
    assert rc[0].execute("None", silent=False, block=True).result is None


def test_functions_defined_by_execute_see_each_other(each):
    each.execute("def f(n): return 1 if n < 2 else n * g(n - 1)\ndef g(n): return f(n)", block=True)
    assert each["f(5)"] == [120, 120]


def test_a_syntax_error_is_one(rc):
    with pytest.raises(SyntaxError):
        rc[0].execute("a b", block=True)


def test_run(each, tmp_path):
    script = tmp_path / "script.py"
    script.write_text("def double(x):\n    return 2 * x\nvalue = double(21)\n", encoding="utf-8")
    each.run(str(script), block=True)
    assert each["value"] == [42, 42]
    script.write_text("\n\nraise KeyError('from the file')\n", encoding="utf-8")
    with pytest.raises(ipp.CompositeError) as caught:
        each.run(str(script), block=True)
    assert f'"{script}", line 3' in caught.value.elist[0].traceback
    with pytest.raises(FileNotFoundError):
        each.run(str(tmp_path / "missing.py"))


# --- map


@pytest.fixture(params=["direct", "balanced"])
def view(request, rc):
    return rc[:] if request.param == "direct" else rc.load_balanced_view()


@pytest.mark.parametrize("n", [0, 1, 2, 3, 1000])
def test_map(view, n):
    assert view.map_sync(lambda x: x * x, range(n)) == [x * x for x in range(n)]


def test_map_over_several_sequences(view):
    assert view.map_sync(lambda a, b, c: (a, b, c), range(5), "abcde", (x / 2 for x in range(5))) == [
        (i, c, i / 2) for i, c in enumerate("abcde")]


def test_map_stops_with_the_shortest(view):
    assert view.map_sync(lambda a, b: a + b, range(10), [1, 2, 3]) == [1, 3, 5]


def test_map_over_arrays_sets_and_dicts(view):
    array = np.arange(12).reshape(6, 2)
    assert [int(s) for s in view.map_sync(lambda row: row.sum(), array)] == [1, 5, 9, 13, 17, 21]
    assert sorted(view.map_sync(abs, {-1, -2})) == [1, 2]
    assert view.map_sync(lambda key: key.upper(), {"a": 1, "b": 2}) == ["A", "B"]


def test_map_has_no_other_options(rc):
    for view, options in ((rc[:], {"chunksize": 2}), (rc.load_balanced_view(), {"size": 2})):
        for call in (view.map, view.map_sync, view.map_async):
            with pytest.raises(TypeError, match=f"has no option '{[*options][0]}'; its options are block, .*label"):
                call(abs, [1], **options)


def test_map_wants_a_sequence(view):
    with pytest.raises(TypeError):
        view.map(abs)
    with pytest.raises(TypeError):
        view.map(abs, 5)


def test_map_gives_each_engine_of_a_direct_view_one_chunk(rc):
    pids = rc[:].map_sync(lambda x: os.getpid(), range(9))
    assert len(set(pids)) == 2
    assert pids == [pids[0]] * 5 + [pids[-1]] * 4


@pytest.mark.parametrize("chunksize", [1, 3, 10, 100])
def test_chunksize(balanced, chunksize):
    ar = balanced.map_async(abs, range(-10, 0), chunksize=chunksize)
    assert ar.get(30) == list(range(10, 0, -1))
    assert len(ar.msg_ids) == -(-10 // chunksize)
    assert len(ar) == 10


def test_a_large_map_needs_few_tasks(balanced):
    ar = balanced.map_async(abs, range(10_000))
    assert ar.get(30) == list(range(10_000))
    assert len(ar.msg_ids) < 200


@pytest.mark.parametrize("wrong", [0, -1, 1.5, "2", True])
def test_a_chunksize_is_a_whole_number(balanced, wrong):
    with pytest.raises(ValueError, match="chunksize"):
        balanced.map(abs, range(5), chunksize=wrong)


def test_an_exception_fails_its_item_alone(view, tmp_path):
    def f(x):
        with open(os.path.join(tmp_path, str(x)), "w"):
            pass
        return 10 // (x - 3)

    with pytest.raises(ZeroDivisionError):
        view.map_sync(f, range(8))
    assert sorted(os.listdir(tmp_path)) == [str(x) for x in range(8)]  # the others ran
    values = view.map_sync(f, range(8), return_exceptions=True)
    assert isinstance(values[3], ZeroDivisionError) and isinstance(values[3], ipp.RemoteError)
    assert [v for v in values if not isinstance(v, Exception)] == [10 // (x - 3) for x in range(8) if x != 3]


def test_several_exceptions_in_a_map(view):
    with pytest.raises(ipp.CompositeError) as caught:
        view.map_sync(lambda x: 1 // (x % 2), range(10))
    assert len(caught.value.elist) == 5


def test_an_exception_may_be_a_value(view):
    values = view.map_sync(lambda x: ValueError(x), range(3))
    assert [(type(v), v.args) for v in values] == [(ValueError, (x,)) for x in range(3)]


def test_stop_iteration_does_not_end_a_map(view):
    def f(x):
        if x == 2:
            raise StopIteration("from the function")
        return x

    values = view.map_sync(f, range(6), return_exceptions=True)
    assert len(values) == 6
    assert [v for v in values if not isinstance(v, Exception)] == [0, 1, 3, 4, 5]
    assert "StopIteration" in str(values[2])


# --- imap


def test_imap_takes_an_endless_input_as_it_needs_it(view):
    taken = itertools.count()
    results = view.imap(lambda x: x * x, taken)
    assert [next(results) for _ in range(100)] == [x * x for x in range(100)]
    results.close()
    assert next(taken) < 100 + 4 * 2 * 4 * 64  # times as far ahead, engines, chunks for each, items of a chunk


def test_imap_bounds_what_is_under_way(balanced):
    taken = []

    def numbers():
        for i in range(20):
            taken.append(i)
            yield i

    results = balanced.imap(abs, numbers(), max_outstanding=4)
    for i in range(20):
        assert next(results) == i
        assert len(taken) <= i + 1 + 4 * 4
    with pytest.raises(StopIteration):
        next(results)
    with pytest.raises(ValueError, match="max_outstanding"):
        next(balanced.imap(abs, [1], max_outstanding=-1))


def test_imap_unordered_yields_what_is_ready(balanced, tmp_path):
    flag = tmp_path / "flag"
    results = balanced.imap(tasks.hold, [flag, None, None, None], "abcd", ordered=False)
    first = [next(results) for _ in range(3)]
    assert sorted(first) == ["b", "c", "d"]
    flag.touch()
    assert list(results) == ["a"]


def test_imap_of_several_sequences_and_none(view):
    assert list(view.imap(lambda a, b: a + b, range(3), [10, 20])) == [10, 21]
    assert list(view.imap(abs, [])) == []


def test_imap_raises_where_the_item_failed(view):
    results = view.imap(lambda x: 1 // (x - 1), range(3))
    assert next(results) == -1
    with pytest.raises(ZeroDivisionError):
        next(results)


# --- load balancing


def test_both_engines_work(rc, balanced, tmp_path):
    flag = tmp_path / "flag"
    ars = [balanced.apply_async(tasks.report_and_hold, tmp_path / "report", flag) for _ in range(2)]
    reports = tmp_path / "report"
    assert len(set(eventually(lambda: reports.exists() and len(reports.read_text().split()) == 2 and
                              reports.read_text().split()))) == 2
    flag.touch()
    assert {ar.get(30) for ar in ars} == {None}
    assert {ar.metadata["engine_id"] for ar in ars} == {0, 1}


def test_retries(balanced, tmp_path):
    def fail_at_first(mark):
        if not os.path.exists(mark):
            with open(mark, "w") as f:
                f.write(str(os.getpid()))
            raise RuntimeError("first attempt")
        with open(mark) as f:
            return int(f.read()), os.getpid()

    with pytest.raises(RuntimeError, match="first attempt"):
        balanced.apply_sync(fail_at_first, tmp_path / "without")
    with balanced.temp_flags(retries=1):
        ar = balanced.apply_async(fail_at_first, tmp_path / "with")
        first, second = ar.get(30)
        assert first != second  # another engine
        assert ar.metadata["attempt"] == 2
        with pytest.raises(ZeroDivisionError):
            balanced.apply_sync(lambda: 1 / 0)


def test_views_may_be_shared_by_threads(rc):
    view, wrong = rc.load_balanced_view(), []

    def work(k):
        for i in range(100):
            if view.apply_sync(lambda a, b: (a, b), k, i) != (k, i):
                wrong.append((k, i))

    threads = [threading.Thread(target=work, args=(k,)) for k in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    assert wrong == []


def test_queue_status(rc, balanced, tmp_path):
    flag = tmp_path / "flag"
    running = rc[0].apply_async(tasks.hold, flag)
    behind = [rc[0].apply_async(os.getpid) for _ in range(3)]
    status = rc.queue_status()
    assert set(status) == {0, 1, "unassigned"}
    assert status[0]["queue"] + status[0]["tasks"] == 4
    assert status[1]["tasks"] == 0
    assert set(rc[1].queue_status()) == {1, "unassigned"}
    before = status[0]["completed"]
    flag.touch()
    rc.wait([running, *behind], timeout=30)
    assert rc.queue_status()[0]["completed"] == before + 4


def test_repr(rc):
    assert repr(rc[0]) == "<DirectView 0>"
    assert repr(rc[:]) == "<DirectView [0, 1]>"
    assert repr(rc.direct_view()) == "<DirectView all>"
    assert repr(rc.load_balanced_view()) == "<LoadBalancedView all>"
