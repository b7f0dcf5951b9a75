"""User objects to payloads and back.

    pack(obj) -> payload                 unpack(payload, namespace, names) -> obj
    pack_function(f) -> digest, payload  unpack
    pack_error(exc, where) -> payload    unpack_error(payload) -> exception to raise

Three forms of payload, told apart by the first byte:

    0x80                                  a plain pickle, `pickle.loads` reads it
    flags, minor                          then a pickle that needs a context: it holds code or things of this package
    flags, minor, counts, sizes, stream   and more pieces: large bytes cut out of the stream, out-of-band buffers

Rules that hold here:

- What can be imported goes by reference, the rest by value (cloudpickle). A function of `__main__` that arrives on an
  engine lives in the engine's namespace: it sees what was pushed there and `global` writes there. Names that the
  namespace lacks fall back to the values that they had on the client (`names`). These never enter the namespace:
  `lend` shows them to the running function through `__builtins__`.
- A class of `__main__` has one owner, the process that defined it. An instance that comes home gets its own class, and
  only the owner's changes are taken over elsewhere.
- A payload never holds this package's name. It refers to a module `ALIAS` which every copy of the package
  finds or makes, whatever its own name is.
- What is evaluated on arrival (`shared.evaluate`) makes a payload *live*: it is to be unpacked anew for each call.
- numpy and cloudpickle are imported by whoever needs them, not by importing this file.
"""

from __future__ import annotations

import builtins
import functools
import os
import pickle
import struct
import sys
import types
from typing import Any, Callable, Iterator, List, NamedTuple, Optional, Type

from . import errors
from .byvalue import (BUILTINS, CONTEXT, LIVE, MISSING, NAMES, PACKAGE, PROTOCOL, SENDERS, Load, Proxy, Reducers, captured,
                      global_names, lent_to, own_module, shared)
from .errors import KernelError, PackError, ProtocolError, UnpackError
from .wire import Buffer, Payload, decode_error, encode_error

DIGEST_SIZE = 16

_LARGE = 256 * 1024  # bytes objects from here on are pieces of their own
_OUT_OF_BAND = 16 * 1024  # and buffers (numpy arrays) from here on
_SHORT = 64 * 1024  # str and bytes up to here are pickled without ado
_MAX_PIECES = 1000

_PLAIN = 0x80
_PIECES = 4  # flag, besides those of byvalue.py: it has more than one piece
_HEAD = struct.Struct("<BB")  # flags, minor version of the Python that packed
_COUNTS = struct.Struct("<HH")  # large bytes, buffers

_SCALARS: frozenset[Any] = frozenset((int, float, bool, type(None), complex))
_SIMPLE = _SCALARS | {str, bytes}

_CACHED_FUNCTIONS = 256
_CACHED_SIZE = 64 * 1024

_dumps, _loads = pickle.dumps, pickle.loads
_FLAGS = CONTEXT | NAMES | _PIECES | LIVE | SENDERS
_FOLDER = os.path.dirname(os.path.abspath(__file__)) + os.sep


class _Sink:
    """The file that a pickler writes to: keeps large bytes as they are and takes the out-of-band buffers."""

    __slots__ = ("max_pieces", "small", "large", "buffers")

    def __init__(self, max_pieces: int = _MAX_PIECES) -> None:
        self.max_pieces = max_pieces
        self.small: list[list[bytes]] = [[]]  # the stream is small[0] large[0] small[1] large[1] ...
        self.large: list[bytes] = []
        self.buffers: list[memoryview] = []

    def _has_room(self) -> bool:
        return len(self.large) + len(self.buffers) < self.max_pieces - 1

    def write(self, data: Any) -> int:
        if type(data) is not bytes:
            # A bytearray is copied because it could not be resized, and could change, until it has been sent.
            data = bytes(data.raw() if type(data) is pickle.PickleBuffer else data)
        if len(data) >= _LARGE and self._has_room():
            self.large.append(data)
            self.small.append([])
        else:
            self.small[-1].append(data)
        return len(data)

    def take(self, buffer: pickle.PickleBuffer) -> bool:
        """The pickler's `buffer_callback`; true leaves the buffer in the stream."""
        raw = buffer.raw()
        if raw.nbytes < _OUT_OF_BAND or not self._has_room():
            return True
        self.buffers.append(raw)
        return False

    def payload(self, flags: int) -> Payload:
        small = [b"".join(s) for s in self.small]
        if not self.large and not self.buffers:
            return _HEAD.pack(flags, sys.version_info[1]) + small[0] if flags else small[0]
        head = [
            _HEAD.pack(flags | _PIECES, sys.version_info[1]),
            _COUNTS.pack(len(self.large), len(self.buffers)),
            bytes([b.readonly for b in self.buffers]),
            struct.pack(f"<{len(small)}Q", *[len(s) for s in small]),
        ]
        return [b"".join(head + small), *self.large, *self.buffers]


