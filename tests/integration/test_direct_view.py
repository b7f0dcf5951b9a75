"""DirectView: names and expressions, references, imports, scatter and gather, picklers, published data."""

from __future__ import annotations

import builtins
import functools
import os
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import tasks
from support import eventually, need

import ipclite as ipp


@pytest.fixture(autouse=True)
def _default_pickler(rc):
    yield
    rc[:].use_pickle()


# --- names


def test_items_may_be_expressions_and_attributes(each):
    each.execute("class A: pass\na = A()\na.b = 1\nx = 5", block=True)
    assert each["a.b"] == [1, 1]
    assert each["x+1"] == [6, 6]
    each["a.b"] = 7
    assert each["a.b * x"] == [35, 35]
    with pytest.raises(AttributeError):
        each.client[0]["a.c"]
    with pytest.raises(NameError):
        each.client[0]["nobody.b"] = 1


def test_items_of_items(each):
    each["d"] = {"x": {"a.b": [1, 2]}}
    assert each["d['x']['a.b'][1]"] == [2, 2]
    each["d['x']['a.b'][1]"] = 5
    each.push({"d['y']": 6, "d['x']['a.b'][:1]": [7, 8]}, block=True)
    assert each.client[0]["d"] == {"x": {"a.b": [7, 8, 5]}, "y": 6}
    with pytest.raises(KeyError):
        each.client[0]["d['z']['a']"] = 1


@pytest.mark.parametrize("name", ["1a", "a b", "a.", "", "f()", "a + b", "a = 1", "[a, b]", 5])
def test_names_that_can_not_be_set(each, name):
    with pytest.raises(ValueError, match="not a name"):
        each[name] = 1
    with pytest.raises(ValueError, match="not a name"):
        each.scatter(name, [1, 2])


def test_the_targets_of_one_call(rc, each):
    each.push({"a": 1}, targets=-1, block=True)
    assert each.pull("a", targets=-1, block=True) == 1
    assert each.pull("a", targets=[-1], block=True) == [1]
    assert rc[1]["a"] == 1
    each.execute("b = 2", targets=0, block=True)
    assert rc[0]["b"] == 2
    with pytest.raises(NameError):
        rc[1]["b"]
    each.clear(targets=1, block=True)
    with pytest.raises(NameError):
        rc[1]["a"]
    assert rc[0]["b"] == 2


@pytest.mark.parametrize("wrong, kind", [([0, "all"], TypeError), ([0, None], TypeError), ([0, [1]], TypeError), ([0, 1.0], TypeError),
                                         ([0, True], TypeError), ([0, -3], IndexError), (-3, IndexError), ("0", TypeError)])
def test_targets_of_mixed_kinds(rc, each, wrong, kind):
    with pytest.raises(kind):
        each.push({"a": 1}, targets=wrong)
    with pytest.raises(kind):
        rc[wrong]


def test_negative_ids_in_a_list(rc):
    assert rc[[0, -1]].targets == [0, 1]
    assert rc[[-1, -2]].targets == [1, 0]


# --- flags


def test_temporary_flags_go_back_whatever_happens(each):
    with pytest.raises(ZeroDivisionError):
        with each.temp_flags(block=True, label="x", targets=0, track=True) as same:
            assert same is each and each.track
            assert each.apply(abs, -1) == 1
            raise ZeroDivisionError
    assert (each.block, each.label, each.targets, each.track) == (False, None, [0, 1], False)
    with pytest.raises(TypeError, match="no flag 'nonsense'"):
        with each.temp_flags(block=True, nonsense=1):
            pass
    assert not each.block
    with pytest.raises(TypeError):
        each.set_flags(block=True, nonsense=1)
    assert not each.block


def test_labels(each):
    assert each.execute("1", label="mine").metadata[0]["label"] == "mine"
    assert each.map_async(abs, [1], label="other").label == ["other"]
    assert each.run(os.devnull, label="third").label == ["third", "third"]
    with pytest.raises(TypeError, match="label"):
        each.set_flags(label=["no"]).apply(abs, 1)


def test_activate_gives_the_view(each):
    assert each.activate() is each


# --- references

R = ipp.Reference


