"""Functions and classes by value: what the pickler takes apart, and the module that puts it together again.

    Reducers, in a pickler of pack.py ──► references to `shared`, arguments ──► shared.function, fill, new_class, ...

`shared` is a module under a name of its own, ALIAS, so that a payload never holds this package's: every copy of the package
finds it or makes it. pack.py says what holds for functions and classes of `__main__`.

Rule that holds here: what is in `shared` stays as it is; a change of its functions needs another ALIAS.
"""

from __future__ import annotations

import builtins
import copyreg
import functools
import importlib
import pickle
import sys
import threading
import types
import weakref
from typing import Any, Callable, Iterable, Iterator, Optional

PROTOCOL = 5  # the pickle protocol with out-of-band buffers
ALIAS = "_ipclite_pack_1"  # to be counted up when the functions in `_shared_module` change

CONTEXT, NAMES = 1, 2  # flags of a payload: it needs a context, it has captured names ...
LIVE, SENDERS = 8, 16  # ... it must be unpacked anew each time, the sender's names win over the namespace's
MISSING = object()
BUILTINS = vars(builtins)
PACKAGE = __package__ or ""


class Load:
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
        super().__init__(BUILTINS)
        self._namespace = namespace

    def __missing__(self, name: str) -> Any:
        return self._namespace[name]


class _Context(threading.local):
    load: Optional[Load] = None
    raised: Optional[BaseException] = None  # by an expression that was evaluated while unpacking


def _shared_module() -> types.ModuleType:
    """The module that payloads refer to: all that is needed to rebuild what this package's pickler took apart."""
    context = _Context()
    received: weakref.WeakSet[type] = weakref.WeakSet()  # classes that another process owns

    def current() -> Load:
        return context.load or Load(PACKAGE, None, {}, None)

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

    module = types.ModuleType(ALIAS)
    for f in (own, function, same, fill, cell, memoized, refill, new_class, set_class, view, exception, evaluate, packed,
              known_class):
        f.__module__, f.__qualname__ = ALIAS, f.__name__
        setattr(module, f.__name__, f)
    module.context, module.received = context, received  # type: ignore[attr-defined]
    module.current_task = lambda: None  # type: ignore[attr-defined]  # an engine puts there what tells of the running task
    module.publish = None  # type: ignore[attr-defined]  # an engine puts there what sends published data
    return module


shared: Any = sys.modules.setdefault(ALIAS, _shared_module())


class Proxy:
    """Stands for a function or cell whose content is to be pickled later, when it has been made."""

    __slots__ = ("reduced", "original")

    def __init__(self, original: Any, reduced: tuple[Any, ...]):
        self.original, self.reduced = original, reduced

    def __reduce__(self) -> tuple[Any, ...]:
        return self.reduced


