"""The exceptions: how they read, and how those of a task reach the client."""

from __future__ import annotations

import builtins
import copyreg
import functools
import json
import pickle
import subprocess
import sys
import textwrap
import threading
from typing import Any, Callable

import pytest

from ipclite import errors, pack, wire

pytest.importorskip("cloudpickle")

WHERE = {"engine_id": 3, "engine_uuid": "abc", "host": "node1", "pid": 42}
BIG = 300 * 1024


def main_scope(source: str) -> dict[str, Any]:
    """The namespace of a script, as `__main__` has it, after running `source`."""
    scope: dict[str, Any] = {"__name__": "__main__", "__builtins__": builtins}
    exec(compile(textwrap.dedent(source), "<script>", "exec"), scope)
    return scope


def _raise(error: BaseException) -> None:
    raise error


def error_trip(raiser: Callable[[], Any]) -> errors.KernelError:
    try:
        raiser()
    except BaseException as e:
        return pack.unpack_error(pack.pack_error(e, WHERE))
    raise AssertionError("nothing was raised")


def test_a_remote_error_keeps_type_text_and_place() -> None:
    error = error_trip(main_scope("def inner(): return {}['key']\ndef f(): inner()")["f"])
    assert isinstance(error, KeyError) and isinstance(error, errors.RemoteError)
    assert str(error) == "'key'" and (error.ename, error.evalue) == ("KeyError", "'key'")
    assert error.engine_info == WHERE
    assert "in inner" in error.traceback and error.traceback.endswith("KeyError: 'key'\n")


def test_the_traceback_has_causes() -> None:
    error = error_trip(main_scope("""
        def f():
            try:
                1 / 0
            except ZeroDivisionError as e:
                raise ValueError("outer") from e
    """)["f"])
    assert isinstance(error, ValueError)
    assert "ZeroDivisionError" in error.traceback and "direct cause" in error.traceback


class TakesTwo(Exception):
    def __init__(self, a: int, b: int):
        super().__init__("only one")
        self.a = a


class TakesKeywords(Exception):
    def __init__(self, *, a: int):
        super().__init__("m")
        self.a = a


class Carries(Exception):
    def __init__(self, lock: Any):
        super().__init__("carries", lock)
        self.lock = lock

    def __str__(self) -> str:
        return "carries a lock"


def test_exceptions_that_pickle_can_not_rebuild_keep_their_type() -> None:
    for error in (TakesTwo(1, 2), TakesKeywords(a=1)):
        back = error_trip(functools.partial(_raise, error))
        assert type(error) in type(back).__mro__ and str(back) == str(error) and back.a == 1  # type: ignore[attr-defined]
    back = error_trip(functools.partial(_raise, Carries(threading.Lock())))
    assert isinstance(back, Carries) and str(back) == "carries a lock"


class Hostile(Exception):
    def __str__(self) -> str:
        raise ValueError

    def __reduce__(self) -> Any:
        raise ValueError


def test_a_hostile_exception_still_has_its_name() -> None:
    back = error_trip(functools.partial(_raise, Hostile()))
    assert isinstance(back, errors.RemoteError) and back.ename == "Hostile"


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt(), GeneratorExit()], ids=repr)
def test_exits_do_not_end_the_client(error: BaseException) -> None:
    back = error_trip(functools.partial(_raise, error))
    assert type(back) is errors.RemoteError and back.ename == type(error).__name__


def test_errors_that_nobody_raised() -> None:
    back = pack.unpack_error(pack.describe_error("EngineError", "killed by SIGKILL", **WHERE))
    assert type(back) is errors.EngineError and str(back) == "killed by SIGKILL"


def test_an_unreadable_error_is_an_error() -> None:
    for payload in (b"", b"\x05\0\0\0{}", b"\xff\xff\xff\xff", wire.encode_error({})[:-1], [], [b"\x02\0", b"\0\0[]"]):
        assert isinstance(pack.unpack_error(payload), errors.UnpackError)
    assert isinstance(pack.unpack_error(wire.encode_error({"ename": "A"}, b"\x80garbage")), errors.RemoteError)


def test_large_exceptions_and_pieces() -> None:
    back = error_trip(functools.partial(_raise, ValueError(b"x" * BIG)))
    assert isinstance(back, ValueError) and back.args == (b"x" * BIG,)
    payload = pack.pack_error(ValueError(1), WHERE)
    assert isinstance(payload, bytes)
    assert isinstance(pack.unpack_error([memoryview(payload)[:10], bytearray(payload[10:])]), ValueError)


def test_surrogates_in_messages() -> None:
    assert str(error_trip(functools.partial(_raise, ValueError("a\udc80é")))) == "a\udc80é"


