"""What goes with functions: decorators, dependencies, names that are looked up on the engine, imports.

    Reference, PrePickled          values that become something else when they arrive
    depend, require, dependent     a check that the engine makes before the call; where it fails another engine is tried
    Dependency                     other tasks that must have ended first
    remote, parallel, interactive  decorators
    publish_data, current_task     for tasks that want to be heard before they end, or to know which attempt they are

Engines import this file when something of it arrives, so it imports next to nothing.
"""

from __future__ import annotations

import builtins
import functools
import pickle
import sys
import types
from typing import Any, Callable, Iterable, Iterator, Optional, Set

from . import pack
from .errors import UnmetDependency
from .wire import task_key


class Reference:
    """Stands for the value that a name or expression has on the engine when the call runs.

    It may be an argument, be inside of one, or be the function itself.

    Args:
        name: a name, or any expression.

    Example:
        >>> view = rc[:2]
        >>> _ = view.push({"a": 5}, block=True)
        >>> view.apply_sync(lambda x, more: (x, more), ipp.Reference("a"), [ipp.Reference("a + 1")])
        [(5, [6]), (5, [6])]
    """

    def __init__(self, name: str):
        if not isinstance(name, str):
            raise TypeError(f"a Reference is to a name or expression, as text, not {type(name).__name__}")
        compile(name, "<reference>", "eval")
        self.name = self.__name__ = name

    def __reduce__(self) -> Any:
        return pack.on_arrival("evaluate", self.name)

    def __repr__(self) -> str:
        return f"Reference({self.name!r})"

    def __eq__(self, other: Any) -> bool:
        return isinstance(other, Reference) and other.name == self.name

    def __hash__(self) -> int:
        return hash(self.name)


class PrePickled:
    """An object that is pickled once, however often it is sent; it arrives as the object itself.

    Args:
        obj: must not be changed while this exists.

    Example:
        >>> table = ipp.PrePickled(list(range(100)))
        >>> [rc[i].apply_sync(sum, table) for i in rc.ids[:2]]
        [4950, 4950]
    """

    def __init__(self, obj: Any):
        payload = pack.pack(obj)
        self._pieces = [payload] if isinstance(payload, bytes) else payload

    def __reduce__(self) -> Any:
        return pack.on_arrival("packed", [pickle.PickleBuffer(piece) for piece in self._pieces])


# ---------------------------------------------------------------- dependencies


class Dependency(Set[str]):
    """Tasks that must have ended before another may run: a set of their ids and what is asked of them.

    Args:
        ids: an AsyncResult, a message id, another Dependency, or any collection of these.
        all: whether all of them count, or one is enough.
        success, failure: whether a task that succeeded, or failed, counts.

    Raises:
        TypeError, ValueError: something in `ids` is no task.

    Example:
        >>> view = rc.load_balanced_view()
        >>> good, bad = view.apply_async(abs, -1), view.apply_async(lambda: 1 / 0)
        >>> with view.temp_flags(after=ipp.Dependency([good, bad], all=False, failure=True)):
        ...     view.apply_sync(abs, -2)
        2
    """

    __hash__ = None

    def __init__(self, ids: Any = (), all: bool = True, success: bool = True, failure: bool = False):
        if not (success or failure):
            raise ValueError("a Dependency must be on success, failure or both")
        super().__init__(_ids_in(ids))
        self.all, self.success, self.failure = bool(all), bool(success), bool(failure)

    @classmethod
    def of(cls, given: Any) -> "Dependency":
        """What a user gave as `after` or `follow`: a Dependency, what `as_dict` returned, or tasks."""
        if isinstance(given, Dependency):
            return given
        if isinstance(given, dict):
            unknown = set(given) - {"dependencies", "all", "success", "failure"}
            if unknown or "dependencies" not in given:
                raise ValueError("a dependency as a dict has the keys dependencies, all, success and failure")
            return cls(given["dependencies"], **{k: v for k, v in given.items() if k != "dependencies"})
        return cls(given)

    def check(self, completed: Iterable[str], failed: Iterable[str] = ()) -> bool:
        """Whether it is met, given the ids of the tasks that have succeeded and of those that have failed."""
        return not self or self._count(self._counting(completed, failed))

    def unreachable(self, completed: Iterable[str], failed: Iterable[str] = ()) -> bool:
        """Whether it can not be met any more."""
        wrong = (set() if self.success else set(completed)) | (set() if self.failure else set(failed))
        return bool(self) and (not self.isdisjoint(wrong) if self.all else self <= wrong)

    def _counting(self, completed: Iterable[str], failed: Iterable[str]) -> set[str]:
        return (set(completed) if self.success else set()) | (set(failed) if self.failure else set())

    def _count(self, good: set[str]) -> bool:
        return self <= good if self.all else not self.isdisjoint(good)

    def as_dict(self) -> dict[str, Any]:
        """The same as built-in objects, which views take as well."""
        return {"dependencies": sorted(self), "all": self.all, "success": self.success, "failure": self.failure}

    def as_spec(self) -> dict[str, Any]:
        """The same as the scheduler reads it."""
        return {"ids": sorted(self), "all": self.all, "success": self.success, "failure": self.failure}

    def __repr__(self) -> str:
        kinds = " or ".join(kind for kind in ("success", "failure") if getattr(self, kind))
        return f"<Dependency on {kinds} of {'all' if self.all else 'any'} of {sorted(self)}>"