_pickler: Optional[Type[Any]] = None


def _pickler_class() -> Type[Any]:
    """The pickler for all but built-in scalars. Made when first needed, since cloudpickle takes time to import."""
    global _pickler
    if _pickler is None:
        from cloudpickle import cloudpickle  # type: ignore[import-untyped]

        _pickler = type("_Pickler", (Reducers, cloudpickle.Pickler), {"cloud": cloudpickle})
    return _pickler


def pack(obj: Any) -> Payload:
    """Pickle an object.

    Returns:
        `bytes`, or a list of pieces when it holds large bytes or buffers. These are the object's own memory, which
        must not change before the payload has been sent.

    Raises:
        PackError: it can't be pickled; names the part and says why.
    """
    kind = type(obj)
    if kind is tuple and len(obj) == 2 and type(obj[0]) is tuple and type(obj[1]) is dict:  # args, kwargs
        args, kwargs = obj
        if not kwargs:
            for arg in args:
                if type(arg) not in _SCALARS:
                    break
            else:
                return _dumps(obj, PROTOCOL)
        if _are_small(args) and _are_small(kwargs.values()):
            return _dumps(obj, PROTOCOL)
    elif kind in _SCALARS:
        return _dumps(obj, PROTOCOL)
    elif kind is str or kind is bytes:
        if len(obj) <= _SHORT:
            return _dumps(obj, PROTOCOL)
    elif (kind is list or kind is tuple) and _are_small(obj):
        return _dumps(obj, PROTOCOL)
    return _pack_any(obj)


def _are_small(values: Any) -> bool:
    """Whether all are built-in scalars, and none is a large str or bytes."""
    if not _SIMPLE.issuperset(map(type, values)):
        return False
    return sum([len(v) for v in values if type(v) is str or type(v) is bytes]) <= _SHORT


def _pack_any(obj: Any, max_pieces: int = _MAX_PIECES) -> Payload:
    try:
        return _dump(obj, max_pieces)
    except MemoryError:
        raise PackError(f"there is not enough memory to pickle {_where_fails(obj)}") from None
    except Exception as e:
        if isinstance(e, RecursionError) or isinstance(e.__cause__, RecursionError):
            raise PackError(f"can not pickle {_describe(obj)}: it is nested too deeply") from None
        if _dill is not None:
            return _dill_dump(obj, e)
        raise PackError(f"can not pickle {_where_fails(obj)}: {type(e).__name__}: {e}") from e


_dill: Any = None


def use(pickler: str) -> None:
    """Choose how this process pickles: "pickle", as described at the top of this file, which is the default;
    "cloudpickle": functions prefer the values that they had here to those in the engine's namespace; "dill": what can not
    be pickled otherwise is left to dill.

    Raises:
        PackError: dill is not installed.
    """
    global _dill
    if pickler not in ("pickle", "cloudpickle", "dill"):
        raise ValueError(f"there is no pickler {pickler!r}; choose pickle, cloudpickle or dill")
    dill = None
    if pickler == "dill":
        try:
            import dill  # type: ignore[import-not-found,import-untyped,no-redef,unused-ignore]
        except ImportError:
            raise PackError("dill is not installed here; install it with `pip install dill`, on the engines as well") from None
    Reducers.senders_win, _dill = pickler == "cloudpickle", dill
    _cache.clear()


def on_arrival(what: str, *args: Any) -> tuple[Any, ...]:
    """What an object's `__reduce__` returns that is to become something else where it arrives: `what` names a function of
    the module that all payloads may refer to."""
    return getattr(shared, what), args


def on_publish(send: Callable[[dict[str, Any]], None]) -> None:
    """This process is an engine: `send` takes what its tasks publish."""
    shared.publish = send


def on_current_task(tell: Callable[[], Optional[dict[str, Any]]]) -> None:
    """This process is an engine: `tell` knows what it runs."""
    shared.current_task = tell


def current_task() -> Optional[dict[str, Any]]:
    """What an engine says of the task that it runs; None elsewhere."""
    return shared.current_task()  # type: ignore[no-any-return]


