"""Exceptions of tasks: their type, their traceback, several at once, and what can not be pickled."""

from __future__ import annotations

import json
import os
import pickle
import socket
import threading

import pytest

import ipclite as ipp


class Custom(Exception):
    def __init__(self, code, *, hint):
        super().__init__(code)
        self.code, self.hint = code, hint


def raised(view, f, *args):
    with pytest.raises(ipp.RemoteError) as caught:
        view.apply_sync(f, *args)
    return caught.value


def test_an_exception_is_caught_as_its_own_class_and_as_remote_error(balanced):
    for kind in (ZeroDivisionError, ArithmeticError, ipp.RemoteError, ipp.KernelError, ipp.IPythonError):
        with pytest.raises(kind):
            balanced.apply_sync(lambda: 1 / 0)
    assert str(raised(balanced, lambda: 1 / 0)) == "division by zero"


def test_traceback_engine_and_host(rc):
    def inner(x):
        return 1 // x  # the line of the user

    def outer(x):
        return inner(x)

    e = raised(rc[1], outer, 0)
    assert (e.ename, e.evalue) == ("ZeroDivisionError", "integer division or modulo by zero")
    assert "return 1 // x  # the line of the user" in e.traceback
    assert "in outer" in e.traceback and __file__ in e.traceback
    assert os.path.dirname(ipp.__file__) not in e.traceback  # only the user's own frames
    assert e.engine_info["engine_id"] == 1
    assert e.engine_info["host"] == socket.gethostname()
    assert e.engine_info["pid"] == rc[1].apply_sync(os.getpid)
    shown = "\n".join(e.render_traceback())
    assert f"engine 1 on {socket.gethostname()}" in shown and "the line of the user" in shown
    assert "the line of the user" in str(e.__cause__)  # so that an uncaught one shows it


def test_print_traceback(balanced, capsys):
    raised(balanced, lambda: 1 / 0).print_traceback()
    assert "ZeroDivisionError" in capsys.readouterr().err


def test_the_cause_and_context_are_in_the_traceback(balanced):
    def f():
        try:
            {}["missing"]
        except KeyError as e:
            raise ValueError("outer") from e

    text = raised(balanced, f).traceback
    assert "KeyError: 'missing'" in text and "ValueError: outer" in text and "direct cause" in text


def test_a_recursion_error_is_not_a_book(balanced):
    def f():
        return f()

    e = raised(balanced, f)
    assert isinstance(e, RecursionError)
    assert len(e.traceback) < 20_000


@pytest.mark.parametrize("make", [
    lambda: OSError(2, "No such file", "/nowhere"),
    lambda: UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad"),
    lambda: KeyError("key"),
    lambda: json.JSONDecodeError("bad", "doc", 1),
    lambda: SyntaxError("bad", ("file", 1, 2, "text")),
    lambda: ImportError("no", name="module"),
    lambda: StopIteration(3),
    lambda: TimeoutError("slow"),
    lambda: ConnectionResetError("gone"),
    lambda: AssertionError(),
], ids=lambda make: type(make()).__name__)
def test_classes_with_state_of_their_own(balanced, make):
    def f():
        raise make()

    original, e = make(), raised(balanced, f)
    assert isinstance(e, type(original))
    assert e.args == original.args
    assert str(e) == str(original)
    for name in ("errno", "filename", "reason", "pos", "lineno", "name", "value"):
        assert getattr(e, name, None) == getattr(original, name, None)


def test_an_odd_constructor_and_attributes(balanced):
    def f():
        raise Custom(7, hint="h")

    e = raised(balanced, f)
    assert isinstance(e, Custom)
    assert (e.code, e.hint, e.args) == (7, "h", (7,))


def test_a_class_made_in_the_task(balanced):
    def f():
        class Local(ValueError):
            pass

        raise Local("here")

    e = raised(balanced, f)
    assert e.ename.endswith("Local")
    assert isinstance(e, ValueError)


def test_an_exception_that_can_not_be_pickled(balanced):
    def f():
        e = ValueError("with a lock")
        e.lock = threading.Lock()
        raise e

    e = raised(balanced, f)
    assert e.ename == "ValueError" and "with a lock" in str(e)
    assert balanced.apply_sync(abs, -1) == 1


def test_an_exception_whose_str_fails(balanced):
    def f():
        class Hostile(Exception):
            def __str__(self):
                raise RuntimeError("no str")

            __repr__ = __str__

        raise Hostile

    assert "Hostile" in raised(balanced, f).ename
    assert balanced.apply_sync(abs, -1) == 1


@pytest.mark.parametrize("kind", [SystemExit, KeyboardInterrupt, GeneratorExit])
def test_what_would_end_the_client_comes_as_remote_error_only(balanced, kind):
    def f():
        raise kind("now")

    e = raised(balanced, f)
    assert not isinstance(e, kind)
    assert e.ename == kind.__name__


def test_remote_errors_can_be_pickled_and_raised_again(balanced):
    e = raised(balanced, lambda: 1 / 0)
    again = pickle.loads(pickle.dumps(e))
    assert (again.ename, again.traceback, again.engine_info) == (e.ename, e.traceback, e.engine_info)
    ar = balanced.apply_async(lambda: 1 / 0)
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            ar.get(30)
    assert isinstance(ar.exception(), ZeroDivisionError)


def test_an_exception_as_argument_and_result(balanced):
    e = balanced.apply_sync(lambda e: e, ValueError("v", 1))
    assert type(e) is ValueError and e.args == ("v", 1)


# --- several


