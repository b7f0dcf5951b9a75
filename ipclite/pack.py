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
- A payload never holds this package's name. It refers to a module `_ALIAS` which every copy of the package
  finds or makes, whatever its own name is.
- What is evaluated on arrival (`_shared.evaluate`) makes a payload *live*: it is to be unpacked anew for each call.
- numpy and cloudpickle are imported by whoever needs them, not by importing this file.
"""

from __future__ import annotations

import builtins
import copyreg
import functools
import importlib
import os
import pickle
import struct
import sys
import threading
import types
import weakref
from typing import Any, Callable, Iterable, Iterator, List, NamedTuple, Optional, Type

from . import errors
from .errors import KernelError, PackError, ProtocolError, UnpackError
from .wire import Buffer, Payload, decode_error, encode_error

PROTOCOL = 5  # the pickle protocol with out-of-band buffers
DIGEST_SIZE = 16

_ALIAS = "_ipclite_pack_1"  # to be counted up when the functions in `_shared_module` change

_LARGE = 256 * 1024  # bytes objects from here on are pieces of their own
_OUT_OF_BAND = 16 * 1024  # and buffers (numpy arrays) from here on
_SHORT = 64 * 1024  # str and bytes up to here are pickled without ado
_MAX_PIECES = 1000

_PLAIN = 0x80
_CONTEXT, _NAMES, _PIECES = 1, 2, 4  # flags: needs a context, has captured names, has more than one piece
_LIVE, _SENDERS = 8, 16  # flags: must be unpacked anew each time; the sender's names win over the namespace's
_HEAD = struct.Struct("<BB")  # flags, minor version of the Python that packed
_COUNTS = struct.Struct("<HH")  # large bytes, buffers

_SCALARS: frozenset[Any] = frozenset((int, float, bool, type(None), complex))
_SIMPLE = _SCALARS | {str, bytes}

_CACHED_FUNCTIONS = 256
_CACHED_SIZE = 64 * 1024

_dumps, _loads = pickle.dumps, pickle.loads
_FLAGS = _CONTEXT | _NAMES | _PIECES | _LIVE | _SENDERS
_MISSING = object()
_BUILTINS = vars(builtins)
_PACKAGE = __package__ or ""
_FOLDER = os.path.dirname(os.path.abspath(__file__)) + os.sep


class _Load:
    """One call of `unpack`: where the functions that it builds live."""

    __slots__ = ("package", "namespace", "globals", "names", "lent", "fresh")

    def __init__(self, package: str, namespace: Optional[dict[str, Any]], names: dict[str, Any],
                 lent: Optional[dict[str, Any]], senders: bool = False):
        self.package, self.namespace, self.names, self.lent = package, namespace, names, lent
        self.globals: dict[str, Any] = {"__name__": "__main__", "__builtins__": builtins}
        if namespace is None:
            self.names = self.globals
        elif senders:
            self.globals["__builtins__"] = _Behind(namespace)
            self.names = self.globals
        else:
            self.globals = namespace
        self.fresh: list[type] = []  # classes that this call has made


class _Behind(dict):  # type: ignore[type-arg]
    """The built-ins of functions with globals of their own: what they lack is looked up in the engine's namespace."""

    def __init__(self, namespace: dict[str, Any]):
        super().__init__(_BUILTINS)
        self._namespace = namespace

    def __missing__(self, name: str) -> Any:
        return self._namespace[name]


class _Context(threading.local):
    load: Optional[_Load] = None
    raised: Optional[BaseException] = None  # by an expression that was evaluated while unpacking


