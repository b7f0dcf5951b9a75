"""Decorators: remote and parallel functions, interactive ones."""

from __future__ import annotations

import os

import numpy as np
import pytest
import tasks

import ipclite as ipp


def test_a_remote_function(rc):
    @ipp.remote(rc[:], block=True)
    def add(a, b=1):
        "Their sum."
        return a + b

    assert isinstance(add, ipp.RemoteFunction)
    assert (add.__name__, add.__doc__) == ("add", "Their sum.")
    assert add(1) == [2, 2] and add(1, b=5) == [6, 6]
    assert add.func(1) == 2 and "add" in repr(add)


def test_block_and_flags_of_a_remote_function(rc, balanced):
    later = balanced.remote()(os.getpid)
    assert isinstance(later(), ipp.AsyncResult)
    assert later().get(30) in rc[:].apply_sync(os.getpid)
    assert balanced.remote(block=True)(abs)(-1) == 1
    there = rc[:].remote(block=True, targets=1, label="mine")(os.getpid)
    assert there() == rc[1].apply_sync(os.getpid)
    assert rc[:].remote(label="mine")(abs)(1).label == ["mine", "mine"]
    view = rc[:]
    view.remote(block=True, targets=0)(abs)(1)
    assert (view.targets, view.block) == ([0, 1], False)
    with pytest.raises(TypeError, match="no flag"):
        view.remote(nonsense=1)(abs)


def test_a_remote_function_follows_its_view(rc):
    view = rc[:]
    f = view.remote()(abs)
    assert isinstance(f(-1), ipp.AsyncResult)
    view.block, view.targets = True, 0
    assert f(-1) == 1


def test_a_remote_function_may_call_itself(balanced):
    @balanced.remote(block=True)
    def factorial(n):
        return 1 if n < 2 else n * factorial(n - 1)

    assert factorial(5) == 120


@pytest.mark.parametrize("dist, parts", [("b", [[0, 1, 2], [3, 4]]), ("r", [[0, 2, 4], [1, 3]])])
def test_a_parallel_function_gets_parts(rc, dist, parts):
    @ipp.parallel(rc[:], dist=dist, block=True)
    def negative(xs):
        return [-x for x in xs]

    assert isinstance(negative, ipp.ParallelFunction) and negative.__name__ == "negative"
    assert negative(range(5)) == [0, -1, -2, -3, -4]
    seen = rc[:].parallel(dist=dist, block=True)(lambda xs: [list(xs)])
    assert sorted(seen(range(5))) == parts
    add = rc[:].parallel(dist=dist, block=True)(lambda xs, ys: xs + ys)
    array = np.arange(7)
    assert (add(array, 10 * array) == 11 * array).all()
    assert (add(array, np.arange(9)) == 2 * array).all()  # as long as the shortest


def test_parts_that_are_not_sequences(rc):
    assert rc[:].parallel(block=True)(sum)(range(10)) == [10, 35]


def test_the_map_of_a_parallel_function(rc, balanced):
    for view in (rc[:], balanced):
        f = view.parallel(block=True)(lambda x, y=0: x - y)
        assert f.map(range(5)) == list(range(5))
        assert f.map(range(5), range(5)) == [0] * 5
        assert isinstance(view.parallel()(abs).map([1]), ipp.AsyncMapResult)


def test_options_of_a_parallel_function(rc, balanced):
    sizes = balanced.parallel(block=True, chunksize=3)(len)
    assert sorted(sizes(range(10))) == [2, 2, 3, 3]
    assert balanced.parallel(block=True)(len)(range(4)) == [1, 1, 1, 1]
    assert balanced.parallel(block=True)(len)([]) == []
    assert len(balanced.parallel(chunksize=2)(abs).map(range(5)).msg_ids) == 3
    values = balanced.parallel(block=True, return_exceptions=True)(lambda x: 1 // x).map([0, 1])
    assert isinstance(values[0], ZeroDivisionError) and values[1] == 1
    parts = balanced.parallel(block=True, return_exceptions=True)(lambda part: [1 // part[0]])([0, 1])
    assert isinstance(parts[0], ZeroDivisionError) and parts[1] == 1
    assert sorted(balanced.parallel(ordered=False)(abs).map(range(5))) == list(range(5))
    with pytest.raises(ZeroDivisionError):
        rc[0].parallel(block=True)(lambda part: 1 / 0)([1])
    with pytest.raises(ValueError, match="dist"):
        rc[:].parallel(dist="x", block=True)(abs)([1])
    with pytest.raises(ValueError, match="chunksize"):
        balanced.parallel(chunksize=-1, block=True)(abs)([1])
    with pytest.raises(TypeError, match="sequence"):
        rc[:].parallel(block=True)(abs)()


def test_interactive_functions_use_the_engine_s_namespace(rc, each):
    each["PATIENCE_S"] = "theirs"

    def f(x, *, y=2):
        "Doc."
        return PATIENCE_S, x, y  # noqa: F821

    g = ipp.interactive(f)
    assert (g.__name__, g.__doc__, g.__module__) == ("f", "Doc.", "__main__")
    assert each.apply_sync(g, 1) == [("theirs", 1, 2)] * 2
    with pytest.raises(NameError):
        rc[0].apply_sync(f, 1)
    assert ipp.interactive(len) is len

    @ipp.interactive
    def set_it():
        global made
        made = 5

    each.apply_sync(set_it)
    assert each["made"] == [5, 5]
    assert tasks.PATIENCE_S == 60