def publish(data: dict[str, Any]) -> None:
    """Hand over what a task publishes.

    Raises:
        RuntimeError: this process is no engine.
    """
    if shared.publish is None:
        raise RuntimeError("publish_data is for tasks: it works on an engine, while a task runs")
    shared.publish(data)


def _dump(obj: Any, max_pieces: int = _MAX_PIECES) -> Payload:
    sink = _Sink(max_pieces)
    pickler = _pickler_class()(sink)
    pickler.dump(obj)
    return sink.payload(pickler.flags)


def _dill_dump(obj: Any, trouble: Exception) -> bytes:
    try:
        return _dill.dumps(obj, PROTOCOL, recurse=True)  # type: ignore[no-any-return]
    except Exception as e:
        raise PackError(f"can not pickle {_where_fails(obj)}, not even with dill: {type(e).__name__}: {e}") from trouble


def _describe(obj: Any) -> str:
    if isinstance(obj, types.FunctionType):
        return f"the function {obj.__qualname__!r}"
    return f"an object of type {type(obj).__qualname__!r}"


def _parts(obj: Any) -> Iterator[tuple[str, Any]]:
    """The named parts that an object consists of."""
    if isinstance(obj, types.FunctionType):
        yield from [(f"its global {k!r}", v) for k, v in captured(obj).items()]
        for name, cell in zip(obj.__code__.co_freevars, obj.__closure__ or ()):
            try:
                yield f"its variable {name!r}", cell.cell_contents
            except ValueError:
                pass
        yield from [("a default of it", v) for v in obj.__defaults__ or ()]
    elif isinstance(obj, types.MethodType):
        yield "its object", obj.__self__
    elif isinstance(obj, functools.partial):
        yield from [("the function of the partial", obj.func), *_parts((obj.args, obj.keywords))]
    elif isinstance(obj, (list, tuple)):
        yield from [(f"item {i}", v) for i, v in enumerate(obj)]
    elif isinstance(obj, dict):
        yield from [(f"item {str(k)[:60]!r}", v) for k, v in obj.items()]
    elif isinstance(type(obj).__reduce__, types.FunctionType):
        return  # how it is pickled is its own affair
    elif isinstance(getattr(obj, "__dict__", None), dict) and not isinstance(obj, type):
        yield from [(f"its attribute {k!r}", v) for k, v in vars(obj).items()]


def _where_fails(obj: Any) -> str:
    """Name the innermost part of an object that can't be pickled by itself."""
    path: list[str] = []
    if type(obj) is tuple and len(obj) == 2 and type(obj[0]) is tuple and type(obj[1]) is dict:
        parts = [(f"argument {i}", v) for i, v in enumerate(obj[0])]
        parts += [(f"argument {k!r}", v) for k, v in obj[1].items()]
    else:
        path, parts = [_describe(obj)], list(_parts(obj))
    while parts and len(path) < 6:
        for label, value in parts[:1000]:
            try:
                _dump(value)
            except Exception:
                path.append(label)
                parts = list(_parts(value))
                break
        else:
            break
    return ", ".join(path) or _describe(obj)


class _Check(NamedTuple):
    """What must still hold of a function by value: the very same objects in all places."""

    function: types.FunctionType
    code: Any
    defaults: Any
    kwdefaults: Any
    attributes: dict[str, Any]
    cells: list[tuple[Any, Any]]
    mappings: list[tuple[dict[str, Any], int, list[tuple[str, Any]]]]  # length: -1 does not matter


class _Cached:
    """A packed function and what must still hold for the payload to be right."""

    __slots__ = ("function", "checks", "modules", "registered", "result")

    def __init__(self, function: Any, checks: list[_Check], modules: int, registered: int,
                 result: tuple[bytes, Payload]):
        self.function, self.checks, self.modules, self.registered = function, checks, modules, registered
        self.result = result


_cache: dict[int, _Cached] = {}
_by_value_modules: Any = ()


def pack_function(f: Any) -> tuple[bytes, Payload]:
    """Pack a callable; fast when it has been packed before and neither it nor what it refers to has changed.

    Returns:
        (16-byte digest of the payload, payload)

    Raises:
        PackError: it can't be pickled.
    """
    cached = _cache.get(id(f))
    if cached is not None and _still_holds(cached):
        return cached.result
    payload = _pack_any(f)
    from hashlib import blake2b  # takes 3 ms, and engines do without it

    digest = blake2b(digest_size=DIGEST_SIZE)
    for piece in [payload] if isinstance(payload, bytes) else payload:
        digest.update(piece)
    result = digest.digest(), payload
    _cache.pop(id(f), None)
    if type(payload) is bytes and len(payload) <= _CACHED_SIZE:
        _remember(f, result)
    return result


