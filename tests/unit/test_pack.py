"""Objects to payloads and back: in this process, and with another one that plays the engine."""

from __future__ import annotations

import array
import asyncio
import builtins
import collections
import copyreg
import decimal
import functools
import gc
import io
import json
import operator
import os
import pickle
import pickletools
import shutil
import subprocess
import sys
import textwrap
import threading
import types
import weakref
from pathlib import Path
from typing import Any, Callable, Iterator

import pytest

from ipclite import errors, pack, wire

cloudpickle = pytest.importorskip("cloudpickle")

ROOT = Path(pack.__file__).resolve().parent.parent
WHERE = {"engine_id": 3, "engine_uuid": "abc", "host": "node1", "pid": 42}
BIG = 300 * 1024


def main_scope(source: str, **names: Any) -> dict[str, Any]:
    """The namespace of a script, as `__main__` has it, after running `source`."""
    scope = {"__name__": "__main__", "__builtins__": builtins, **names}
    exec(compile(textwrap.dedent(source), "<script>", "exec"), scope)
    return scope


def pieces(payload: wire.Payload) -> list[wire.Buffer]:
    return [payload] if isinstance(payload, bytes) else payload


def sent(payload: wire.Payload) -> wire.Payload:
    """The payload as it arrives: copies, none of them the sender's memory."""
    return payload if isinstance(payload, bytes) else [bytes(p) for p in payload]


def trip(obj: Any) -> Any:
    return pack.unpack(sent(pack.pack(obj)))


# The process that plays the engine. It answers ("run", source), ("call", function, arguments), ("names",).
PEER = """
import builtins, importlib, pickle, sys
pack = importlib.import_module(sys.argv[1] + ".pack")
space = {"__name__": "__main__", "__builtins__": builtins}
out, sys.stdout = sys.stdout.buffer, sys.stderr
def call(function, arguments):
    names = {}
    try:
        f = pack.unpack(function, space, names)
        args, kwargs = pack.unpack(arguments, space, names)
        with pack.lend(space, pack.merged(names)):
            return True, pack.pack(f(*args, **kwargs))
    except BaseException as e:
        return False, pack.pack_error(e, {"engine_id": 3, "host": "node1", "pid": 42})
def serve(kind, *rest):
    if kind == "run":
        return exec(rest[0], space)
    if kind == "names":
        return sorted(space), type(space["__builtins__"]).__name__
    ok, payload = call(*rest)
    return ok, payload if isinstance(payload, bytes) else [bytes(p) for p in payload]
while True:
    try:
        request = pickle.load(sys.stdin.buffer)
    except EOFError:
        break
    pickle.dump(serve(*request), out)
    out.flush()
"""


