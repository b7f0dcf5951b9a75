"""Dependencies: on other tasks, and on what a function finds on the engine."""

from __future__ import annotations

import os
import time

import pytest
import tasks
from support import eventually

import ipclite as ipp
from ipclite import Dependency


@pytest.fixture
def flag(tmp_path):
    return tmp_path / "flag"


def fail():
    raise LookupError("on purpose")


# --- the class


def ids(n):
    return [f"{'0' * 16}-{i}" for i in range(1, n + 1)]


def test_a_dependency_is_a_set_of_ids(balanced):
    a, b = balanced.apply_async(abs, 1), balanced.map_async(abs, [1, 2, 3], chunksize=1)
    assert Dependency(a) == set(a.msg_ids)
    assert Dependency([a, b]) == {*a.msg_ids, *b.msg_ids} and len(Dependency([a, b])) == 4
    assert Dependency([a.msg_ids[0], Dependency(b)]) == Dependency([a, b])
    assert Dependency() == set() and Dependency(ids(1)[0]) == set(ids(1))
    again = Dependency.of(Dependency(ids(2), all=False, failure=True).as_dict())
    assert (again, again.all, again.success, again.failure) == (set(ids(2)), False, True, True)


@pytest.mark.parametrize("wrong, kind", [("x", ValueError), ("00-1", ValueError), (5, TypeError), ([None], TypeError), (b"1", TypeError),
                                         ([["zz-1"]], ValueError)])
def test_what_is_no_task(wrong, kind):
    with pytest.raises(kind):
        Dependency(wrong)


def test_flags_that_make_no_sense():
    with pytest.raises(ValueError, match="success, failure or both"):
        Dependency(ids(1), success=False, failure=False)
    with pytest.raises(ValueError, match="keys"):
        Dependency.of({"ids": ids(1)})


@pytest.mark.parametrize("flags, completed, failed, met, hopeless", [
    ({}, [], [], False, False),
    ({}, [0], [], False, False),
    ({}, [0, 1], [], True, False),
    ({}, [0], [1], False, True),
    ({"failure": True}, [0], [1], True, False),
    ({"failure": True, "success": False}, [], [0, 1], True, False),
    ({"failure": True, "success": False}, [0], [], False, True),
    ({"all": False}, [0], [], True, False),
    ({"all": False}, [], [0], False, False),
    ({"all": False}, [], [0, 1], False, True),
    ({"all": False, "failure": True}, [], [1], True, False),
])
def test_check_and_unreachable(flags, completed, failed, met, hopeless):
    two = ids(2)
    dependency = Dependency(two, **flags)
    ended = [two[i] for i in completed], [two[i] for i in failed]
    assert dependency.check(*ended) is met and dependency.unreachable(*ended) is hopeless
    assert Dependency().check([]) and not Dependency().unreachable([])


# --- after and follow


def test_after(balanced, flag):
    first = balanced.apply_async(tasks.hold, flag, 1)
    with balanced.temp_flags(after=first):
        second = balanced.apply_async(os.path.exists, flag)
        many = balanced.map_async(lambda x: os.path.exists(x), [flag] * 10)
    assert balanced.apply_sync(abs, -1) == 1 and not second.done()  # what does not wait overtakes
    flag.touch()
    assert second.get(30) is True and many.get(30) == [True] * 10
    assert first.metadata["completed"] <= second.metadata["started"]


@pytest.mark.parametrize("form", [lambda ar: ar, lambda ar: [ar], lambda ar: ar.msg_ids, lambda ar: ar.msg_ids[0],
                                  lambda ar: Dependency(ar), lambda ar: Dependency(ar).as_dict(), lambda ar: {ar.msg_ids[0]}])
def test_forms_of_a_dependency(balanced, form):
    good, bad = balanced.apply_async(abs, 1), balanced.apply_async(fail)
    assert balanced.set_flags(after=form(good)).apply_sync(abs, -2) == 2
    with pytest.raises(ipp.ImpossibleDependency):
        balanced.set_flags(after=form(bad)).apply_sync(abs, -2)


@pytest.mark.parametrize("nothing", [None, [], Dependency()])
def test_a_dependency_on_nothing(balanced, nothing):
    assert balanced.set_flags(after=nothing, follow=nothing).apply_sync(abs, -2) == 2