def _shared_module() -> types.ModuleType:
    """The module that payloads refer to: all that is needed to rebuild what this package's pickler took apart."""
    context = _Context()
    received: weakref.WeakSet[type] = weakref.WeakSet()  # classes that another process owns

    def current() -> _Load:
        return context.load or _Load(_PACKAGE, None, {}, None)

    def own(module: str, name: str) -> Any:
        package = current().package
        found: Any = importlib.import_module(package + "." + module if module else package)
        for part in name.split(".") if name else ():
            found = getattr(found, part)
        return found

    def function(code: types.CodeType, cells: Optional[tuple[Any, ...]], module: Optional[str]) -> types.FunctionType:
        scope = current().globals if module is None else vars(own(module, ""))
        return types.FunctionType(code, scope, code.co_name, None, cells)

    def same(f: Any) -> Any:
        return f

    def fill(f: types.FunctionType, state: tuple[Any, ...]) -> None:
        members, attributes, contents, names, _ = state
        for name, value in members.items():
            setattr(f, name, value)
        f.__dict__.update(attributes)
        for at, value in contents.items():
            f.__closure__[at].cell_contents = value  # type: ignore[index]
        if names:
            load = current()
            load.names.update(names)
            if load.lent is not None:
                load.lent.update(names)

    def cell() -> Any:
        return types.CellType()

    def memoized(f: Any, maxsize: Optional[int], typed: bool) -> Any:
        return functools.lru_cache(maxsize, typed)(f)

    def refill(wrapper: Any, state: tuple[Any, dict[str, Any]]) -> None:
        wrapper.__dict__.update(state[1])

    def new_class(make: Callable[..., Any], args: tuple[Any, ...], known: Callable[[str], Any]) -> Any:
        before = known(args[-2])
        made = make(*args)
        if before is None:
            received.add(made)
            current().fresh.append(made)
        return made

    def set_class(cls: type, state: tuple[Any, Callable[..., Any], bool]) -> None:
        members, setter, from_owner = state
        if any(c is cls for c in current().fresh) or (from_owner and cls in received):
            setter(cls, members)

    def view(buffer: Any, form: str, shape: tuple[int, ...]) -> memoryview:
        flat = memoryview(buffer)
        return flat.cast(form, shape) if flat.nbytes else flat.cast(form)  # type: ignore[call-overload,no-any-return]

    def exception(cls: type, args: tuple[Any, ...], attributes: dict[str, Any]) -> Any:
        made = cls.__new__(cls, *args)
        made.args = args
        made.__dict__.update(attributes)
        return made

    def evaluate(expression: str) -> Any:
        load = current()
        if load.namespace is None:
            return own("functions", "Reference")(expression)
        try:
            return eval(compile(expression, "<reference>", "eval"), load.namespace)
        except BaseException as e:
            context.raised = e
            raise

    def packed(pieces: list[Any]) -> Any:
        load = current()
        return own("pack", "unpack")(pieces, load.namespace, load.names)

    def known_class(tracker_id: str) -> Any:
        from cloudpickle import cloudpickle  # type: ignore[import-untyped]

        return cloudpickle._DYNAMIC_CLASS_TRACKER_BY_ID.get(tracker_id)

    module = types.ModuleType(_ALIAS)
    for f in (own, function, same, fill, cell, memoized, refill, new_class, set_class, view, exception, evaluate, packed,
              known_class):
        f.__module__, f.__qualname__ = _ALIAS, f.__name__
        setattr(module, f.__name__, f)
    module.context, module.received = context, received  # type: ignore[attr-defined]
    module.publish = None  # type: ignore[attr-defined]  # an engine puts there what sends published data
    return module


_shared: Any = sys.modules.setdefault(_ALIAS, _shared_module())


class _Proxy:
    """Stands for a function or cell whose content is to be pickled later, when it has been made."""

    __slots__ = ("reduced", "original")

    def __init__(self, original: Any, reduced: tuple[Any, ...]):
        self.original, self.reduced = original, reduced

    def __reduce__(self) -> tuple[Any, ...]:
        return self.reduced


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
        from cloudpickle import cloudpickle

        _pickler = type("_Pickler", (_Reducers, cloudpickle.Pickler), {"cloud": cloudpickle})
    return _pickler