class Peer:
    def __init__(self, folder: Path, package: str):
        env = {**os.environ, "PYTHONPATH": str(folder)}
        self._process = subprocess.Popen([sys.executable, "-c", PEER, package], env=env, cwd=str(folder),
                                         stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def _ask(self, *request: Any) -> Any:
        assert self._process.stdin and self._process.stdout
        pickle.dump(request, self._process.stdin)
        self._process.stdin.flush()
        return pickle.load(self._process.stdout)

    def run(self, source: str) -> None:
        self._ask("run", textwrap.dedent(source))

    def names(self) -> tuple[list[str], str]:
        """What is in the namespace, and the type of its `__builtins__`."""
        return self._ask("names")

    def call(self, f: Any, *args: Any, **kwargs: Any) -> Any:
        arguments = sent(pack.pack((args, kwargs)))
        ok, payload = self._ask("call", sent(pack.pack_function(f)[1]), arguments)
        if not ok:
            raise pack.unpack_error(payload)
        return pack.unpack(payload)

    def close(self) -> None:
        assert self._process.stdin and self._process.stdout
        self._process.stdin.close()
        self._process.wait(10)
        self._process.stdout.close()


@pytest.fixture(scope="module")
def peer() -> Iterator[Peer]:
    peer = Peer(ROOT, "ipclite")
    yield peer
    peer.close()


@pytest.fixture(scope="module")
def vendored(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Peer]:
    """An engine whose copy of the package has another name."""
    folder = tmp_path_factory.mktemp("vendored")
    vendor = folder / "project" / "_vendor"
    vendor.mkdir(parents=True)
    for package in (folder / "project", vendor):
        (package / "__init__.py").touch()
    shutil.copytree(ROOT / "ipclite", vendor / "other", ignore=shutil.ignore_patterns("__pycache__"))
    peer = Peer(folder, "project._vendor.other")
    yield peer
    peer.close()


SCALARS = [0, -1, 2**63, 10**400, 1.5, float("inf"), True, False, None, 2j, "", "é\U0001f600", "\udc80", b"",
           b"\x80\x05", "x" * 100_000, b"x" * 100_000]


@pytest.mark.parametrize("value", SCALARS, ids=lambda v: repr(v)[:20])
def test_scalars(value: Any) -> None:
    for obj in (value, [value], (value, value), ((value,), {}), ((), {"k": value}), ((value, "s"), {"k": 1})):
        back = trip(obj)
        assert back == obj and type(back) is type(obj)


def test_small_things_are_plain_pickles() -> None:
    for obj in (1, "a", ((1, 2.0, None), {}), ((1, "a"), {"k": b"b"}), [1, 2], {"a": [1]}):
        payload = pack.pack(obj)
        assert type(payload) is bytes and payload[0] == 0x80 and pickle.loads(payload) == obj


class Colour(str):
    pass


class Point(collections.namedtuple("Point", "x y")):
    pass


def test_subclasses_of_builtins_keep_their_class() -> None:
    for obj in (Colour("red"), Point(1, 2), collections.OrderedDict(a=1), decimal.Decimal("1.5")):
        for wrapped in (obj, (obj,), ((obj,), {})):
            assert trip(wrapped) == wrapped
        assert type(trip(((obj,), {}))[0][0]) is type(obj)


def test_round_trip_of_nested_builtins() -> None:
    hypothesis = pytest.importorskip("hypothesis")
    st = hypothesis.strategies
    leaf = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
    leaf = leaf | st.binary() | st.builds(bytearray, st.binary())
    keys = st.text() | st.integers()

    def extend(inner: Any) -> Any:
        return st.lists(inner) | st.dictionaries(keys, inner) | st.tuples(inner, inner)

    @hypothesis.given(st.recursive(leaf, extend, max_leaves=20))
    @hypothesis.settings(max_examples=60, deadline=None, database=None)
    def check(obj: Any) -> None:
        back = trip(obj)
        assert back == obj and type(back) is type(obj)

    check()


def test_large_bytes_are_pieces_of_their_own_without_a_copy() -> None:
    big, other = os.urandom(BIG), os.urandom(BIG)
    for obj in (big, [big, "between", other], {"a": {"b": (big, 1)}, "c": other}, ((big,), {"k": other})):
        payload = pack.pack(obj)
        assert isinstance(payload, list)
        assert any(p is big for p in payload)
        assert sum(len(p) for p in payload) < (2 * BIG if obj is not big else BIG) + 1000
        assert len(payload[0]) < 1000
        assert trip(obj) == obj


def test_large_text_and_bytearrays() -> None:
    obj = ["é" * BIG, bytearray(os.urandom(BIG)), b"y" * BIG, list(range(100_000)), "z" * BIG]
    back = trip(obj)
    assert back == obj and [type(v) for v in back] == [type(v) for v in obj]


def test_a_bytearray_is_packed_as_it_was() -> None:
    data = bytearray(b"x" * BIG)
    payload = pack.pack([data])
    data.clear()  # an exported bytearray could not be resized
    assert pack.unpack(payload) == [b"x" * BIG]


def test_the_number_of_pieces_is_bounded() -> None:
    np = pytest.importorskip("numpy")
    arrays = [np.full(4096, i) for i in range(1500)]
    payload = pack.pack([arrays, b"x" * BIG])
    assert 900 < len(payload) <= 1000
    back, tail = pack.unpack(sent(payload))
    assert len(tail) == BIG
    assert all((a == b).all() and b.flags.writeable for a, b in zip(arrays, back)) and len(back) == 1500


def test_identity_within_an_object_is_kept() -> None:
    shared, big = [1], b"x" * BIG
    loop: list[Any] = [shared, shared, big, big]
    loop.append(loop)
    back = trip(loop)
    assert back[0] is back[1] and back[2] is back[3] and back[4] is back


def test_pieces_can_be_any_buffer() -> None:
    obj = [b"x" * BIG, "between", b"y" * BIG, ("end",)]
    payload = pack.pack(obj)
    for kind in (bytes, bytearray, memoryview, lambda p: memoryview(bytearray(p))):
        assert pack.unpack([kind(p) for p in payload]) == obj
    assert pack.unpack([memoryview(pack.pack(["small"]))]) == ["small"]


def test_pieces_can_be_frames() -> None:
    zmq = pytest.importorskip("zmq")
    obj = [b"x" * BIG, array.array("d", range(50_000)), "end"]
    assert pack.unpack([zmq.Frame(bytes(p)) for p in pack.pack(obj)]) == obj


def test_views_arrive_as_views() -> None:
    for data in (b"abc", bytearray(b"abc"), b"x" * BIG, bytearray(BIG), b""):
        back = trip(memoryview(data))
        assert type(back) is memoryview and back == data and back.readonly is memoryview(data).readonly
    numbers = array.array("d", range(12))
    assert trip(memoryview(numbers)).tolist() == list(range(12))
    grid = memoryview(numbers).cast("B").cast("d", (3, 4))
    assert trip(grid).tolist() == grid.tolist()
    assert trip(memoryview(b"abcdef")[::2]) == b"ace"
    with memoryview(b"") as released:
        pass
    with pytest.raises(errors.PackError, match="released"):
        pack.pack([released])


class Buffers:
    """Uses pickle's out-of-band buffers by itself."""

    def __init__(self, data: Any):
        self.data = data

    def __reduce_ex__(self, protocol: int) -> Any:
        return Buffers, (pickle.PickleBuffer(self.data),)


def test_out_of_band_buffers_of_any_class() -> None:
    data = bytearray(os.urandom(BIG))
    payload = pack.pack(Buffers(data))
    assert isinstance(payload, list)
    back = pack.unpack(sent(payload)).data
    assert bytes(back) == data and not memoryview(back).readonly
    assert memoryview(trip(Buffers(bytes(data))).data).readonly
    assert bytes(trip(Buffers(b"small")).data) == b"small"


class TestArrays:
    np = pytest.importorskip("numpy")

    def test_large_arrays_travel_without_a_copy(self) -> None:
        a = self.np.arange(100_000.0)
        payload = pack.pack(((a,), {"k": [a[:50_000]]}))
        assert len(payload) == 3
        assert all(self.np.shares_memory(self.np.frombuffer(p, dtype=float), a) for p in payload[1:])

    def test_writable_frames_are_used_as_they_are(self) -> None:
        a = self.np.arange(100_000.0)
        frames = [bytearray(p) for p in pack.pack(a)]
        b = pack.unpack(frames)
        assert self.np.shares_memory(b, self.np.frombuffer(frames[1], dtype=float)) and (a == b).all()

    @pytest.mark.parametrize("size", [0, 1, 10, 3000, 100_000])
    @pytest.mark.parametrize("writable", [True, False])
    @pytest.mark.parametrize("kind", [bytes, bytearray])
    def test_writable_stays_writable_and_read_only_stays_read_only(self, size: int, writable: bool, kind: Any) -> None:
        a = self.np.arange(float(size))
        a.flags.writeable = writable
        payload = pack.pack([a])
        b = pack.unpack(payload if isinstance(payload, bytes) else [kind(p) for p in payload])[0]
        assert (a == b).all()
        if size:  # an empty array may be writable, there is nothing to write
            assert b.flags.writeable is writable

    def test_layouts(self) -> None:
        np = self.np
        base = np.arange(60_000.0).reshape(200, 300)
        for a in (base.T, base[::2], base[:, ::3], base[::-1], np.asfortranarray(base), base[:0], np.float64(3),
                  base.astype("f4"), base > 7, base.astype("U9"), np.array([{1: 2}, None]), np.array(5),
                  np.zeros(9000, dtype=[("a", "i4"), ("b", "f8")]), base.astype("M8[s]"), base.astype(">f8")):
            b = trip(a)
            assert (a == b).all() and a.dtype == b.dtype and a.shape == b.shape and type(a) is type(b)

    def test_arrays_in_results_of_another_process(self, peer: Peer) -> None:
        f = main_scope("""
            def double(a):
                a *= 2
                return {"a": a, "flag": a.flags.writeable}
        """)["double"]
        for size in (10, 100_000):
            result = peer.call(f, self.np.arange(size))
            assert (result["a"] == 2 * self.np.arange(size)).all() and result["flag"]
            result["a"][0] = 1


def test_importing_is_light() -> None:
    source = """
import sys
from ipclite import pack
assert pack.unpack(pack.pack(((1, "a"), {}))) == ((1, "a"), {})
heavy = {"numpy", "cloudpickle", "asyncio", "inspect", "traceback", "zmq"} & set(sys.modules)
assert not heavy, heavy
"""
    subprocess.run([sys.executable, "-S", "-c", source], check=True, cwd=str(ROOT), env={"PYTHONPATH": str(ROOT)})



class Locked:
    def __init__(self) -> None:
        self.lock = threading.Lock()


class BadReduce:
    def __init__(self, error: BaseException):
        self.error = error

    def __reduce__(self) -> Any:
        raise self.error


@pytest.mark.parametrize("obj, words", [
    (threading.Lock(), ["'lock'"]),
    (((1, threading.Lock()), {}), ["argument 1"]),
    (((1,), {"key": [1, threading.Lock()]}), ["argument 'key'", "item 1"]),
    (((Locked(),), {}), ["argument 0", "its attribute 'lock'"]),
    ([1, {"a": threading.Lock()}], ["item 1", "item 'a'"]),
    ((i for i in ()), ["'generator'"]),
], ids=lambda v: type(v).__name__)
def test_the_part_that_can_not_be_pickled_is_named(obj: Any, words: list[str]) -> None:
    with pytest.raises(errors.PackError) as caught:
        pack.pack(obj)
    text = str(caught.value)
    assert text.startswith("can not pickle") and "TypeError: cannot pickle" in text and "\n" not in text
    assert all(w in text for w in words), text


def test_the_global_that_can_not_be_pickled_is_named() -> None:
    scope = main_scope("""
        import threading
        lock = threading.Lock()
        def inner(): return lock
        def f(): return inner()
        def closing(lock): return lambda: lock
    """)
    with pytest.raises(errors.PackError, match="function 'f', its global 'inner', its global 'lock': TypeError"):
        pack.pack_function(scope["f"])
    with pytest.raises(errors.PackError, match="its variable 'lock'"):
        pack.pack_function(scope["closing"](threading.Lock()))


def test_errors_while_packing() -> None:
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(errors.PackError, match="nested too deeply"):
        pack.pack(deep)
    while deep:  # taken apart by hand, or its destructor recurses as deeply
        deep = deep.pop()
    with pytest.raises(errors.PackError, match="not enough memory"):
        pack.pack(BadReduce(MemoryError()))
    with pytest.raises(errors.PackError, match="ZeroDivisionError: oops"):
        pack.pack(BadReduce(ZeroDivisionError("oops")))
    with pytest.raises(KeyboardInterrupt):
        pack.pack(BadReduce(KeyboardInterrupt()))


class BadLoad:
    def __init__(self, error: BaseException):
        self.error = error

    def __reduce__(self) -> Any:
        return _raise, (self.error,)


def _raise(error: BaseException) -> None:
    raise error


def test_errors_while_unpacking() -> None:
    for error, text in [(MemoryError(), "not enough memory"), (RecursionError(), "nested too deeply"),
                        (ValueError("v"), "can not unpickle: ValueError: v")]:
        with pytest.raises(errors.UnpackError, match=text):
            pack.unpack(pack.pack(BadLoad(error)))
    with pytest.raises(KeyboardInterrupt):
        pack.unpack(pack.pack(BadLoad(KeyboardInterrupt())))


def test_a_missing_module_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("vanishing_module")
    exec("def f(): pass\ndef g(): pass", vars(module))
    module.f.__module__ = module.g.__module__ = module.__name__
    monkeypatch.setitem(sys.modules, module.__name__, module)
    payloads = [pack.pack_function(module.f)[1], pack.pack([module.g]), pack.pack(module)]
    missing = pack.pack_function(module.g)[1]
    del module.g
    with pytest.raises(errors.UnpackError, match="'g'.*importable here"):
        pack.unpack(missing)
    monkeypatch.delitem(sys.modules, module.__name__)
    for payload in payloads:
        with pytest.raises(errors.UnpackError, match="no module 'vanishing_module' on the engine; it must be"):
            pack.unpack(payload, {})


def test_broken_payloads() -> None:
    good = pack.pack([b"x" * BIG, "end"])
    function = pack.pack(lambda: 1)
    assert isinstance(good, list) and isinstance(function, bytes)
    wrong_version = bytes([function[0], function[1] + 1]) + function[2:]
    with pytest.raises(errors.UnpackError, match="the same version for client and engines"):
        pack.unpack(wrong_version)
    for payload in (b"", [], b"\x80", b"\xff\x00", b"\x01", b"hello", good[:1], [*good, b""], good[1:], [good[0][:8]],
                    [good[0][:-3], good[1]], [good[0], good[1][:-1]], pack.pack(1)[:-1], function[:-5]):
        with pytest.raises(errors.UnpackError):
            pack.unpack(payload)



def test_what_can_be_imported_goes_by_reference() -> None:
    for f in (json.dumps, os.path.join, abs, operator.add, Colour, collections.OrderedDict, dict, str.upper, helper):
        assert pack.unpack(pack.pack_function(f)[1]) is f


def helper(x: int) -> int:
    return x + 1


def test_functions_of_main_go_by_value() -> None:
    scope = main_scope("""
        offset = 10
        def f(x, y=2, *, z: int = 3):
            "Adds."
            return x + y + z + offset
        f.note = [1]
    """)
    f = scope["f"]
    g = trip(f)
    assert g is not f and g(1) == 16 and g(1, z=0) == 13
    assert (g.__name__, g.__qualname__, g.__doc__, g.__module__) == ("f", "f", "Adds.", "__main__")
    assert g.__defaults__ == (2,) and g.__kwdefaults__ == {"z": 3} and g.note == [1]
    assert list(g.__annotations__) == ["z"]
    scope["offset"] = 0
    assert g(1) == 16 and trip(f)(1) == 6


def test_functions_that_refer_to_themselves_and_each_other() -> None:
    scope = main_scope("""
        def fact(n): return 1 if n < 2 else n * fact(n - 1)
        def even(n): return n == 0 or odd(n - 1)
        def odd(n): return n != 0 and even(n - 1)
        def outer():
            def inner(n): return 0 if n == 0 else 1 + inner(n - 1)
            return inner
    """)
    assert trip(scope["fact"])(5) == 120
    assert trip(scope["even"])(10) and not trip(scope["odd"])(10)
    assert trip(scope["outer"]())(5) == 5


def test_closures_keep_the_cells_that_they_share() -> None:
    scope = main_scope("""
        def counter(n):
            def add():
                nonlocal n
                n += 1
            def get():
                return n
            return add, get
    """)
    add, get = trip(scope["counter"](5))
    add()
    add()
    assert get() == 7


def test_names_used_in_nested_code_are_captured() -> None:
    scope = main_scope("""
        import xml.dom.minidom
        a, b, c, d, e, Base = 1, 2, 3, 4, 5, list
        def f():
            class C(Base):
                x = e
            return [a for _ in range(1)], (lambda: b)(), {c: 1}, (lambda: (lambda: d))()()  , C.x, C().append
        def parse():
            return xml.dom.minidom.parseString("<a/>").documentElement.tagName
    """)
    assert trip(scope["f"])()[:5] == ([1], 2, {3: 1}, 4, 5)
    assert trip(scope["parse"])() == "a"


def test_only_what_is_used_is_captured() -> None:
    scope = main_scope("def f(x): return x.large + used", large=b"x" * BIG, used=1)
    assert isinstance(pack.pack(scope["f"]), bytes)


def test_generators_coroutines_partials_and_methods() -> None:
    scope = main_scope("""
        import functools
        k = 3
        def gen(n):
            for i in range(n):
                yield i + k
        async def co(n):
            return n + k
        class C:
            def __init__(self, v): self.v = v
            def m(self, x): return self.v + x + k
            @classmethod
            def cm(cls): return cls.__name__
            @staticmethod
            def sm(x): return x + k
            @property
            def p(self): return self.v
        part = functools.partial(gen, 2)
        def deco(f):
            @functools.wraps(f)
            def wrapper(*a): return ("wrapped", f(*a))
            return wrapper
        @deco
        def decorated(x): return x + k
        by_name = sorted
    """)
    assert list(trip(scope["gen"])(2)) == [3, 4] and list(trip(scope["part"])()) == [3, 4]
    assert asyncio.run(trip(scope["co"])(1)) == 4
    assert trip(scope["C"](1).m)(1) == 5 and trip(scope["C"].cm)() == "C" and trip(scope["C"].sm)(1) == 4
    assert trip(scope["decorated"])(1) == ("wrapped", 4) and trip(scope["decorated"]).__name__ == "decorated"
    assert trip([scope["by_name"]])[0] is sorted


def test_memoized_functions() -> None:
    scope = main_scope("""
        import functools
        @functools.lru_cache(maxsize=50)
        def fib(n): return n if n < 2 else fib(n - 1) + fib(n - 2)
        def use(n): return fib(n)
        root = functools.lru_cache(None)(abs)
    """)
    fib = trip(scope["fib"])
    assert fib(30) == 832040 and fib.cache_info().maxsize == 50 and fib.cache_info().hits > 20
    assert trip(scope["use"])(10) == 55
    a, b = trip((scope["fib"].__wrapped__, scope["fib"]))
    assert b.__wrapped__ is a and a(10) == 55


CLASSES = """
    import dataclasses, enum, typing, abc, collections
    K = 7
    @dataclasses.dataclass
    class Data:
        x: int
        y: typing.List[int] = dataclasses.field(default_factory=list)
        def total(self): return self.x + sum(self.y) + K
    class Kind(enum.Enum):
        A = 1
        B = "b"
    class Flags(enum.IntFlag):
        R = 1
        W = 2
    Pair = collections.namedtuple("Pair", "left right")
    class Base:
        def __init__(self, v): self.v = v
        def name(self): return "base"
    class Child(Base):
        __slots__ = ("s",)
        def __init__(self, v):
            super().__init__(v)
            self.s = v + 1
        def name(self): return super().name() + "/" + __class__.__name__
    class Shape(abc.ABC):
        @abc.abstractmethod
        def area(self): ...
    class Square(Shape):
        def area(self): return K
    class Node:
        def __init__(self): self.me, self.made = self, Node
    class Error(Exception):
        def __init__(self, code, text):
            super().__init__(text)
            self.code = code
"""


def test_classes_of_main_there_and_back(peer: Peer) -> None:
    scope = main_scope(CLASSES + """
    def use(data, kind, pair, child, square, node):
        assert isinstance(data, Data) and kind is Kind.A and isinstance(pair, Pair) and pair.left == 1
        assert node.me is node and node.made is Node and isinstance(square, Shape)
        made = Data(5), Kind.B, Flags.R | Flags.W, Pair(3, 4), Child(9)
        return (data.total(), child.name(), child.s, square.area(), *made)
    """)
    s = types.SimpleNamespace(**scope)
    got = peer.call(s.use, s.Data(1, [2]), s.Kind.A, s.Pair(1, 2), s.Child(3), s.Square(), s.Node())
    assert got[:4] == (10, "base/Child", 4, 7)
    assert got[4] == s.Data(5) and type(got[4]) is s.Data
    assert got[5] is s.Kind.B and got[6] == s.Flags.R | s.Flags.W and type(got[6]) is s.Flags
    assert type(got[7]) is s.Pair and type(got[8]) is s.Child and got[8].name() == "base/Child"


def test_a_class_that_comes_home_is_left_alone(peer: Peer) -> None:
    scope = main_scope("""
        count = 0
        class C:
            tag = "mine"
            def inc(self):
                global count
                count += 1
        def change():
            C.tag = "theirs"
            return C()
        def tag(c): return c.tag
    """)
    C = scope["C"]
    before = C.inc
    back = peer.call(scope["change"])
    assert type(back) is C and C.tag == "mine" and C.inc is before
    back.inc()
    assert scope["count"] == 1
    C.tag = "new"  # the owner's changes do arrive
    assert peer.call(scope["tag"], C()) == "new"


def test_classes_of_the_engine(peer: Peer) -> None:
    peer.run("""
        class Theirs:
            level = 1
            def get(self): return self.level, secret
        secret = 5
        def make(): return Theirs()
        def same(x): return type(x) is Theirs, x.level
    """)
    make = main_scope("def f(): return make()")["f"]
    theirs = peer.call(make)
    assert theirs.get() == (1, 5)
    assert type(peer.call(make)) is type(theirs)
    type(theirs).level = 2
    assert peer.call(main_scope("def f(x): return same(x)")["f"], theirs) == (True, 1)


def test_modules_registered_by_value(peer: Peer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "only_here.py").write_text("K = 4\ndef f(x): return g(x) + K\ndef g(x): return x * 2\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    import only_here  # type: ignore[import-not-found]

    with pytest.raises(errors.RemoteError, match="no module 'only_here' on the engine"):
        raise_any(peer.call, only_here.f, 1)
    cloudpickle.register_pickle_by_value(only_here)
    try:
        assert peer.call(only_here.f, 1) == 6
    finally:
        cloudpickle.unregister_pickle_by_value(only_here)
        del sys.modules["only_here"]


def raise_any(f: Callable[..., Any], *args: Any) -> None:
    """Call; an own error counts as a remote one here."""
    try:
        f(*args)
    except errors.UnpackError as e:
        raise errors.RemoteError("UnpackError", str(e)) from None



def test_pushed_names_win_over_captured_ones(peer: Peer) -> None:
    scope = main_scope("def f(): return where, captured_only", where="client", captured_only=[1])
    assert peer.call(scope["f"]) == ("client", [1])
    peer.run("where = 'engine'")
    assert peer.call(scope["f"]) == ("engine", [1])
    names, kind = peer.names()
    assert "captured_only" not in names and kind == "module"


def test_global_statements_write_to_the_namespace(peer: Peer) -> None:
    scope = main_scope("""
        total = 100
        def add(n):
            global total
            total += n
            return total
    """)
    assert peer.call(scope["add"], 1) == 101
    peer.run("total += 1000")
    assert peer.call(scope["add"], 1) == 1102 and scope["total"] == 100
    peer.run("del total")


def test_captured_names_are_seen_in_code_made_while_running(peer: Peer) -> None:
    scope = main_scope("""
        k, table = 3, {"a": 1}
        def helper(x): return x + k
        def f(n):
            def nested(x): return helper(x) + k
            class C:
                v = k
                def m(self): return k
            return ([k for _ in range(n)], (lambda: k)(), nested(1), list(map(lambda x: x + k, [1])),
                    {x: table for x in "a"}, C.v, C().m(), sorted([2, 1], key=lambda v: v * k), len(table))
    """)
    assert peer.call(scope["f"], 1) == ([3], 3, 7, [4], {"a": {"a": 1}}, 3, 3, [1, 2], 1)
    assert not {"k", "table", "helper", "f"} & set(peer.names()[0])


def test_functions_as_arguments_see_the_same(peer: Peer) -> None:
    scope = main_scope("""
        k = 3
        def plus(x): return x + k
        def apply_twice(g, x): return g(g(x))
    """)
    assert peer.call(scope["apply_twice"], scope["plus"], 1) == 7
    assert peer.call(operator.methodcaller("__call__", 1), scope["plus"]) == 4
    assert peer.call(functools.reduce, main_scope("k = 2\ndef f(a, b): return a + b * k")["f"], [1, 1, 1]) == 5


def test_names_that_nobody_has(peer: Peer) -> None:
    with pytest.raises(NameError, match="nobody_has_this"):
        peer.call(main_scope("def f(): return nobody_has_this")["f"])
    assert peer.names()[1] == "module"


def test_names_that_only_the_engine_has(peer: Peer) -> None:
    peer.run("only_there = 12")
    assert peer.call(main_scope("def f(): return only_there")["f"]) == 12


def test_captured_names_win_over_built_ins(peer: Peer) -> None:
    assert peer.call(main_scope("def sum(x): return 'mine'\ndef f(): return sum([1]), max(1, 2)")["f"]) == ("mine", 2)


def test_functions_come_back_and_work(peer: Peer) -> None:
    scope = main_scope("""
        k = 3
        def fact(n): return 1 if n < 2 else n * fact(n - 1)
        def there(): return (lambda x: x + k + e), fact
    """)
    peer.run("e = 100")
    plus, fact = peer.call(scope["there"])
    assert plus(1) == 104 and fact(5) == 120
    assert peer.call(main_scope("def f(): return lambda: e")["f"])() == 100
    assert peer.call(lambda f: f(4), scope["fact"]) == 24


def test_nothing_stays_after_an_error(peer: Peer) -> None:
    before = peer.names()
    with pytest.raises(ZeroDivisionError):
        peer.call(main_scope("k = 0\ndef f(): return (lambda: 1 / k)()")["f"])
    assert peer.names() == before


def test_lend() -> None:
    namespace: dict[str, Any] = {}
    with pack.lend(namespace, pack.merged({"a": 1})):
        assert eval("a + len([1])", namespace) == 2
    assert "a" not in namespace and "__builtins__" not in namespace
    namespace["__builtins__"] = builtins
    with pack.lend(namespace, None), pack.lend(namespace, {}), pack.lend(None, {"a": 1}):
        assert namespace == {"__builtins__": builtins}
    with pytest.raises(KeyError), pack.lend(namespace, pack.merged({"a": 1})):
        raise KeyError
    assert namespace == {"__builtins__": builtins}
    assert not hasattr(builtins, "a")


def test_a_namespace_without_built_ins_gets_them() -> None:
    namespace: dict[str, Any] = {}
    assert pack.unpack(pack.pack(main_scope("def f(): return len('ab')")["f"]), namespace)() == 2


def test_names_are_reported_and_the_namespace_is_untouched() -> None:
    scope = main_scope("a, b = 1, 2\ndef g(): return b\ndef f(): return a + g()")
    namespace: dict[str, Any] = {"__builtins__": builtins}
    names: dict[str, Any] = {}
    f = pack.unpack(pack.pack_function(scope["f"])[1], namespace, names)
    assert sorted(names) == ["a", "b", "g"] and namespace == {"__builtins__": builtins}
    assert f.__globals__ is namespace and names["g"].__globals__ is namespace
    with pack.lend(namespace, pack.merged(names)):
        assert f() == 3
    names.clear()
    pack.unpack(pack.pack_function(main_scope("def f(x): return x")["f"])[1], namespace, names)
    assert names == {}



def strings_of(payload: wire.Payload) -> list[str]:
    head = bytes(pieces(payload)[0])
    text = head[head.index(b"\x80\x05") :]
    return [str(arg) for op, arg, _ in pickletools.genops(io.BytesIO(text)) if isinstance(arg, str)]


def test_payloads_never_name_the_package() -> None:
    import ipclite

    scope = main_scope(CLASSES + """
    def f(): return K, Child, ipp, ipp.errors.EngineError
    """, ipp=ipclite)
    remote = errors.remote_error({"ename": "ValueError", "evalue": "1", **WHERE}, ValueError(1))
    for obj in (scope["f"], scope["Child"](1), lambda: 1, errors.TaskAborted("x"), [errors.RemoteError], remote, wire,
                errors.CompositeError("c", [remote]), pack.pack, pack.lend, memoryview(b"x"), pack._Sink().write,
                functools.lru_cache(None)(scope["f"])):
        strings = strings_of(pack.pack(obj))
        assert strings and not [s for s in strings if s == "ipclite" or s.startswith("ipclite.")]


def test_a_copy_under_another_name_understands(vendored: Peer) -> None:
    import ipclite

    scope = main_scope(CLASSES + """
    def f(x, error):
        assert isinstance(error, ipp.errors.TaskAborted) and ipp.__name__ == "project._vendor.other", ipp
        return ipp.errors.RemoteError("A", "b"), Child(x).name(), error, ipp.wire.msg_id
    """, ipp=ipclite)
    remote, name, error, f = vendored.call(scope["f"], 1, errors.TaskAborted("gone"))
    assert type(remote) is errors.RemoteError and remote.ename == "A" and name == "base/Child"
    assert type(error) is errors.TaskAborted and str(error) == "gone" and f is wire.msg_id
    with pytest.raises(errors.UnmetDependency, match="not here"):
        vendored.call(main_scope("def f(): raise ipp.errors.UnmetDependency('not here')", ipp=ipclite)["f"])


def test_functions_made_in_the_package_see_its_globals_there(vendored: Peer) -> None:
    made = eval("lambda k: lambda x: (EngineError, __name__, x + k)", vars(errors))(1)
    assert vendored.call(made, 1) == (errors.EngineError, "project._vendor.other.errors", 2)
    assert not [s for s in strings_of(pack.pack(made)) if s.startswith("ipclite")]


def test_both_copies_in_one_process(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "ipclite", tmp_path / "copied", ignore=shutil.ignore_patterns("__pycache__"))
    source = """
import ipclite.pack as one, copied.pack as two, ipclite.errors, copied.errors
k = 3
def f(x): return x + k
class C: pass
for a, b in ((one, two), (two, one)):
    assert b.unpack(a.pack(f))(1) == 4 and type(b.unpack(a.pack(C()))) is C
    names, space = {}, {}
    g = b.unpack(a.pack(f), space, names)
    assert g.__globals__ is space and names == {"k": 3}
assert type(two.unpack(one.pack(ipclite.errors.TaskAborted("x")))) is copied.errors.TaskAborted
assert type(one.unpack(two.pack(copied.errors.TaskAborted("x")))) is ipclite.errors.TaskAborted
assert type(one.unpack(one.pack(ipclite.errors.TaskAborted("x")))) is ipclite.errors.TaskAborted
"""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(tmp_path)])}
    subprocess.run([sys.executable, "-c", source], check=True, env=env)