def test_follow(rc, balanced):
    for engine in rc.ids:
        first = rc[engine].apply_async(abs, 1)
        with balanced.temp_flags(follow=first):
            ars = [balanced.apply_async(os.getpid) for _ in range(10)]
        assert {ar.get(30) for ar in ars} == {rc[engine].apply_sync(os.getpid)}
    everywhere = rc[:].apply_async(abs, 1)
    with pytest.raises(ipp.ImpossibleDependency, match="different engines"):
        balanced.set_flags(follow=everywhere).apply_sync(abs, 1)
    assert balanced.set_flags(follow=Dependency(everywhere, all=False)).apply_sync(abs, -1) == 1
    first = rc[0].apply_async(abs, 1)
    with pytest.raises(ipp.ImpossibleDependency):
        balanced.set_flags(follow=first, targets=[1]).apply_sync(abs, 1)


def test_success_and_failure(balanced):
    good, bad = balanced.apply_async(abs, 1), balanced.apply_async(fail)
    for dependency, fine in [(Dependency(bad, success=False, failure=True), True), (Dependency(good, success=False, failure=True), False),
                             (Dependency([good, bad], failure=True), True), (Dependency([good, bad]), False),
                             (Dependency([good, bad], all=False), True)]:
        ar = balanced.set_flags(after=dependency).apply_async(abs, -3)
        if fine:
            assert ar.get(30) == 3
        else:
            with pytest.raises(ipp.ImpossibleDependency):
                ar.get(30)


def test_what_becomes_impossible_fails_at_once_and_so_does_what_depends_on_it(balanced, flag):
    first = balanced.apply_async(tasks.hold, flag)
    with balanced.temp_flags(after=balanced.apply_async(fail)):
        bad = balanced.apply_async(abs, 1)
    with balanced.temp_flags(after=[first, bad]):
        worse = balanced.apply_async(abs, 1)
    with pytest.raises(ipp.ImpossibleDependency):
        worse.get(30)  # while `first` still runs
    assert not first.done()
    flag.touch()
    first.get(30)


def test_a_task_that_nobody_knows(rc, balanced):
    for unknown in (f"{'ab' * 8}-5", f"{rc.session.hex()}-999999"):
        with pytest.raises(ipp.InvalidDependency, match=unknown):
            balanced.set_flags(after=unknown).apply_sync(abs, 1)


def test_an_aborted_task_fails_what_depends_on_it(rc, balanced, flag):
    busy = [rc[i].apply_async(tasks.hold, flag) for i in rc.ids]
    eventually(lambda: all(rc.queue_status()[i]["queue"] for i in rc.ids))
    first = rc[0].apply_async(abs, 1)
    with balanced.temp_flags(after=first):
        second = balanced.apply_async(abs, 1)
    first.abort()
    with pytest.raises(ipp.TaskAborted):
        first.get(30)
    with pytest.raises(ipp.ImpossibleDependency):
        second.get(30)
    flag.touch()
    rc.wait(busy, timeout=30)


def test_a_chain_of_thousands(balanced):
    def chain(start):
        last = start
        for _ in range(3000):
            with balanced.temp_flags(after=last):
                last = balanced.apply_async(abs, -1)
        return last

    assert chain(balanced.apply_async(abs, -1)).get(60) == 1
    with pytest.raises(ipp.ImpossibleDependency):
        chain(balanced.apply_async(fail)).get(60)


def test_a_fan_in_of_thousands(rc, balanced):
    many = balanced.map_async(abs, range(2000), chunksize=1)
    assert balanced.set_flags(after=many).apply_sync(abs, -1) == 1
    assert many.done()


def test_tasks_of_other_clients(rc, balanced, flag):
    with ipp.Client(rc.cluster.connection_file()) as other:
        first = other.load_balanced_view().apply_async(tasks.hold, flag)
        other._connection.flush()
        eventually(lambda: sum(s["tasks"] for i, s in rc.queue_status().items() if i != "unassigned"))
        second = balanced.set_flags(after=first).apply_async(os.path.exists, flag)
        flag.touch()
        assert second.get(30) is True and first.get(30) is None


# --- checks on the engine


@pytest.fixture
def numbered(rc, each):
    each.scatter("id", rc.ids, flatten=True, block=True)
    return each