class _Reducers:
    """What differs from cloudpickle's pickler: functions and classes of `__main__` and things of this package."""

    cloud: Any
    dispatch_table: Any
    _table: dict[type, Any] = {}
    _registered: dict[Any, Any] = {}  # the `copyreg.dispatch_table` that is in `_table`

    def __init__(self, sink: _Sink):
        kind = type(self)
        if not kind._table or kind._registered != copyreg.dispatch_table:
            kind._registered = dict(copyreg.dispatch_table)
            kind._table = {**kind._registered, **self.cloud.Pickler._dispatch_table, memoryview: _reduce_view}
        self.dispatch_table = kind._table  # a plain dict: cloudpickle's ChainMap costs 1 us per object
        pickle.Pickler.__init__(self, sink, PROTOCOL, buffer_callback=sink.take)  # type: ignore[arg-type]
        self.globals_ref: dict[int, Any] = {}
        self.proto = PROTOCOL
        self.flags = 0
        self._proxies: dict[int, _Proxy] = {}

    def reducer_override(self, obj: Any) -> Any:
        kind = type(obj)
        if kind is types.FunctionType:
            return self._reduce_function(obj)
        if issubclass(kind, type):
            return self._reduce_class(obj)
        if kind is types.ModuleType and _own_module(obj.__name__) is not None:
            self.flags |= _CONTEXT
            return _shared.own, (_own_module(obj.__name__), "")
        if kind is functools._lru_cache_wrapper:
            return self._reduce_memoized(obj)
        return NotImplemented

    def _own_name(self, obj: Any) -> Optional[tuple[str, str]]:
        """(module, name) of something that this package defines, if it can be found by them."""
        module = _own_module(getattr(obj, "__module__", None))
        if module is None:
            return None
        name = obj.__qualname__
        found: Any = sys.modules.get(obj.__module__)
        for part in name.split("."):
            found = getattr(found, part, None)
        return (module, name) if found is obj else None

    def _reduce_function(self, f: types.FunctionType) -> Any:
        own = self._own_name(f)
        if own is not None:
            self.flags |= _CONTEXT
            return _shared.own, own
        if f.__module__ == _ALIAS:
            self.flags |= _CONTEXT | _LIVE if f is _shared.evaluate else _CONTEXT
        if self.cloud._should_pickle_by_reference(f):
            return NotImplemented
        self.flags |= _CONTEXT
        if not _is_ours(f):
            return self._dynamic_function_reduce(f)  # type: ignore[attr-defined]
        return _shared.same, (self._proxy(f),), self._function_state(f), None, None, _shared.fill

    def _proxy(self, obj: Any) -> _Proxy:
        proxy = self._proxies.get(id(obj))
        if proxy is None:
            reduced: tuple[Any, ...] = _shared.cell, ()
            if isinstance(obj, types.FunctionType):
                cells = tuple([self._proxy(c) for c in obj.__closure__]) if obj.__closure__ else None
                reduced = _shared.function, (obj.__code__, cells, _own_module(obj.__globals__.get("__name__")))
            proxy = self._proxies[id(obj)] = _Proxy(obj, reduced)
        return proxy

    def _function_state(self, f: types.FunctionType) -> tuple[Any, ...]:
        members: dict[str, Any] = {"__qualname__": f.__qualname__, "__module__": f.__module__}
        for name in ("__name__", "__doc__", "__defaults__", "__kwdefaults__", "__annotations__"):
            value = getattr(f, name)
            if value and not (name == "__name__" and value == f.__code__.co_name):
                members[name] = value
        own = _own_module(f.__module__)
        if own is not None:
            del members["__module__"]  # the globals say it, by the name that the package has there
        contents = {}
        for at, cell in enumerate(f.__closure__ or ()):
            try:
                contents[at] = cell.cell_contents
            except ValueError:  # still empty
                pass
        names = _captured(f) if _own_module(f.__globals__.get("__name__")) is None else {}
        if names:
            self.flags |= _NAMES | _SENDERS if _senders_win else _NAMES
        submodules = _submodules(f.__code__, [*names.values(), *contents.values()])
        return members, f.__dict__, contents, names, submodules

    def _reduce_class(self, cls: type) -> Any:
        own = self._own_name(cls)
        if own is not None:
            self.flags |= _CONTEXT
            return _shared.own, own
        reduced = self.cloud._class_reduce(cls)
        if reduced is NotImplemented or len(reduced) < 6:
            return reduced
        self.flags |= _CONTEXT
        make, args, members, _, _, setter = reduced
        state = members, setter, cls not in _shared.received
        return _shared.new_class, (make, args, _shared.known_class), state, None, None, _shared.set_class

    def _reduce_memoized(self, wrapper: Any) -> Any:
        f = wrapper.__wrapped__
        if type(f) is not types.FunctionType or not _is_ours(f) or self._own_name(wrapper):
            return NotImplemented
        settings = wrapper.cache_parameters()
        args = self._proxy(f), settings["maxsize"], settings["typed"]
        self.flags |= _CONTEXT
        return _shared.memoized, args, (f, wrapper.__dict__), None, None, _shared.refill