def _still_holds(cached: _Cached) -> bool:
    if cached.registered != len(_by_value_modules) or (cached.modules and cached.modules != len(sys.modules)):
        return False
    for f, code, defaults, kwdefaults, attributes, cells, mappings in cached.checks:
        if f.__code__ is not code or f.__defaults__ is not defaults:
            return False
        if f.__kwdefaults__ is not kwdefaults or f.__dict__ is not attributes:
            return False
        try:
            for cell, value in cells:
                if cell.cell_contents is not value:
                    return False
        except ValueError:  # emptied
            return False
        for mapping, length, items in mappings:
            if length >= 0 and len(mapping) != length:
                return False
            for name, value in items:
                if mapping.get(name, MISSING) is not value:
                    return False
    return True


def _remember(f: Any, result: tuple[bytes, Payload]) -> None:
    """Keep a packed function if all that it depends on is immutable or checked by identity."""
    global _by_value_modules
    _by_value_modules = _pickler_class().cloud._PICKLE_BY_VALUE_MODULES
    checks: dict[int, Optional[_Check]] = {}
    if not _is_constant(f, checks):
        return
    modules = any(type(v) is types.ModuleType for c in checks.values() if c for m in c.mappings for _, v in m[2])
    for key in list(_cache)[: len(_cache) - _CACHED_FUNCTIONS + 1] if len(_cache) >= _CACHED_FUNCTIONS else ():
        _cache.pop(key, None)
    _cache[id(f)] = _Cached(f, [c for c in checks.values() if c], len(sys.modules) if modules else 0,
                            len(_by_value_modules), result)


def _is_constant(value: Any, checks: dict[int, Optional[_Check]]) -> bool:
    """Whether a value can't change unnoticed. Adds what has to be checked of functions by value."""
    kind = type(value)
    if kind in _SIMPLE or value is MISSING or id(value) in checks:
        return True
    if kind is tuple or kind is frozenset:
        return all(_is_constant(v, checks) for v in value)
    if kind is types.BuiltinFunctionType:
        return type(value.__self__) is types.ModuleType
    cloud = _pickler_class().cloud
    if kind is types.ModuleType or isinstance(value, type):
        return bool(cloud._should_pickle_by_reference(value))
    if kind is not types.FunctionType:
        return False
    if cloud._should_pickle_by_reference(value):
        return True
    checks[id(value)] = None  # for functions that refer to themselves
    check = _check_of(value)
    checks[id(value)] = check
    dependencies = [*(value.__defaults__ or ()), *[v for _, v in check.cells]]
    dependencies += [v for m in check.mappings for _, v in m[2]]
    return not lent_to(value) and all(_is_constant(v, checks) for v in dependencies)


def _check_of(f: types.FunctionType) -> _Check:
    scope = f.__globals__
    cells = []
    for cell in f.__closure__ or ():
        try:
            cells.append((cell, cell.cell_contents))
        except ValueError:
            cells.append((cell, object()))  # never holds, so that an empty cell is looked at again
    mappings = [(m, len(m), list(m.items())) for m in (f.__dict__, f.__kwdefaults__) if m is not None]
    if own_module(scope.get("__name__")) is None:
        mappings.append((scope, -1, [(n, scope.get(n, MISSING)) for n in global_names(f.__code__)]))
    return _Check(f, f.__code__, f.__defaults__, f.__kwdefaults__, f.__dict__, cells, mappings)


class _Source:
    """The file that an unpickler reads from: the pieces of a stream, one after the other."""

    def __init__(self, pieces: List[memoryview]):
        self._pieces = iter(pieces)
        self._piece, self._at = memoryview(b""), 0

    def read(self, size: int) -> Any:
        end = self._at + size
        if end <= len(self._piece):
            part = self._piece[self._at : end]
            self._at = end
            return part
        target = bytearray(size)
        return bytes(memoryview(target)[: self.readinto(memoryview(target))])

    def readinto(self, target: Any) -> int:
        target = memoryview(target).cast("B")
        done = 0
        while done < len(target):
            part = self._piece[self._at : self._at + len(target) - done]
            if not part:
                following = next(self._pieces, None)
                if following is None:
                    break
                self._piece, self._at = following, 0
                continue
            target[done : done + len(part)] = part
            done += len(part)
            self._at += len(part)
        return done

    def readline(self) -> bytes:
        raise pickle.UnpicklingError("not a binary pickle")