def test_references_wherever_they_are(each):
    each.push({"a": 5, "f": lambda x, y=0: (x, y)}, block=True)
    assert each.apply_sync(lambda x: x, R("a")) == [5, 5]
    assert each.apply_sync(lambda x: x, [R("a"), (R("a+1"), {"k": [R("-a")]})]) == [[5, (6, {"k": [-5]})]] * 2
    assert each.apply_sync(lambda x, k: (x, k), 1, k=R("a")) == [(1, 5)] * 2
    assert each.apply_sync(R("f"), 1, y=R("a")) == [(1, 5)] * 2
    assert each.apply_sync(functools.partial(max, R("a")), 3) == [5, 5]
    assert each.map_sync(lambda x: x, [R("a"), 1, R("a * 2")]) == [5, 1, 10]
    assert each.map_sync(R("f"), [1, 2, 3]) == [(1, 0), (2, 0), (3, 0)]
    each.push({"b": R("a + 2")}, block=True)
    assert each["b"] == [7, 7]


def test_references_are_looked_up_at_each_call(rc, each):
    at_engine = [R("me")]
    for i in rc.ids:
        rc[i]["me"] = i
    assert each.apply_sync(lambda x: x, R("me")) == [0, 1]
    assert each.apply_sync(lambda: at_engine[0]) == [0, 1]
    each.push({"f": lambda: 1}, block=True)
    assert each.apply_sync(R("f")) == [1, 1]
    each.push({"f": lambda: 2}, block=True)
    assert each.apply_sync(R("f")) == [2, 2]
    each["me"] = 7
    assert each.apply_sync(lambda: at_engine[0]) == [7, 7]


def test_a_reference_to_nothing_is_a_remote_error(each):
    with pytest.raises(NameError, match="nowhere") as caught:
        each.client[0].apply_sync(abs, R("nowhere"))
    assert isinstance(caught.value, ipp.RemoteError)
    with pytest.raises(ZeroDivisionError):
        each.client[0].apply_sync(abs, [R("1/0")])
    with pytest.raises(NameError):
        each.client[0].apply_sync(R("nowhere"), 1)
    with pytest.raises(SyntaxError):
        R("a b")
    with pytest.raises(TypeError, match="Reference"):
        R(5)


def test_a_reference_may_come_back_as_one(rc):
    assert rc[0].apply_sync(lambda: ipp.Reference("x")) == R("x")
    assert hash(R("x")) == hash(R("x")) and R("x") != R("y")


# --- whose names a function sees


def test_values_travel_are_not_kept_and_changes_are_seen(run_main):
    run_main("""
        value, other = 1, [1]
        def f():
            return value, other
        view = rc[:]
        assert view.apply_sync(f) == [(1, [1])] * 2
        value = 2
        assert view.apply_sync(f) == [(2, [1])] * 2
        other.append(2)
        assert view.apply_sync(f) == [(2, [1, 2])] * 2
        assert view.apply_sync(lambda: [n for n in ("value", "other") if n in globals()]) == [[], []]
        try:
            rc[0]["value"]
            raise SystemExit("it lingers")
        except NameError:
            pass
        view["value"] = 10                      # the engine's own win
        assert view.apply_sync(f) == [(10, [1, 2])] * 2
        view.execute("del value", block=True)
        assert view.apply_sync(f) == [(2, [1, 2])] * 2
        def g():
            global made
            made = 5
            return h()
        def h():
            return made + value
        assert view.apply_sync(g) == [7, 7] and view["made"] == [5, 5]
    """)


def test_after_use_cloudpickle_the_clients_values_win(run_main):
    run_main("""
        value = 1
        def f():
            return value
        def both():
            return f(), theirs, len([1, 2])
        view = rc[:]
        view.push({"value": 10, "theirs": 5}, block=True)
        assert view.apply_sync(f) == [10, 10]
        view.use_cloudpickle()
        assert view.apply_sync(f) == [1, 1]
        assert view.apply_sync(both) == [(1, 5, 2)] * 2     # what is not here is still looked up there
        value = 2
        assert view.apply_sync(f) == [2, 2]
        assert rc.load_balanced_view().map_sync(lambda x: x + value, range(3)) == [2, 3, 4]
        assert view["value"] == [10, 10]
        view.push({"pushed": f}, block=True)
        assert view.apply_sync(ipp.Reference("pushed")) == [2, 2]
        view.use_pickle()
        assert view.apply_sync(f) == [10, 10]
    """)