def test_depend(rc, balanced, numbered):
    check = ipp.interactive(lambda *wanted: id in wanted)
    where = ipp.interactive(lambda: id)
    f = ipp.depend(check, 1)(where)
    assert [balanced.apply_async(f).get(30) for _ in range(20)] == [1] * 20
    assert balanced.map_sync(ipp.depend(check, 1)(lambda x: (x, os.getpid())), range(20)) == [
        (x, rc[1].apply_sync(os.getpid)) for x in range(20)]
    assert ipp.dependent(where, check, 0, 1).func is where
    assert balanced.apply_sync(ipp.dependent(where, check, 0)) == 0


def test_a_check_that_holds_nowhere_fails_at_once(rc, balanced):
    f = ipp.depend(lambda: False)(abs)
    for view in (balanced, rc[0]):
        with pytest.raises(ipp.ImpossibleDependency):
            view.apply_sync(f, 1)
    with pytest.raises(ipp.ImpossibleDependency):
        balanced.map_sync(f, [1, 2], chunksize=2)
    with pytest.raises(ipp.UnmetDependency):  # its base class, which scripts catch
        balanced.set_flags(retries=3).apply_sync(f, 1)


@pytest.mark.parametrize("value, fine", [(None, True), (0, True), (True, True), ([], True), (False, False)])
def test_only_false_means_no(balanced, value, fine):
    f = ipp.depend(lambda: value)(abs)
    if fine:
        assert balanced.apply_sync(f, -1) == 1
    else:
        with pytest.raises(ipp.ImpossibleDependency):
            balanced.apply_sync(f, -1)


def test_a_check_or_task_may_raise_unmet_dependency(rc, balanced):
    pid = rc[1].apply_sync(os.getpid)

    def check():
        if os.getpid() != pid:
            raise ipp.UnmetDependency("not here")

    assert {balanced.apply_async(ipp.depend(check)(os.getpid)).get(30) for _ in range(10)} == {pid}

    def task():
        check()
        return os.getpid()

    assert {balanced.apply_async(task).get(30) for _ in range(10)} == {pid}
    with pytest.raises(ZeroDivisionError):
        balanced.apply_sync(ipp.depend(lambda: 1 / 0)(abs), 1)


def test_a_check_works_where_the_function_is_called_here():
    f = ipp.depend(lambda: False)(abs)
    with pytest.raises(ipp.UnmetDependency):
        f(1)
    assert ipp.depend(lambda: True)(abs)(-1) == 1


def test_the_names_of_dependent_functions():
    @ipp.depend(lambda: True)
    def f():
        "Says something."

    assert f.__name__ == "f" and f.__doc__ == "Says something."


def test_require(rc, balanced, each):
    import colorsys

    main = {"__name__": "__main__"}
    exec("def helper(x):\n    return x + offset\n"
         "def f(x):\n    return statistics.mean([helper(x)]), colorsys.__name__, xml.dom.__name__\n", main)
    f = ipp.require("statistics", "xml.dom", colorsys, main["helper"], offset=10)(main["f"])
    assert f.__name__ == "f"
    assert balanced.apply_sync(f, 1) == (11, "colorsys", "xml.dom")
    assert balanced.map_sync(f, [1, 2])[1][0] == 12


def test_require_goes_where_the_module_is(rc, balanced, tmp_path):
    (tmp_path / "rare_module.py").write_text("value = 5")
    with pytest.raises(ipp.ImpossibleDependency):
        balanced.apply_sync(ipp.require("rare_module")(abs), 1)
    rc[1].execute(f"import sys; sys.path.append({str(tmp_path)!r})", block=True)
    pid = rc[1].apply_sync(os.getpid)
    f = ipp.require("rare_module")(os.getpid)
    assert {balanced.apply_async(f).get(30) for _ in range(10)} == {pid}


@pytest.mark.parametrize("wrong, kind", [("a b", ValueError), ("", ValueError), (5, TypeError), (["numpy"], TypeError)])
def test_what_can_not_be_required(wrong, kind):
    with pytest.raises(kind):
        ipp.require(wrong)


def test_refusals_do_not_take_an_engine_out(rc, balanced):
    with pytest.raises(ipp.ImpossibleDependency):
        balanced.apply_sync(ipp.depend(lambda: False)(abs), 1)
    deadline = time.monotonic() + 30
    seen = set()
    while len(seen) < 2 and time.monotonic() < deadline:
        seen.add(balanced.apply_sync(os.getpid))
    assert len(seen) == 2