def test_own_errors_come_back_as_themselves() -> None:
    back = error_trip(functools.partial(_raise, errors.UnmetDependency("not here")))
    assert type(back) is errors.UnmetDependency and str(back) == "not here"
    assert back.engine_info == WHERE  # type: ignore[attr-defined]


def own_classes() -> list[type]:
    return [c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, errors.IPythonError)]


def test_the_tree() -> None:
    for kind in own_classes():
        assert issubclass(kind, Exception) and kind.__doc__
    assert issubclass(errors.CompositeError, errors.RemoteError) and issubclass(errors.RemoteError, errors.KernelError)
    assert issubclass(errors.ConnectionFileError, OSError) and issubclass(errors.ConnectError, TimeoutError)
    assert errors.TimeoutError is TimeoutError
    codes = {kind.exit_code for kind in own_classes() if issubclass(kind, errors.UserError)}
    assert codes == {1, 2, 10, 11, 12}


@pytest.mark.parametrize("kind", [k for k in own_classes() if issubclass(k, errors.KernelError)
                                  and not issubclass(k, errors.RemoteError)], ids=lambda k: k.__name__)
def test_every_own_error_travels_by_name(kind: Any) -> None:
    back = pack.unpack_error(pack.describe_error(kind.__name__, "why", **WHERE))
    assert type(back) is kind and str(back) == "why"


def test_only_own_errors_travel_by_name() -> None:
    for name in ("SystemExit", "sys", "UserError", "RemoteError", "remote_error", "IPythonError", "Nobody"):
        back = pack.unpack_error(pack.describe_error(name, "why"))
        assert type(back) is errors.RemoteError and back.ename == name


def caught(f: Callable[[], Any]) -> Exception:
    try:
        f()
    except Exception as e:
        return e
    raise AssertionError("nothing was raised")


class Slotted(Exception):
    __slots__ = ("level",)

    def __init__(self, level: int):
        super().__init__("slotted")
        self.level = level

    def __reduce__(self) -> Any:
        return Slotted, (self.level,)


class MakesItself(Exception):
    def __new__(cls, a: int, b: int) -> "MakesItself":
        return super().__new__(cls, a, b)


BUILT_IN = {
    "OSError": (lambda: open("/no/such/file"), ["errno", "strerror", "filename"]),
    "OSError with two files": (lambda: _raise(OSError(1, "text", "a", None, "b")), ["errno", "filename", "filename2"]),
    "OSError with text": (lambda: _raise(OSError("text")), ["errno"]),
    "decode": (lambda: b"\xff".decode(), ["start", "end", "object", "encoding"]),
    "encode": (lambda: "\udc80".encode(), ["start", "reason"]),
    "syntax": (lambda: compile("x x", "file", "exec"), ["filename", "lineno", "text", "msg"]),
    "import": (lambda: __import__("no_such_module"), ["name"]),
    "key": (lambda: {}["key"], []),
    "stop": (lambda: _raise(StopIteration(5)), ["value"]),
    "memory": (lambda: _raise(MemoryError()), []),
    "recursion": (lambda: _raise(RecursionError("deep")), []),
    "json": (lambda: json.loads("{"), ["lineno", "doc", "pos"]),
    "process": (lambda: subprocess.run([sys.executable, "-S", "-c", "exit(3)"], check=True), ["returncode", "cmd"]),
    "slots": (lambda: _raise(Slotted(4)), ["level"]),
    "new": (lambda: _raise(MakesItself(1, 2)), []),
}


@pytest.mark.parametrize("name", BUILT_IN)
def test_fields_and_text_of_an_exception_are_kept(name: str) -> None:
    raiser, fields = BUILT_IN[name]
    original = caught(raiser)
    back = error_trip(raiser)
    assert isinstance(back, type(original)) and isinstance(back, errors.RemoteError)
    assert str(back) == str(original) and back.args == original.args
    assert [getattr(back, f) for f in fields] == [getattr(original, f) for f in fields]
    assert type(back).__name__ == type(original).__name__


@pytest.mark.skipif(sys.version_info < (3, 11), reason="exception groups came with Python 3.11")
def test_exception_groups() -> None:
    group = builtins.ExceptionGroup("group", [ValueError(1), TypeError(2)])  # type: ignore[attr-defined]
    back: Any = error_trip(functools.partial(_raise, group))
    assert isinstance(back, type(group)) and [type(e) for e in back.exceptions] == [ValueError, TypeError]


def test_notes_and_attributes_are_kept() -> None:
    error = ValueError("v")
    error.__dict__.update(__notes__=["a note"], extra=[1])
    back: Any = error_trip(functools.partial(_raise, error))
    assert back.extra == [1] and back.__notes__ == ["a note"]