def _ids_in(given: Any) -> Iterator[str]:
    if isinstance(given, str):
        task_key(given)
        yield given
    elif isinstance(given, bytes) or given is None:
        raise TypeError(f"a task is given by its AsyncResult or message id, not by {given!r}")
    elif hasattr(given, "msg_ids"):
        yield from given.msg_ids
    else:
        try:
            members = list(given)
        except TypeError:
            raise TypeError(f"a task is given by its AsyncResult or message id, not by {given!r}") from None
        for member in members:
            yield from _ids_in(member)


class dependent:
    """A function with a check: it runs only on an engine where `check(*args, **kwargs)` does not return False.

    Args:
        func: the function.
        check: runs on the engine before each call. If it returns False or raises `UnmetDependency`, another engine is
            tried; when none is left, the call fails with `ImpossibleDependency`.
        args, kwargs: of the check.

    Example:
        >>> import os
        >>> f = ipp.dependent(os.getpid, lambda pid: os.getpid() == pid, rc[1].apply_sync(os.getpid))
        >>> rc.load_balanced_view().apply_sync(f) == rc[1].apply_sync(os.getpid)
        True
    """

    def __init__(self, func: Callable[..., Any], check: Callable[..., Any], *args: Any, **kwargs: Any):
        self.func, self.df, self.dargs, self.dkwargs = func, check, args, kwargs
        self.__name__ = getattr(func, "__name__", type(func).__name__)
        self.__doc__ = func.__doc__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.df(*self.dargs, **self.dkwargs) is False:
            raise UnmetDependency(f"{self.__name__} may not run here, says {getattr(self.df, '__name__', 'its check')}")
        return self.func(*args, **kwargs)


class depend:
    """Decorator: the function runs only on an engine where `check(*args, **kwargs)` does not return False.

    Example:
        >>> @ipp.depend(lambda: id in (1, 2))
        ... def where():
        ...     return id
        >>> _ = [rc[i].push({"id": i}, block=True) for i in rc.ids]
        >>> rc.load_balanced_view().apply_sync(where) in (1, 2)
        True
    """

    def __init__(self, check: Callable[..., Any], *args: Any, **kwargs: Any):
        self.check, self.args, self.kwargs = check, args, kwargs

    def __call__(self, func: Callable[..., Any]) -> dependent:
        return dependent(func, self.check, *self.args, **self.kwargs)


def require(*objects: Any, **names: Any) -> Callable[[Callable[..., Any]], dependent]:
    """Decorator: before each call the engine imports modules and sets names; if it lacks a module, another is tried.

    Args:
        objects: modules, names of modules, functions or classes (which are set under their own name).
        names: values to set under other names.

    Example:
        >>> @ipp.require("math", zero=0.0)
        ... def f(x):
        ...     return math.cos(zero) + x
        >>> rc.load_balanced_view().apply_sync(f, 1)
        2.0
    """
    modules: list[str] = []
    for given in objects:
        if isinstance(given, types.ModuleType):
            modules.append(given.__name__)
        elif isinstance(given, str):
            if not all(part.isidentifier() for part in given.split(".")):
                raise ValueError(f"{given!r} is not the name of a module")
            modules.append(given)
        elif callable(given) and hasattr(given, "__name__"):
            names.setdefault(given.__name__, given)
        else:
            raise TypeError(f"require takes modules, functions and classes, not {type(given).__name__}; give values by "
                            "name=")
    return depend(_provide, modules, names)