@pytest.fixture
def run_main(rc, tmp_path):
    """A function that runs code as a script that has a client of the shared cluster of two engines, with empty namespaces."""
    rc[:].clear(block=True)
    folder = os.path.dirname(os.path.dirname(ipp.__file__))

    def run(code):
        script = tmp_path / "script.py"
        head = f"import ipclite as ipp\nrc = ipp.Client({str(rc.cluster.connection_file())!r})\n"
        script.write_text(head + textwrap.dedent(code) + "\nrc.close()\nprint('well')\n")
        done = subprocess.run([sys.executable, str(script)], env={**os.environ, "PYTHONPATH": folder}, capture_output=True, text=True,
                              timeout=60)
        assert done.stdout.strip().endswith("well"), done.stderr

    return run


# --- imports


def test_imports_here_and_there(each, capsys):
    with each.sync_imports():
        import colorsys
        import xml.dom.minidom
        import xml.sax as sax
        from collections import OrderedDict as OD
        from collections import abc, deque
    assert colorsys and sax and OD and deque and abc and xml.dom
    assert each["colorsys.__name__, sax.__name__, OD.__name__, deque.__name__, xml.dom.minidom.__name__, abc.__name__"] == [
        ("colorsys", "xml.sax", "OrderedDict", "deque", "xml.dom.minidom", "collections.abc")] * 2
    out = capsys.readouterr().out
    assert "import xml.sax as sax on the engines" in out and "from collections import OrderedDict as OD" in out


def test_an_import_that_fails_on_the_engines(each):
    before = builtins.__import__
    with pytest.raises(ImportError, match="no_such_module") as caught:
        with each.sync_imports(local=False, quiet=True):
            import no_such_module  # noqa: F401
    assert isinstance(caught.value, ipp.RemoteError)
    assert builtins.__import__ is before


def test_the_importer(each, capsys):
    with each.importer:
        import statistics  # noqa: F401
    assert each["statistics.mean([1, 3])"] == [2, 2]
    with each.sync_imports(quiet=True):
        import bisect as b  # noqa: F401
    assert each["b.__name__"] == ["bisect"] * 2
    assert "bisect" not in capsys.readouterr().out


def test_imports_only_there_need_nothing_here(rc, each, tmp_path):
    (tmp_path / "only_there.py").write_text("value = 3")
    each.execute(f"import sys; sys.path.append({str(tmp_path)!r})", block=True)
    with each.sync_imports(local=False, quiet=True):
        import only_there  # noqa: F401
        from only_there import value as v  # noqa: F401
    assert each["only_there.value, v"] == [(3, 3)] * 2
    assert "only_there" not in sys.modules


# --- scatter and gather