def test_a_remote_error_shows_where_it_happened() -> None:
    back: Any = error_trip(lambda: 1 / 0)
    cause = str(back.__cause__)
    assert cause.startswith("\n[engine 3 on node1, pid 42]") and "ZeroDivisionError" in cause
    assert back.render_traceback()[0] == "[engine 3 on node1, pid 42]"
    assert str(errors.RemoteError("Name", "value")) == "Name: value" and str(errors.RemoteError("Name")) == "Name"


def test_print_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    back: Any = error_trip(lambda: 1 / 0)
    back.print_traceback()
    out, err = capsys.readouterr()
    assert not out and err.startswith("[engine 3") and err.rstrip().endswith("ZeroDivisionError: division by zero")


def test_remote_errors_can_be_pickled_again() -> None:
    back: Any = error_trip(lambda: {}["key"])
    for copy in (pickle.loads(pickle.dumps(back)), pack.unpack(pack.pack(back))):
        assert isinstance(copy, errors.RemoteError) and (copy.ename, copy.evalue) == (back.ename, back.evalue)
        assert copy.traceback == back.traceback and copy.engine_info == WHERE


def test_a_remote_error_of_a_remote_error() -> None:
    inner = error_trip(lambda: 1 / 0)
    outer = error_trip(functools.partial(_raise, inner))
    assert isinstance(outer, errors.RemoteError) and outer.ename == "ZeroDivisionError"


def test_exceptions_among_results() -> None:
    assert errors.collect_exceptions([1, 2]) == [1, 2] and errors.collect_exceptions({0: 1}) == {0: 1}
    with pytest.raises(errors.CompositeError, match="2 exceptions in f") as caught:
        errors.collect_exceptions({0: 1, 1: ValueError("a"), 2: KeyError("b")}, "f")
    assert [type(e) for e in caught.value.elist] == [ValueError, KeyError]


def test_exceptions_as_texts() -> None:
    with pytest.raises(RuntimeError):
        errors.wrap_exception()
    try:
        raise ValueError("bad")
    except ValueError:
        content = json.loads(json.dumps(errors.wrap_exception({"engine_id": 3})))
    error = errors.unwrap_exception(content)
    assert (type(error), error.ename, error.evalue, error.engine_info) == (errors.RemoteError, "ValueError", "bad", {"engine_id": 3})
    assert "raise ValueError" in error.traceback


def test_classes_that_come_and_go_do_not_pile_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(errors, "_BOTH_MAX", 10)
    for i in range(50):
        kind = type(f"Error{i}", (ValueError,), {})
        assert isinstance(errors.remote_error({"ename": "E"}, kind(i)), kind)
        assert len(errors._both) <= 10


class TestCompositeError:
    def make(self, n: int) -> errors.CompositeError:
        many = [errors.remote_error({"ename": "ValueError", "evalue": f"number {i}\nmore", "traceback": f"trace {i}",
                                     "engine_id": i, "host": "h", "pid": 1}) for i in range(n)]
        return errors.CompositeError("tasks failed", [*many])

    def test_is_short(self) -> None:
        lines = str(self.make(10)).splitlines()
        assert lines[0] == "tasks failed" and len(lines) == 6 and lines[-1].strip() == "... and 6 more"
        assert lines[1].strip() == "[engine 0 on h, pid 1] ValueError: number 0"
        assert repr(self.make(10)) == "CompositeError(10)" and len(str(self.make(2)).splitlines()) == 3

    def test_holds_errors_of_any_class(self) -> None:
        error = errors.CompositeError("m", [KeyError("k"), errors.EngineError("gone"), ValueError("")])
        assert "KeyError: 'k'" in str(error) and "EngineError: gone" in str(error)
        assert len(error.render_traceback()) == 6

    def test_tracebacks(self) -> None:
        error = self.make(6)
        text = "\n".join(error.render_traceback())
        assert "trace 3" in text and "trace 4" not in text and "2 more exceptions" in text
        assert error.render_traceback(5)[1] == "trace 5"

    def test_picks_one(self) -> None:
        error = self.make(3)
        with pytest.raises(errors.RemoteError, match="number 2"):
            error.raise_exception(2)
        with pytest.raises(IndexError, match="no exception 7: this CompositeError holds 3"):
            error.raise_exception(7)

    def test_can_be_pickled(self) -> None:
        for copy in (pickle.loads(pickle.dumps(self.make(3))), pack.unpack(pack.pack(self.make(3)))):
            assert str(copy) == str(self.make(3)) and len(copy.elist) == 3


def test_the_type_is_kept_when_another_package_changes_how_exceptions_are_pickled():
    support = pytest.importorskip("tblib.pickling_support")
    before = dict(copyreg.dispatch_table)
    support.install(UnicodeDecodeError)
    try:
        error = pack.unpack_error(pack.pack_error(UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"), {}))
    finally:
        copyreg.dispatch_table.clear()
        copyreg.dispatch_table.update(before)
    assert isinstance(error, UnicodeDecodeError) and error.reason == "invalid start byte"