def _provide(modules: list[str], names: dict[str, Any]) -> None:
    namespace = vars(sys.modules["__main__"])
    for module in modules:
        try:
            exec(f"import {module}", namespace)
        except ImportError as e:
            raise UnmetDependency(f"{module} can not be imported here: {e}") from None
    namespace.update(names)


# ---------------------------------------------------------------- decorators


def interactive(f: Any) -> Any:
    """Decorator: the function of a module uses the engine's namespace for its globals, as if typed at the prompt.

    Example:
        >>> f = ipp.interactive(lambda: a * 2)
        >>> _ = rc[0].push({"a": 21}, block=True)
        >>> rc[0].apply_sync(f)
        42
    """
    if not isinstance(f, types.FunctionType):
        return f
    made = types.FunctionType(f.__code__, vars(sys.modules["__main__"]), f.__name__, f.__defaults__, f.__closure__)
    made.__kwdefaults__ = f.__kwdefaults__
    functools.update_wrapper(made, f)
    del made.__dict__["__wrapped__"]
    made.__module__ = "__main__"
    return made


class RemoteFunction:
    """A function that runs on the engines of a view when it is called; made by `remote`.

    Attributes: `view`, `func` (the function itself), `block`, `flags` (further flags of the view for this function).

    Example:
        >>> @rc[:2].remote(block=True)
        ... def add(a, b):
        ...     "Their sum."
        ...     return a + b
        >>> add(1, 2), add.__doc__
        ([3, 3], 'Their sum.')
    """

    def __init__(self, view: Any, f: Callable[..., Any], block: Optional[bool] = None, **flags: Any):
        functools.update_wrapper(self, f)
        self.view, self.func, self.block, self.flags = view, f, block, flags
        view._with(**flags)  # a wrong flag is to be told here, not at the first call

    def _view(self) -> Any:
        return self.view._with(**self.flags, **({} if self.block is None else {"block": self.block}))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._view().apply(self.func, *args, **kwargs)

    def __reduce__(self) -> Any:
        return pack.on_arrival("same", self.func)  # on an engine it is the plain function, which may call itself

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {getattr(self.func, '__name__', self.func)} on {self.view!r}>"


class ParallelFunction(RemoteFunction):
    """A function that runs on parts of sequences, one part per engine or of `chunksize` items each; made by `parallel`.

    Calling it cuts the sequences, calls the function with the parts, and puts the results together again. `map`
    calls it with each item.

    Args:
        dist: how calling it cuts: "b" for contiguous parts, "r" for every n-th item.
        chunksize: items of a part, in a LoadBalancedView.
        ordered, return_exceptions: as in the view's `map`.

    Example:
        >>> @rc[:].parallel(block=True)
        ... def squares(part):
        ...     return [x * x for x in part]
        >>> squares(range(6)), rc[:].parallel(block=True)(abs).map([-1, 2])
        ([0, 1, 4, 9, 16, 25], [1, 2])
    """

    def __init__(self, view: Any, f: Callable[..., Any], dist: str = "b", block: Optional[bool] = None,
                 chunksize: Optional[int] = None, ordered: bool = True, return_exceptions: bool = False, **flags: Any):
        super().__init__(view, f, block, **flags)
        self.dist, self.chunksize, self.ordered, self.return_exceptions = dist, chunksize, ordered, return_exceptions

    def __call__(self, *sequences: Any) -> Any:
        return self._view()._apply_parts(self.func, sequences, self.dist, self.chunksize, self.return_exceptions)

    def map(self, *sequences: Any) -> Any:
        """The view's `map` with this function."""
        sized = {} if self.chunksize is None else {"chunksize": self.chunksize}
        return self._view().map(self.func, *sequences, ordered=self.ordered, return_exceptions=self.return_exceptions,
                                **sized)


def remote(view: Any, block: Optional[bool] = None, **flags: Any) -> Callable[[Callable[..., Any]], RemoteFunction]:
    """Decorator: calling the function runs it on the engines of `view`.

    Args:
        block: whether to wait for the result; by default as the view says.
        flags: further flags of the view.
    """
    return lambda f: RemoteFunction(view, f, block, **flags)


def parallel(view: Any, dist: str = "b", block: Optional[bool] = None, ordered: bool = True,
             **options: Any) -> Callable[[Callable[..., Any]], ParallelFunction]:
    """Decorator: calling the function cuts its arguments into parts for the engines; see `ParallelFunction`."""
    return lambda f: ParallelFunction(view, f, dist, block, ordered=ordered, **options)