def is_cached(f: Any) -> bool:
    return pack.pack_function(f)[1] is pack.pack_function(f)[1]


def test_unchanged_functions_are_packed_once() -> None:
    scope = main_scope("""
        import math
        k = (1, "a", frozenset([2]))
        def helper(x): return x if not x else f(x - 1)
        def f(x, y=1, *, z=2): return helper(x), k, math.pi, len("a"), not_there
        def closing(n): return lambda: n
    """)
    for f in (scope["f"], scope["closing"](1), json.dumps, abs, helper, dict, Colour, lambda: 1):
        assert is_cached(f)
        digest, payload = pack.pack_function(f)
        assert type(digest) is bytes and len(digest) == 16 and pack.pack_function(f) == (digest, payload)


CHANGES = [
    "global k; k = 2",
    "global new; new = 2",
    "global g\ndef g(): return 5",
    "g.__code__ = (lambda: 6).__code__",
    "f.__code__ = (lambda x=0: 7).__code__",
    "f.__defaults__ = (8,)",
    "f.__kwdefaults__ = {'z': 9}",
    "f.__kwdefaults__['z'] = 10",
    "f.note = 11",
    "inner.__closure__[0].cell_contents = 12",
    "global k; del k",
]


@pytest.mark.parametrize("change", CHANGES)
def test_changes_are_seen(change: str) -> None:
    scope = main_scope("""
        k = 1
        def outer(n):
            def inner(): return n
            return inner
        inner = outer(1)
        def g(): return inner()
        def f(x=1, *, z=1): return k, g(), x, z, new
    """)
    f = scope["f"]
    before = pack.pack_function(f)
    assert pack.pack_function(f) is before
    exec("def do():\n    " + change.replace("\n", "\n    ") + "\ndo()", scope)
    after = pack.pack_function(f)
    assert after[0] != before[0]
    assert pack.pack_function(f) is after