def test_several_errors_are_one_short_composite(rc):
    with pytest.raises(ipp.CompositeError) as caught:
        rc[:].apply_sync(lambda: 1 / 0)
    e = caught.value
    assert isinstance(e, ipp.RemoteError)
    assert [type(x).__name__ for x in e.elist] == ["ZeroDivisionError"] * 2
    assert [x.engine_info["engine_id"] for x in e.elist] == [0, 1]
    assert len(str(e).splitlines()) == 3
    for x in e.elist:
        assert isinstance(x, ZeroDivisionError)
    with pytest.raises(ZeroDivisionError):
        e.raise_exception(1)
    with pytest.raises(IndexError):
        e.raise_exception(2)


def test_a_composite_of_many_shows_a_few(balanced, capsys):
    def f(x):
        raise ValueError("line one\n" + "x" * 10_000)

    with pytest.raises(ipp.CompositeError) as caught:
        balanced.map_sync(f, range(1000), chunksize=100)
    e = caught.value
    assert len(e.elist) == 1000
    assert len(str(e)) < 1000 and "996 more" in str(e)
    assert len(repr(e)) < 100
    e.print_traceback(3)
    assert "in f" in capsys.readouterr().err
    assert len(e.render_traceback()) < 200


def test_one_error_of_several_tasks_is_itself(rc, each):
    each.scatter("bad", [False, True], flatten=True, block=True)
    with pytest.raises(ZeroDivisionError) as caught:
        each.execute("1 / (not bad)", block=True)
    assert not isinstance(caught.value, ipp.CompositeError)
    assert caught.value.engine_info["engine_id"] == 1


def test_return_exceptions(rc, each):
    each.scatter("bad", [False, True], flatten=True, block=True)
    good, bad = each.execute("1 / (not bad)").get(30, return_exceptions=True)
    assert good.metadata["engine_id"] == 0
    assert isinstance(bad, ZeroDivisionError)


def test_errors_in_code_name_the_line(rc):
    with pytest.raises(KeyError) as caught:
        rc[0].execute("a = 1\nb = {}['missing']", block=True)
    assert "line 2" in caught.value.traceback and "b = {}['missing']" in caught.value.traceback


# --- pickling


def test_what_can_not_be_pickled_is_an_error_of_that_task_alone(balanced):
    with pytest.raises(ipp.PackError, match="lock"):
        balanced.apply_async(len, threading.Lock()).get(30)
    with pytest.raises(ipp.PackError, match="argument 1"):
        balanced.apply_async(max, 1, threading.Lock()).get(30)
    with pytest.raises(ipp.PackError, match="lock"):
        balanced.apply_async(threading.Lock).get(30)
    with pytest.raises(ipp.PackError):
        balanced.map_async(lambda x: threading.Lock() if x == 3 else x, range(10), chunksize=5).get(30)
    lock = threading.Lock()
    with pytest.raises(ipp.PackError, match="lock"):
        balanced.apply_async(lambda: lock).get(30)
    assert balanced.apply_sync(abs, -1) == 1


def test_what_belongs_to_this_process(rc, balanced):
    ar = balanced.apply_async(abs, -1)
    for given, words in ((ar, "AsyncResult.*pass its value"), (rc, "Client.*of its own"), (balanced, "LoadBalancedView.*of its own")):
        for call in (lambda given=given: balanced.apply(abs, given), lambda given=given: balanced.apply(lambda: given)):
            with pytest.raises(ipp.PackError, match=words) as caught:
                call()
            assert "attribute" not in str(caught.value)
    assert ar.get(30) == 1


def test_pushing_and_pulling_what_can_not_be_pickled(rc, each):
    with pytest.raises(ipp.PackError):
        each.push({"lock": threading.Lock()}, block=True)
    each.execute("import threading; lock = threading.Lock()", block=True)
    with pytest.raises(ipp.PackError):
        rc[0]["lock"]
    assert each.apply_sync(abs, -1) == [1, 1]


def test_a_result_that_breaks_here(balanced):
    class Breaks:
        def __reduce__(self):
            return int, ("not a number",)

    with pytest.raises(ipp.UnpackError, match="not a number"):
        balanced.apply_sync(Breaks)
    with pytest.raises(ipp.KernelError, match="not a number"):
        balanced.apply_sync(id, Breaks())
    assert balanced.apply_sync(abs, -1) == 1


def test_a_result_whose_class_is_unknown_here(balanced):
    def f():
        import sys
        import types

        module = types.ModuleType("only_there")
        exec("class Thing: pass", module.__dict__)
        module.Thing.__module__ = "only_there"
        sys.modules["only_there"] = module
        return module.Thing()

    with pytest.raises(ipp.UnpackError, match="only_there"):
        balanced.apply_sync(f)
    assert balanced.apply_sync(abs, -1) == 1


def test_an_exception_whose_class_is_unknown_here(balanced):
    def f():
        import sys
        import types

        module = types.ModuleType("only_there_too")
        exec("class Oops(Exception): pass", module.__dict__)
        module.Oops.__module__ = "only_there_too"
        sys.modules["only_there_too"] = module
        raise module.Oops("strange")

    e = raised(balanced, f)
    assert "Oops" in e.ename and "strange" in str(e)


def test_a_module_that_the_engine_lacks(balanced, monkeypatch):
    import sys
    import types

    module = types.ModuleType("only_here")
    exec("def f(): return 1", module.__dict__)
    module.f.__module__ = "only_here"
    monkeypatch.setitem(sys.modules, "only_here", module)
    with pytest.raises(ipp.KernelError, match="only_here"):
        balanced.apply_sync(module.f)
    assert balanced.apply_sync(abs, -1) == 1