def _reduce_view(view: memoryview) -> tuple[Any, ...]:
    flat = view.cast("B") if view.c_contiguous and view.nbytes else memoryview(view.tobytes())
    if len(view.format) == 1:
        return _shared.view, (pickle.PickleBuffer(flat), view.format, view.shape)
    return _shared.view, (pickle.PickleBuffer(flat), "B", flat.shape)  # records and the like: as plain bytes


def _own_module(name: Any) -> Optional[str]:
    """The name of one of this package's modules within the package, "" for the package; None: not of this package."""
    if type(name) is not str or not name.startswith(_PACKAGE):
        return None
    rest = name[len(_PACKAGE) :]
    return rest[1:] if not rest or rest[0] == "." else None


def _is_ours(f: types.FunctionType) -> bool:
    """Whether a function by value is rebuilt in a namespace: the engine's, or a module of this package."""
    home = f.__globals__.get("__name__")
    return home == "__main__" or _own_module(home) is not None


_names_of_code: weakref.WeakKeyDictionary[types.CodeType, tuple[str, ...]] = weakref.WeakKeyDictionary()
# Class bodies read globals by the last two.
_READS = frozenset(("LOAD_GLOBAL", "DELETE_GLOBAL", "LOAD_NAME", "LOAD_FROM_DICT_OR_GLOBALS"))