def test_mutable_values_are_packed_each_time() -> None:
    scope = main_scope("""
        items, table = [1], ({"a": 1},)
        class C: v = 1
        def f(): return items
        def g(): return table
        def h(): return C.v
        def default(x=[]): return x
        def m(): return made.value
        def outer(x): return lambda: x
    """)
    inner = scope["outer"]([1])
    made = scope["made"] = types.ModuleType("made_here")
    made.value = 1  # type: ignore[attr-defined]
    before = pack.pack_function(scope["m"])[0]
    made.value = 2  # type: ignore[attr-defined]
    assert pack.pack_function(scope["m"])[0] != before
    for f in (scope["f"], scope["g"], scope["h"], scope["default"], inner, functools.partial(scope["f"])):
        assert not is_cached(f)
    first = pack.pack_function(scope["f"])[0]
    assert pack.pack_function(scope["f"])[0] == first
    scope["items"].append(2)
    assert pack.pack_function(scope["f"])[0] != first
    assert pack.unpack(pack.pack_function(scope["f"])[1])() == [1, 2]
    first = pack.pack_function(inner)[0]
    inner.__closure__[0].cell_contents.append(2)
    assert pack.pack_function(inner)[0] != first


def test_registering_a_module_by_value_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "registered_later.py").write_text("def f(): return 1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    import registered_later  # type: ignore[import-not-found]

    before = pack.pack_function(registered_later.f)[0]
    cloudpickle.register_pickle_by_value(registered_later)
    try:
        assert pack.pack_function(registered_later.f)[0] != before
    finally:
        cloudpickle.unregister_pickle_by_value(registered_later)
        monkeypatch.delitem(sys.modules, "registered_later")
    assert pack.pack_function(helper)


def test_the_cache_is_bounded() -> None:
    for i in range(1000):
        pack.pack_function(main_scope(f"def f(): return {i}")["f"])
    assert len(pack._cache) <= 256
    big = main_scope("def f(): return data", data="x" * 100_000)["f"]
    pack.pack_function(big)
    gone = weakref.ref(big)
    del big
    gc.collect()
    assert gone() is None


def test_a_new_way_to_pickle_a_class_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    class Odd:
        pass

    Odd.__qualname__ = "Odd"
    monkeypatch.setitem(globals(), "Odd", Odd)
    assert type(trip([Odd()])[0]) is Odd
    monkeypatch.setitem(copyreg.dispatch_table, Odd, lambda odd: (str, ("odd",)))
    assert trip([Odd()]) == ["odd"]
    monkeypatch.setitem(copyreg.dispatch_table, Odd, lambda odd: (str, ("even",)))
    assert trip([Odd()]) == ["even"]


def test_threads_pack_and_unpack_at_once() -> None:
    scope = main_scope("def make(k): return lambda x: x + k")
    failed: list[BaseException] = []

    def work(k: int) -> None:
        try:
            for i in range(100):
                namespace: dict[str, Any] = {"__builtins__": builtins}
                f = pack.unpack(pack.pack_function(scope["make"](k + i))[1], namespace)
                assert f(1) == k + i + 1 and f.__globals__ is namespace
        except BaseException as e:
            failed.append(e)

    threads = [threading.Thread(target=work, args=(1000 * n,)) for n in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not failed


def test_an_error_of_a_class_of_main_is_caught_by_it(peer: Peer) -> None:
    scope = main_scope(CLASSES + """
    def f(): raise Error(5, "bad")
    """)
    with pytest.raises(scope["Error"], match="bad") as caught:
        peer.call(scope["f"])
    assert caught.value.code == 5 and isinstance(caught.value, errors.RemoteError)


def test_the_traceback_starts_with_the_users_code(peer: Peer) -> None:
    with pytest.raises(ZeroDivisionError) as caught:
        peer.call(main_scope("def f(): return 1 / 0")["f"])
    text = caught.value.traceback  # type: ignore[attr-defined]
    assert text.startswith("Traceback") and "in f" in text and str(ROOT / "ipclite") not in text


def test_a_class_that_the_client_does_not_know(peer: Peer, tmp_path: Path) -> None:
    (tmp_path / "engine_only.py").write_text("class Strange(Exception): pass\n")
    peer.run(f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import engine_only; sys.path.pop(0)")
    with pytest.raises(errors.RemoteError) as caught:
        peer.call(main_scope("def f(): raise engine_only.Strange('what')")["f"])
    assert type(caught.value) is errors.RemoteError
    assert (caught.value.ename, caught.value.evalue) == ("Strange", "what") and "Strange" in caught.value.traceback


# --- what is looked up on arrival, picklers, what is packed once


def test_a_reference_is_evaluated_where_it_arrives() -> None:
    from ipclite.functions import Reference

    payload = pack.pack({"x": [Reference("a + 1")]})
    assert pack.is_live(payload) and not pack.is_live(pack.pack({"x": [1]})) and not pack.is_live(pack.pack(1))
    for a in (1, 2):
        assert pack.unpack(payload, {"a": a}) == {"x": [a + 1]}
    assert pack.unpack(payload) == {"x": [Reference("a + 1")]}, "where there is no namespace it stays what it is"
    with pytest.raises(NameError, match="'a'"):
        pack.unpack(payload, {})
    with pytest.raises(errors.UnpackError):
        pack.unpack(pack.pack(main_scope("class A:\n    def __reduce__(self): return int, ('x',)")["A"]()), {})


def test_a_function_that_holds_a_reference_is_live() -> None:
    from ipclite.functions import Reference

    f = main_scope("def f(): return there", there=Reference("a"))["f"]
    for _ in range(2):
        _, payload = pack.pack_function(f)
        assert pack.is_live(payload)
    assert not pack.is_live(pack.pack_function(main_scope("def f(): return 1")["f"])[1])


def test_use_cloudpickle_prefers_the_senders_names() -> None:
    scope = main_scope("def f(): return a, b, len('ab'), g()\ndef g(): global c; c = a; return c", a=1)
    namespace: dict[str, Any] = {"__builtins__": builtins, "a": 10, "b": 20}
    try:
        pack.use("cloudpickle")
        names: dict[str, Any] = {}
        f = pack.unpack(pack.pack_function(scope["f"])[1], namespace, names)
        assert f() == (1, 20, 2, 1) and names == {}
        namespace["b"] = 21
        assert f()[1] == 21 and set(namespace) == {"__builtins__", "a", "b"}
        with pytest.raises(NameError):
            pack.unpack(pack.pack_function(main_scope("def f(): return a, nowhere", a=1)["f"])[1], namespace)()
    finally:
        pack.use("pickle")
    names = {}
    f = pack.unpack(pack.pack_function(scope["f"])[1], namespace, names)
    with pack.lend(namespace, pack.merged(names)):
        assert f()[:2] == (10, 21)
    with pytest.raises(ValueError, match="pickle, cloudpickle or dill"):
        pack.use("marshal")


def test_what_is_packed_once_arrives_as_itself() -> None:
    from ipclite.functions import PrePickled

    large = b"x" * BIG
    once = PrePickled([large, bytearray(BIG), 5])
    for payload in (pack.pack(once), pack.pack(((once,), {"k": once}))):
        assert isinstance(payload, list) and sum(piece is large for piece in payload) <= 2
    (first,), kwargs = pack.unpack(pack.pack(((once,), {"k": once})))
    assert first == [large, bytearray(BIG), 5] and kwargs["k"] is first
    first[1][0] = 1
    assert pack.unpack(pack.pack(once), {})[1][0] == 0
    assert pack.unpack(pack.pack(PrePickled(main_scope("def f(): return a", a=1)["f"])), {"a": 5, "__builtins__": builtins})() == 5