def current_task() -> Optional[types.SimpleNamespace]:
    """The task that this engine is running; None on no engine, or between tasks.

    Returns:
        `msg_id`, `attempt`, `engine_id` and `engine_uuid`. An attempt of 1 is the first that was given to an engine. A higher one
        says that the task may have been started before, so that what it does besides returning a value may be there already.

    Example:
        >>> rc[0].apply_sync(lambda: ipp.current_task().attempt)
        1
    """
    found = pack.current_task()
    return None if found is None else types.SimpleNamespace(**found)


def publish_data(data: dict[str, Any]) -> None:
    """Send data to the client while the task that calls this runs: they are merged into the `data` of its AsyncResult.

    Raises:
        RuntimeError: no task is running here.

    Example:
        >>> def f():
        ...     ipp.publish_data({"step": 1})
        ...     ipp.publish_data({"step": 2, "error": 0.1})
        >>> ar = rc[0].apply_async(f)
        >>> ar.get(), ar.data
        (None, {'step': 2, 'error': 0.1})
    """
    if not isinstance(data, dict):
        raise TypeError(f"publish_data takes a dict, not {type(data).__name__}")
    pack.publish(data)


def use_pickle() -> None:
    """Pickle as at first, in this process; `DirectView.use_pickle` does so on engines as well, and says what it means."""
    pack.use("pickle")


def use_cloudpickle() -> None:
    """In this process, what `DirectView.use_cloudpickle` does here and on engines."""
    pack.use("cloudpickle")


def use_dill() -> None:
    """In this process, what `DirectView.use_dill` does here and on engines."""
    pack.use("dill")


# ---------------------------------------------------------------- imports


class SyncImports:
    """Context manager: the imports in the block are made on the engines as well; what a view's `sync_imports` returns.

    Args:
        run: runs a line of code on all engines and waits for it.
        local: False: not here. The names then stand for nothing here.
        quiet: do not print what is imported.
    """

    def __init__(self, run: Callable[[str], Any], local: bool = True, quiet: bool = False):
        self._run, self._local, self._quiet = run, local, quiet

    def __enter__(self) -> "SyncImports":
        self._frame = sys._getframe(1)
        self._before = builtins.__import__
        builtins.__import__ = self._import
        return self

    def __exit__(self, *exc: Any) -> None:
        builtins.__import__ = self._before
        del self._frame

    def _import(self, name: str, globals: Any = None, locals: Any = None, fromlist: Any = (), level: int = 0) -> Any:
        frame = sys._getframe(1)
        if frame is not self._frame:  # not of the block, but of a module that it imports, or of another thread
            return self._before(name, globals, locals, fromlist, level)
        if level:
            raise ImportError("the engines can not make a relative import: give the whole name of the module")
        module = self._before(name, globals, locals, fromlist, level) if self._local else _nothing(name, fromlist)
        line = import_line(frame.f_code, frame.f_lasti, name, fromlist or ())
        if not self._quiet:
            print(f"{line} on the engines")
        self._run(line)
        return module


def _nothing(name: str, fromlist: Any) -> types.ModuleType:
    module = types.ModuleType(name, "It was imported on the engines only.")
    for attribute in fromlist or name.split(".")[1:]:
        setattr(module, attribute, module)
    return module


def import_line(code: types.CodeType, at: int, name: str, fromlist: Any) -> str:
    """The import statement whose IMPORT_NAME is at offset `at`, read from the instructions that follow it: these say
    under which names the results are kept, which `__import__` is not told."""
    import dis

    kept: list[tuple[str, str]] = []
    source = ""
    for instruction in dis.get_instructions(code):
        if instruction.offset <= at:
            continue
        if instruction.opname == "IMPORT_FROM":
            source = instruction.argval
        elif instruction.opname.startswith("STORE_"):
            stored = instruction.argval  # (stored, loaded) where Python has made one instruction of two
            kept.append((source, stored[0] if isinstance(stored, tuple) else stored))
            source = ""
            if not fromlist:
                break
        elif instruction.opname == "POP_TOP" and not source:
            break
    if not fromlist:
        via, kept_as = kept[0] if kept else ("", name)
        return f"import {name}" if not via and kept_as == name.partition(".")[0] else f"import {name} as {kept_as}"
    if "*" in fromlist:
        return f"from {name} import *"
    return f"from {name} import " + ", ".join(one if one == other else f"{one} as {other}" for one, other in kept)