def _nested(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for const in code.co_consts:
        if isinstance(const, types.CodeType):
            yield from _nested(const)


def _global_names(code: types.CodeType) -> tuple[str, ...]:
    """The names that a function reads from its globals, itself or in functions within it."""
    names = _names_of_code.get(code)
    if names is None:
        import dis

        found = [i.argval for c in _nested(code) for i in dis.get_instructions(c) if i.opname in _READS]
        names = tuple(n for n in dict.fromkeys(found) if n not in ("__name__", "__builtins__"))
        _names_of_code[code] = names
    return names


def _lent_to(f: types.FunctionType) -> dict[str, Any]:
    """The captured names that a function which was sent here sees besides its globals; often none."""
    spare = getattr(f, "__builtins__", None) or f.__globals__.get("__builtins__")  # before 3.10 only the latter
    return spare if isinstance(spare, dict) and spare is not _BUILTINS else {}


def _captured(f: types.FunctionType) -> dict[str, Any]:
    """What the names that a function reads stand for, built-ins excepted."""
    scope, lent = f.__globals__, _lent_to(f)
    captured = {}
    for name in _global_names(f.__code__):
        value = scope.get(name, _MISSING)
        if value is _MISSING:
            value = lent.get(name, _MISSING)
            if value is _MISSING or value is _BUILTINS.get(name, _MISSING):
                continue
        captured[name] = value
    return captured


def _submodules(code: types.CodeType, values: Iterable[Any]) -> list[types.ModuleType]:
    """Submodules that the code reaches as attributes (`xml.dom.minidom`): they are to be imported there as well."""
    packages = [v.__name__ + "." for v in values if type(v) is types.ModuleType and hasattr(v, "__path__")]
    if not packages:
        return []
    words = {name for c in _nested(code) for name in c.co_names}
    found = []
    for package in packages:
        for name, module in list(sys.modules.items()):
            if name.startswith(package) and module is not None and words.issuperset(name[len(package) :].split(".")):
                found.append(module)
    return found


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


_senders_win = False
_dill: Any = None


def use(pickler: str) -> None:
    """Choose how this process pickles: "pickle", as described at the top of this file, which is the default;
    "cloudpickle": functions prefer the values that they had here to those in the engine's namespace; "dill": what can not
    be pickled otherwise is left to dill.

    Raises:
        PackError: dill is not installed.
    """
    global _senders_win, _dill
    if pickler not in ("pickle", "cloudpickle", "dill"):
        raise ValueError(f"there is no pickler {pickler!r}; choose pickle, cloudpickle or dill")
    dill = None
    if pickler == "dill":
        try:
            import dill  # type: ignore[import-not-found,import-untyped,no-redef,unused-ignore]
        except ImportError:
            raise PackError("dill is not installed here; install it with `pip install dill`, on the engines as well") from None
    _senders_win, _dill = pickler == "cloudpickle", dill
    _cache.clear()


def on_arrival(what: str, *args: Any) -> tuple[Any, ...]:
    """What an object's `__reduce__` returns that is to become something else where it arrives: `what` names a function of
    the module that all payloads may refer to."""
    return getattr(_shared, what), args


def on_publish(send: Callable[[dict[str, Any]], None]) -> None:
    """This process is an engine: `send` takes what its tasks publish."""
    _shared.publish = send


def publish(data: dict[str, Any]) -> None:
    """Hand over what a task publishes.

    Raises:
        RuntimeError: this process is no engine.
    """
    if _shared.publish is None:
        raise RuntimeError("publish_data is for tasks: it works on an engine, while a task runs")
    _shared.publish(data)


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
        yield from [(f"its global {k!r}", v) for k, v in _captured(obj).items()]
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
                if mapping.get(name, _MISSING) is not value:
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
    if kind in _SIMPLE or value is _MISSING or id(value) in checks:
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
    return not _lent_to(value) and all(_is_constant(v, checks) for v in dependencies)


def _check_of(f: types.FunctionType) -> _Check:
    scope = f.__globals__
    cells = []
    for cell in f.__closure__ or ():
        try:
            cells.append((cell, cell.cell_contents))
        except ValueError:
            cells.append((cell, object()))  # never holds, so that an empty cell is looked at again
    mappings = [(m, len(m), list(m.items())) for m in (f.__dict__, f.__kwdefaults__) if m is not None]
    if _own_module(scope.get("__name__")) is None:
        mappings.append((scope, -1, [(n, scope.get(n, _MISSING)) for n in _global_names(f.__code__)]))
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
    return {**_BUILTINS, **names}


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
            self.before = self.namespace.get("__builtins__", _MISSING)
            self.namespace["__builtins__"] = self.extended

    def __exit__(self, *exc: Any) -> None:
        if self.extended and self.namespace is not None:
            if self.before is _MISSING:
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
        if e is _shared.context.raised:
            raise
        raise UnpackError(_why_not(e, "here" if namespace is None else "on the engine")) from e
    finally:
        _shared.context.raised = None


def is_live(payload: Payload) -> bool:
    """Whether a payload has to be unpacked anew each time, as it refers to what the namespace holds then."""
    head = payload if isinstance(payload, bytes) else payload[0]
    return head[0] != _PLAIN and bool(head[0] & _LIVE)


def _load(payload: Payload, namespace: Optional[dict[str, Any]], names: Optional[dict[str, Any]]) -> Any:
    pieces = [memoryview(p) for p in ([payload] if isinstance(payload, bytes) else payload)]
    head = pieces[0]
    if head[0] == _PLAIN and len(pieces) == 1:
        return _loads(head)
    flags, minor = _HEAD.unpack_from(head)
    if flags == _PLAIN or flags & ~_FLAGS:
        raise UnpackError("can not unpickle: this is not a payload")
    if flags & _CONTEXT and minor != sys.version_info[1]:
        raise UnpackError(f"can not unpickle a function or class of Python 3.{minor} with "
                          f"Python 3.{sys.version_info[1]}: use the same version for client and engines")
    stream: list[memoryview] = [head[_HEAD.size :]]
    buffers: list[Buffer] = []
    if flags & _PIECES:
        stream, buffers = _split(pieces)
    if not flags & _CONTEXT:
        return _read(stream, buffers)
    if namespace is not None:
        namespace.setdefault("__builtins__", builtins)
    lent = merged({}) if flags & (_NAMES | _SENDERS) == _NAMES and namespace is not None else None
    before = _shared.context.load
    _shared.context.load = _Load(_PACKAGE, namespace, {} if names is None else names, lent, bool(flags & _SENDERS))
    try:
        with lend(namespace, lent):
            return _read(stream, buffers)
    finally:
        _shared.context.load = before


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
    bare = functools.partial(_Proxy, exc)
    for candidate in (exc, bare((type(exc), exc.args, vars(exc) or None)),  # tblib and others change how exceptions are pickled
                      bare((_shared.exception, (type(exc), exc.args, vars(exc)))),
                      bare((_shared.exception, (type(exc), (text,), {})))):
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