@pytest.mark.parametrize("dist", ["b", "r"])
@pytest.mark.parametrize("seq", [list(range(7)), tuple("abcde"), range(3), [], [1]], ids=repr)
def test_lists_go_and_come_back(each, seq, dist):
    each.scatter("a", seq, dist=dist, block=True)
    parts = each["a"]
    assert parts == ([seq[: -(-len(seq) // 2)], seq[-(-len(seq) // 2):]] if dist == "b" else [seq[::2], seq[1::2]])
    assert each.gather("a", dist=dist, block=True) == list(seq)
    assert list(each.gather("a", dist=dist)) == list(seq)


@pytest.mark.parametrize("dist", ["b", "r"])
@pytest.mark.parametrize("n", [0, 1, 2, 7])
def test_arrays_go_and_come_back(each, n, dist):
    for array in (np.arange(n), np.arange(3.0 * n).reshape(n, 3),
                  np.array([(i, i / 2) for i in range(n)], dtype=[("i", int), ("x", float)]).view(np.recarray)):
        each.scatter("a", array, dist=dist, block=True)
        back = each.gather("a", dist=dist, block=True)
        assert type(back) is type(array) and back.dtype == array.dtype and back.shape == array.shape
        assert (np.asarray(back) == np.asarray(array)).all()


def test_generators_sets_and_flattening(rc, each):
    each.scatter("a", (x * x for x in range(4)), block=True)
    assert each.gather("a", block=True) == [0, 1, 4, 9]
    each.scatter("a", "ab", flatten=True, block=True)
    assert each["a"] == ["a", "b"]
    each.scatter("a", [[1, 2], [3, 4]], flatten=True, block=True)
    assert each["a"] == [[1, 2], [3, 4]]
    each.scatter("id", rc.ids, flatten=True, block=True)
    assert each["id"] == [0, 1]
    assert each.gather("id", block=True) == [0, 1]
    rc[0].scatter("a", [1, 2], block=True)
    assert rc[0]["a"] == [1, 2]
    each.scatter("a", [5, 6], targets=[1, 0], block=True)
    assert (rc[0]["a"], rc[1]["a"]) == ([6], [5])


@pytest.mark.parametrize("dist", ["b", "r"])
def test_pandas_objects_go_and_come_back(each, dist):
    try:
        import pandas as pd
    except ImportError:
        pd = None
    need(pd, "pandas")
    frame = pd.DataFrame({"a": range(7), "b": list("abcdefg")}, index=[0.5 * i for i in range(7)])
    for value in (frame, frame["a"]):
        each.scatter("part", value, dist=dist, block=True)
        assert each["len(part)"] == [4, 3]
        back = each.gather("part", dist=dist, block=True)
        assert type(back) is type(value) and back.equals(value)
    assert each.map_sync(lambda x: x, frame["a"]) == list(frame["a"])
    each.scatter("one", frame["a"].iloc[:2], flatten=True, block=True)
    assert each["one"] == [0, 1]


def test_a_wrong_dist(each):
    with pytest.raises(ValueError, match="dist"):
        each.scatter("a", [1], dist="x")
    with pytest.raises(ValueError, match="dist"):
        each.gather("a", dist="x")


# --- picklers


def test_dill(each):
    try:
        import dill
    except ImportError:
        with pytest.raises(ipp.PackError, match="pip install dill"):
            each.use_dill()
        assert each.apply_sync(abs, -1) == [1, 1]
        return
    assert dill
    with pytest.raises(ipp.PackError):
        each.apply(id, (x for x in []).gi_frame)
    each.use_dill()
    assert each.apply_sync(lambda lock: lock.locked(), __import__("threading").Lock()) == [False, False]
    assert [lock.locked() for lock in each.apply_sync(lambda: __import__("threading").Lock())] == [False, False]
    each["x"] = 3
    assert each.apply_sync(ipp.interactive(lambda: x)) == [3, 3]  # noqa: F821
    each.use_pickle()
    with pytest.raises(ipp.PackError):
        each.apply(id, __import__("threading").Lock())


def test_what_is_pickled_once(each):
    class Counted:
        pickled = 0

        def __reduce__(self):
            Counted.pickled += 1
            return list, ((1, 2),)

    once = ipp.PrePickled([Counted(), np.arange(100_000)])
    for _ in range(3):
        for part, array in each.apply_sync(lambda x: (x[0], x[1][:3] + x[1].flags.writeable), once):
            assert part == [1, 2] and list(array) == [1, 2, 3]
    assert Counted.pickled == 1
    assert each.apply_sync(lambda k: k, k={"in": once})[0]["in"][0] == [1, 2]

    def change(x):
        x[1][0] = -1
        return int(x[1][0])

    assert each.apply_sync(change, once) == [-1, -1]
    assert each.apply_sync(lambda x: int(x[1][0]), once) == [0, 0]


# --- published data


def test_data_are_there_while_the_task_runs(rc, tmp_path):
    def work(flag):
        ipp.publish_data({"step": 1, "array": np.arange(3)})
        ipp.publish_data({"step": 2})
        print("between")
        return tasks.hold(flag, "done")

    flag = tmp_path / "flag"
    ar = rc[0].apply_async(work, flag)
    eventually(lambda: ar.data.get("step") == 2, what="published data")
    assert not ar.done() and list(ar.data["array"]) == [0, 1, 2]
    flag.touch()
    assert ar.get(30) == "done" and ar["data"]["step"] == 2 and ar.stdout == "between\n"
    several = rc[:].apply_async(lambda: ipp.publish_data({"x": 1}))
    several.get(30)
    assert several.data == [{"x": 1}] * 2
    assert rc[0].apply_async(abs, 1).data == {}


def test_data_that_can_not_be_published(rc):
    with pytest.raises(RuntimeError, match="engine"):
        ipp.publish_data({"a": 1})
    with pytest.raises(TypeError, match="dict"):
        ipp.publish_data([1])
    with pytest.raises(ipp.PackError):
        rc[0].apply_sync(lambda: ipp.publish_data({"a": (x for x in [])}))