def merged(names: dict[str, Any]) -> dict[str, Any]:
    """What `__builtins__` of a namespace has to be so that functions there see captured names: for `lend`."""
    return {**BUILTINS, **names}


class lend:
    """Context manager: functions of `namespace` see captured names while it is active; nothing of them stays.

    Args:
        namespace: the globals of the functions.
        extended: made by `merged`; None or {} lends nothing.
    """

    __slots__ = ("namespace", "extended", "before")

    def __init__(self, namespace: Optional[dict[str, Any]], extended: Optional[dict[str, Any]]):
        self.namespace, self.extended = namespace, extended

    def __enter__(self) -> None:
        if self.extended and self.namespace is not None:
            self.before = self.namespace.get("__builtins__", MISSING)
            self.namespace["__builtins__"] = self.extended

    def __exit__(self, *exc: Any) -> None:
        if self.extended and self.namespace is not None:
            if self.before is MISSING:
                self.namespace.pop("__builtins__", None)
            else:
                self.namespace["__builtins__"] = self.before


def unpack(payload: Payload, namespace: Optional[dict[str, Any]] = None,
           names: Optional[dict[str, Any]] = None) -> Any:
    """Rebuild an object from its payload.

    Args:
        payload: what `pack` made, in any buffers.
        namespace: the globals of the functions of `__main__` in it. Without it they get globals of their own,
            filled with the values that they had where they come from.
        names: filled with these values when a namespace is given. They have to be lent when the functions are
            called: `with lend(namespace, merged(names))`.

    Raises:
        UnpackError: it can't be unpickled here; says why.
    """
    try:
        if type(payload) is bytes and payload[0] == _PLAIN:
            return _loads(payload)
        return _load(payload, namespace, names)
    except UnpackError:
        raise
    except Exception as e:
        if e is shared.context.raised:
            raise
        raise UnpackError(_why_not(e, "here" if namespace is None else "on the engine")) from e
    finally:
        shared.context.raised = None


def is_live(payload: Payload) -> bool:
    """Whether a payload has to be unpacked anew each time, as it refers to what the namespace holds then."""
    head = payload if isinstance(payload, bytes) else payload[0]
    return head[0] != _PLAIN and bool(head[0] & LIVE)


def _load(payload: Payload, namespace: Optional[dict[str, Any]], names: Optional[dict[str, Any]]) -> Any:
    pieces = [memoryview(p) for p in ([payload] if isinstance(payload, bytes) else payload)]
    head = pieces[0]
    if head[0] == _PLAIN and len(pieces) == 1:
        return _loads(head)
    flags, minor = _HEAD.unpack_from(head)
    if flags == _PLAIN or flags & ~_FLAGS:
        raise UnpackError("can not unpickle: this is not a payload")
    if flags & CONTEXT and minor != sys.version_info[1]:
        raise UnpackError(f"can not unpickle a function or class of Python 3.{minor} with "
                          f"Python 3.{sys.version_info[1]}: use the same version for client and engines")
    stream: list[memoryview] = [head[_HEAD.size :]]
    buffers: list[Buffer] = []
    if flags & _PIECES:
        stream, buffers = _split(pieces)
    if not flags & CONTEXT:
        return _read(stream, buffers)
    if namespace is not None:
        namespace.setdefault("__builtins__", builtins)
    lent = merged({}) if flags & (NAMES | SENDERS) == NAMES and namespace is not None else None
    before = shared.context.load
    shared.context.load = Load(PACKAGE, namespace, {} if names is None else names, lent, bool(flags & SENDERS))
    try:
        with lend(namespace, lent):
            return _read(stream, buffers)
    finally:
        shared.context.load = before


def _split(pieces: list[memoryview]) -> tuple[list[memoryview], list[Buffer]]:
    """Put the pieces of a payload in order: (stream, buffers)."""
    head = pieces[0]
    count, buffer_count = _COUNTS.unpack_from(head, _HEAD.size)
    at = _HEAD.size + _COUNTS.size
    if len(pieces) != 1 + count + buffer_count:
        raise UnpackError("can not unpickle: the payload has lost pieces")
    readonly = bytes(head[at : at + buffer_count])
    at += buffer_count
    sizes = struct.unpack_from(f"<{count + 1}Q", head, at)
    at += 8 * (count + 1)
    stream = []
    for i, size in enumerate(sizes):
        stream += [head[at : at + size], *pieces[i + 1 : i + 2]] if i < count else [head[at : at + size]]
        at += size
    buffers: list[Buffer] = []
    for piece, fixed in zip(pieces[1 + count :], readonly):
        if fixed:
            buffers.append(piece.toreadonly())
        else:
            buffers.append(bytearray(piece) if piece.readonly else piece)
    return stream, buffers