class Reducers:
    """What differs from cloudpickle's pickler: functions and classes of `__main__` and things of this package.

    Args:
        sink: the file to write to, and `take` for the buffers.
    """

    senders_win = False  # do functions prefer the values that their names had here to those in the engine's namespace?

    cloud: Any
    dispatch_table: Any
    _table: dict[type, Any] = {}
    _registered: dict[Any, Any] = {}  # the `copyreg.dispatch_table` that is in `_table`

    def __init__(self, sink: Any):
        kind = type(self)
        if not kind._table or kind._registered != copyreg.dispatch_table:
            kind._registered = dict(copyreg.dispatch_table)
            kind._table = {**kind._registered, **self.cloud.Pickler._dispatch_table, memoryview: _reduce_view}
        self.dispatch_table = kind._table  # a plain dict: cloudpickle's ChainMap costs 1 us per object
        pickle.Pickler.__init__(self, sink, PROTOCOL, buffer_callback=sink.take)  # type: ignore[arg-type]
        self.globals_ref: dict[int, Any] = {}
        self.proto = PROTOCOL
        self.flags = 0
        self._proxies: dict[int, Proxy] = {}

    def reducer_override(self, obj: Any) -> Any:
        """What the pickler asks first about each object (the `pickle` module documents it)."""
        kind = type(obj)
        if kind is types.FunctionType:
            return self._reduce_function(obj)
        if issubclass(kind, type):
            return self._reduce_class(obj)
        if kind is types.ModuleType and own_module(obj.__name__) is not None:
            self.flags |= CONTEXT
            return shared.own, (own_module(obj.__name__), "")
        if kind is functools._lru_cache_wrapper:
            return self._reduce_memoized(obj)
        return NotImplemented

    def _own_name(self, obj: Any) -> Optional[tuple[str, str]]:
        """(module, name) of something that this package defines, if it can be found by them."""
        module = own_module(getattr(obj, "__module__", None))
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
            self.flags |= CONTEXT
            return shared.own, own
        if f.__module__ == ALIAS:
            self.flags |= CONTEXT | LIVE if f is shared.evaluate else CONTEXT
        if self.cloud._should_pickle_by_reference(f):
            return NotImplemented
        self.flags |= CONTEXT
        if not _is_ours(f):
            return self._dynamic_function_reduce(f)  # type: ignore[attr-defined]
        return shared.same, (self._proxy(f),), self._function_state(f), None, None, shared.fill

    def _proxy(self, obj: Any) -> Proxy:
        proxy = self._proxies.get(id(obj))
        if proxy is None:
            reduced: tuple[Any, ...] = shared.cell, ()
            if isinstance(obj, types.FunctionType):
                cells = tuple([self._proxy(c) for c in obj.__closure__]) if obj.__closure__ else None
                reduced = shared.function, (obj.__code__, cells, own_module(obj.__globals__.get("__name__")))
            proxy = self._proxies[id(obj)] = Proxy(obj, reduced)
        return proxy

    def _function_state(self, f: types.FunctionType) -> tuple[Any, ...]:
        members: dict[str, Any] = {"__qualname__": f.__qualname__, "__module__": f.__module__}
        for name in ("__name__", "__doc__", "__defaults__", "__kwdefaults__", "__annotations__"):
            value = getattr(f, name)
            if value and not (name == "__name__" and value == f.__code__.co_name):
                members[name] = value
        own = own_module(f.__module__)
        if own is not None:
            del members["__module__"]  # the globals say it, by the name that the package has there
        contents = {}
        for at, cell in enumerate(f.__closure__ or ()):
            try:
                contents[at] = cell.cell_contents
            except ValueError:  # still empty
                pass
        names = captured(f) if own_module(f.__globals__.get("__name__")) is None else {}
        if names:
            self.flags |= NAMES | SENDERS if Reducers.senders_win else NAMES
        submodules = _submodules(f.__code__, [*names.values(), *contents.values()])
        return members, f.__dict__, contents, names, submodules

    def _reduce_class(self, cls: type) -> Any:
        own = self._own_name(cls)
        if own is not None:
            self.flags |= CONTEXT
            return shared.own, own
        reduced = self.cloud._class_reduce(cls)
        if reduced is NotImplemented or len(reduced) < 6:
            return reduced
        self.flags |= CONTEXT
        make, args, members, _, _, setter = reduced
        state = members, setter, cls not in shared.received
        return shared.new_class, (make, args, shared.known_class), state, None, None, shared.set_class

    def _reduce_memoized(self, wrapper: Any) -> Any:
        f = wrapper.__wrapped__
        if type(f) is not types.FunctionType or not _is_ours(f) or self._own_name(wrapper):
            return NotImplemented
        settings = wrapper.cache_parameters()
        args = self._proxy(f), settings["maxsize"], settings["typed"]
        self.flags |= CONTEXT
        return shared.memoized, args, (f, wrapper.__dict__), None, None, shared.refill


def _reduce_view(view: memoryview) -> tuple[Any, ...]:
    flat = view.cast("B") if view.c_contiguous and view.nbytes else memoryview(view.tobytes())
    if len(view.format) == 1:
        return shared.view, (pickle.PickleBuffer(flat), view.format, view.shape)
    return shared.view, (pickle.PickleBuffer(flat), "B", flat.shape)  # records and the like: as plain bytes


def own_module(name: Any) -> Optional[str]:
    """The name of one of this package's modules within the package, "" for the package; None: not of this package."""
    if type(name) is not str or not name.startswith(PACKAGE):
        return None
    rest = name[len(PACKAGE) :]
    return rest[1:] if not rest or rest[0] == "." else None


def _is_ours(f: types.FunctionType) -> bool:
    """Whether a function by value is rebuilt in a namespace: the engine's, or a module of this package."""
    home = f.__globals__.get("__name__")
    return home == "__main__" or own_module(home) is not None


_names_of_code: weakref.WeakKeyDictionary[types.CodeType, tuple[str, ...]] = weakref.WeakKeyDictionary()
# Class bodies read globals by the last two.
_READS = frozenset(("LOAD_GLOBAL", "DELETE_GLOBAL", "LOAD_NAME", "LOAD_FROM_DICT_OR_GLOBALS"))


def _nested(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for const in code.co_consts:
        if isinstance(const, types.CodeType):
            yield from _nested(const)


def global_names(code: types.CodeType) -> tuple[str, ...]:
    """The names that a function reads from its globals, itself or in functions within it."""
    names = _names_of_code.get(code)
    if names is None:
        import dis

        found = [i.argval for c in _nested(code) for i in dis.get_instructions(c) if i.opname in _READS]
        names = tuple(n for n in dict.fromkeys(found) if n not in ("__name__", "__builtins__"))
        _names_of_code[code] = names
    return names


def lent_to(f: types.FunctionType) -> dict[str, Any]:
    """The captured names that a function which was sent here sees besides its globals; often none."""
    spare = getattr(f, "__builtins__", None) or f.__globals__.get("__builtins__")  # before 3.10 only the latter
    return spare if isinstance(spare, dict) and spare is not BUILTINS else {}


def captured(f: types.FunctionType) -> dict[str, Any]:
    """What the names that a function reads stand for, built-ins excepted."""
    scope, lent = f.__globals__, lent_to(f)
    captured = {}
    for name in global_names(f.__code__):
        value = scope.get(name, MISSING)
        if value is MISSING:
            value = lent.get(name, MISSING)
            if value is MISSING or value is BUILTINS.get(name, MISSING):
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