def _read(stream: list[memoryview], buffers: list[Buffer]) -> Any:
    if len(stream) == 1:
        return _loads(stream[0], buffers=buffers)
    return pickle.Unpickler(_Source(stream), buffers=buffers).load()


def _why_not(e: Exception, where: str) -> str:
    if isinstance(e, ModuleNotFoundError) and e.name:
        return f"can not unpickle: there is no module {e.name!r} {where}; it must be importable {where}"
    if isinstance(e, AttributeError):
        return f"can not unpickle: {e}; the same version of the module must be importable {where}"
    if isinstance(e, MemoryError):
        return f"there is not enough memory {where} to unpickle this"
    if isinstance(e, RecursionError):
        return "can not unpickle: it is nested too deeply"
    return f"can not unpickle: {type(e).__name__}: {e}"


def _text(exc: BaseException) -> str:
    try:
        return str(exc)
    except Exception as e:
        return f"<its message could not be made: {type(e).__name__}>"


def _traceback_text(exc: BaseException) -> str:
    """The traceback from the first frame on that is not this package's."""
    import traceback

    tb = exc.__traceback__
    while tb is not None and tb.tb_frame.f_code.co_filename.startswith(_FOLDER):
        tb = tb.tb_next
    if tb is None and not isinstance(exc, errors.IPythonError):
        tb = exc.__traceback__  # a bug of ours: show where
    try:
        return "".join(traceback.format_exception(type(exc), exc, tb))
    except Exception as e:  # a hostile __str__ or source encoding
        return f"{type(exc).__name__}: {_text(exc)} (no traceback: {type(e).__name__})\n"


def pack_whole(obj: Any) -> bytes:
    """`pack`, with a payload that is one piece however large the object."""
    payload = _pack_any(obj, 1)
    assert isinstance(payload, bytes)
    return payload


def _pickle_exception(exc: BaseException, text: str) -> bytes:
    """Pickle an exception such that it reads the same when it has been unpickled; empty if that fails.

    Many classes can't be rebuilt the way pickle does it, because their `__init__` takes something else than `args`, or
    carry things that can't be pickled. They are rebuilt without `__init__`, if need be without what they carry.
    """
    bare = functools.partial(Proxy, exc)
    for candidate in (exc, bare((type(exc), exc.args, vars(exc) or None)),  # tblib and others change how exceptions are pickled
                      bare((shared.exception, (type(exc), exc.args, vars(exc)))),
                      bare((shared.exception, (type(exc), (text,), {})))):
        try:
            pickled = pack_whole(candidate)
            copy = unpack(pickled)
        except Exception:  # whatever it is: the next way, or else the text, has to do
            copy = None
        if type(copy) is type(exc) and _text(copy) == text:
            return pickled
    return b""


def pack_error(exc: BaseException, where: dict[str, Any]) -> Payload:
    """Pack an exception that a task raised.

    Args:
        exc: the exception. It travels as an object if it can be pickled and unpickled again, and as text in any case.
        where: `engine_id`, `engine_uuid`, `host`, `pid` of the engine.
    """
    kind = type(exc)
    own = getattr(errors, kind.__name__, None) is kind and issubclass(kind, KernelError)
    info = {"ename": kind.__name__, "evalue": _text(exc), "traceback": _traceback_text(exc), "own": own, **where}
    return encode_error(info, b"" if own else _pickle_exception(exc, info["evalue"]))


def describe_error(ename: str, evalue: str, **where: Any) -> bytes:
    """What `pack_error` makes, for one of this package's errors that was not raised."""
    return encode_error({"ename": ename, "evalue": evalue, "traceback": "", "own": True, **where})


def unpack_error(payload: Payload) -> KernelError:
    """The exception to raise for a failed task."""
    try:
        info, pickled = decode_error(payload)
    except ProtocolError as e:
        return UnpackError(f"the task failed, and its error could not be read: {e}")
    original = None
    if pickled:
        try:
            original = unpack(pickled)
        except UnpackError:
            pass  # its class is not known here: the text has to do
    return errors.remote_error(info, original)
