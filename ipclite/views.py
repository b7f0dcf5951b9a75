"""Ways to address engines: `DirectView` and `BroadcastView` (each of them) and `LoadBalancedView` (whichever is free).

A view turns a call into tasks: it packs the function once and the arguments, writes the spec that says what is to be done
under which conditions, and hands both to its client. It holds flags, no state: views are cheap, and may be shared by threads.
"""

from __future__ import annotations

import functools
import json
import sys
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Callable, Iterable, Iterator, Optional, Sequence, TypeVar, Union

from . import functions, pack
from .errors import CompositeError, NoEnginesRegistered
from .maps import Gathered, LazyMapIterator, check_dist, columns, cut, split
from .results import AsyncExecuteResult, AsyncMapResult, AsyncResult

FOREVER_S = 1e9  # a longer time is a mistake
CHUNKS_PER_ENGINE = 32  # of an automatically chunked map: the last one to end costs about 1/32 of the whole

AnyView = TypeVar("AnyView", bound="View")


class View:
    """What DirectView and LoadBalancedView share.

    Attributes:
        client: the Client.
        targets: the engines addressed.
        block: whether `apply`, `map` and the like wait for the result.
        label: a mark for the tasks, kept in their metadata and in the database.
        track: has no effect, as what is sent is always tracked: see `AsyncResult.sent`.
        run_timeout: s that a task may run; then it is interrupted and fails with TaskTimeout, and if it does not react within
            2 s, its engine is killed and replaced. None: any time.
    """

    _flags: tuple[str, ...] = ("targets", "block", "track", "label", "run_timeout")
    track = False
    label: Optional[str] = None
    run_timeout: Union[float, timedelta, None] = None
    _chunks = False  # whether its map takes a chunksize
    _map_options: tuple[str, ...] = ("ordered", "return_exceptions", "track", "label")

    def __init__(self, client: Any, targets: Any, block: Optional[bool] = None, **flags: Any):
        self.client, self.targets = client, targets
        self.block: bool = client.block if block is None else block
        self._specs: dict[Any, bytes] = {}
        self.set_flags(**flags)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.targets}>"

    def __len__(self) -> int:
        return len(self._ids()[0])

    def __reduce__(self) -> Any:
        raise TypeError(f"{self!r} can not leave this process: a task that is to submit others needs a Client of its own")

    def set_flags(self: AnyView, **flags: Any) -> AnyView:
        """Set flags; returns the view.

        Raises:
            TypeError: there is no such flag; none is set then.
        """
        for name in flags:
            if name not in self._flags:
                raise TypeError(f"{type(self).__name__} has no flag {name!r}; its flags are {', '.join(self._flags)}")
        for name, value in flags.items():
            setattr(self, name, value)
        return self

    @contextmanager
    def temp_flags(self: AnyView, **flags: Any) -> Iterator[AnyView]:
        """Set flags within a `with` block."""
        before = {name: getattr(self, name) for name in flags if name in self._flags}
        unset = [name for name in before if name not in self.__dict__]
        self.set_flags(**flags)
        try:
            yield self
        finally:
            self.set_flags(**before)
            for name in unset:  # to say `retries=0` is not the same as to say nothing
                self.__dict__.pop(name, None)

    def _with(self: AnyView, **flags: Any) -> AnyView:
        """A view like this one but for some flags, which threads do not share."""
        view = object.__new__(type(self))
        view.__dict__.update(self.__dict__)
        return view.set_flags(**flags)

    def _ids(self, targets: Any = None) -> tuple[list[int], bool]:
        """The engines a call goes to, and whether it is a single one's."""
        return self.client._targets(self.targets if targets is None else targets)  # type: ignore[no-any-return]

    def _spec(self, op: str, fn: Optional[str], targets: Optional[Sequence[int]], **more: Any) -> bytes:
        if self.run_timeout is not None:
            more["run_timeout"] = _seconds("run_timeout", self.run_timeout, sys.float_info.min)
        if self.label is not None:
            if not isinstance(self.label, str):
                raise TypeError(f"a label is a text, not {type(self.label).__name__}")
            more["label"] = self.label
        if "after" in more or "follow" in more:  # most often different each time
            return self._encode(op, fn, targets, more)
        key = (op, fn, None if targets is None else tuple(targets), self.client._path(), *more.items())
        spec = self._specs.get(key)
        if spec is None:
            if len(self._specs) > 1000:
                self._specs.clear()
            spec = self._specs[key] = self._encode(op, fn, targets, more)
        return spec

    def _encode(self, op: str, fn: Optional[str], targets: Optional[Sequence[int]], more: dict[str, Any]) -> bytes:
        body = {"op": op, "fn": fn, "targets": targets, "path": self.client._path(), **more}
        return json.dumps(body, separators=(",", ":")).encode()

    def _answer(self, ar: AsyncResult, block: Optional[bool]) -> Any:
        if self.block if block is None else block:
            try:
                return ar.get()
            except KeyboardInterrupt:
                ar.abort()
                raise
        return ar

    def _reach(self) -> int:
        """How many engines there are for its tasks now."""
        return len(self.client._engines) if self.targets in (None, "all") else len(self._ids()[0])

    def _one_by_one(self) -> bool:
        """Whether items of a map should not share a task: what is said of tasks is meant for items."""
        return self.run_timeout is not None

    def _waits(self, block: Optional[bool]) -> bool:
        return self.block if block is None else block

    @property
    def executor(self) -> Any:
        """A standard `concurrent.futures.Executor` that runs its calls as this view does."""
        from .executor import ViewExecutor

        return ViewExecutor(self)

    def register_joblib_backend(self, name: str = "ipclite", make_default: bool = False) -> None:
        """Have joblib run on this view: `joblib.parallel_config(backend=name)`; see `register_joblib_backend`."""
        from .integrations import register_joblib_backend

        register_joblib_backend(name, make_default, self)

    def _repr_html_(self) -> str:
        return self.client._engines_table(repr(self), self._ids()[0])  # type: ignore[no-any-return]

    # --- calls

    def _apply(self, f: Callable[..., Any], args: Any, kwargs: Any, block: bool) -> AsyncResult:
        raise NotImplementedError

    def _map(self, f: Callable[..., Any], sequences: Sequence[Any], **options: Any) -> AsyncMapResult:
        raise NotImplementedError

    def apply(self, f: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """Call f(*args, **kwargs) on the engines; returns the result if `block` is set, an AsyncResult otherwise."""
        return self._answer(self._apply(f, args, kwargs, self.block), None)

    def apply_async(self, f: Callable[..., Any], /, *args: Any, **kwargs: Any) -> AsyncResult:
        """Call f(*args, **kwargs) on the engines; returns an AsyncResult at once."""
        return self._apply(f, args, kwargs, False)

    def apply_sync(self, f: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """Call f(*args, **kwargs) on the engines and wait for the result."""
        return self._answer(self._apply(f, args, kwargs, True), True)

    def map(self, f: Callable[..., Any], *sequences: Any, block: Optional[bool] = None, **options: Any) -> Any:
        """Like the built-in `map`, over the engines; an AsyncMapResult, or the list of values if `block`.

        Args:
            options: `return_exceptions` puts exceptions in place of the values of failed items, and what the kind of
                view adds.
        """
        return self._answer(self._mapped(f, sequences, options), block)

    def map_async(self, f: Callable[..., Any], *sequences: Any, **options: Any) -> AsyncMapResult:
        """`map` that returns an AsyncMapResult at once."""
        return self._mapped(f, sequences, options)

    def map_sync(self, f: Callable[..., Any], *sequences: Any, **options: Any) -> list[Any]:
        """`map` that waits for the list of values."""
        return self._answer(self._mapped(f, sequences, options), True)  # type: ignore[no-any-return]

    def _mapped(self, f: Callable[..., Any], sequences: Sequence[Any], options: dict[str, Any]) -> AsyncMapResult:
        unknown = [name for name in options if name not in self._map_options]
        if unknown:
            raise TypeError(f"map of a {type(self).__name__} has no option {unknown[0]!r}; its options are block, "
                            + ", ".join(self._map_options))
        return self._map(f, sequences, **options)

    def imap(self, f: Callable[..., Any], *sequences: Iterable[Any], ordered: bool = True,
             max_outstanding: Union[int, str, None] = "auto", return_exceptions: bool = False) -> LazyMapIterator:
        """`map` that takes its items as it goes and yields their values one by one; the input may be endless.

        Args:
            ordered: yield in the order of the items, or as the values arrive.
            max_outstanding: items under way at most; 0: no limit; "auto": 16 per engine, or more if they take very short.
            return_exceptions: yield the exceptions of items that failed, instead of raising them.
        """
        return LazyMapIterator(self._with(), f, sequences, ordered, max_outstanding, return_exceptions)

    def _chunk_spec(self, fn: str) -> bytes:
        """For a chunk of an imap."""
        raise NotImplementedError

    def _apply_parts(self, f: Callable[..., Any], sequences: Sequence[Any], dist: str, chunksize: Optional[int],
                     return_exceptions: bool) -> Any:
        """Call f with parts of sequences, and put the results together again."""
        found, total = columns(sequences)
        found = [column[:total] for column in found]
        specs = self._part_specs(self.client._function(f), total, chunksize)
        cuts = [cut(column, len(specs), dist) for column in found] if specs else []
        tasks = [(spec, pack.pack((parts, {})), 1) for spec, parts in zip(specs, zip(*cuts))]
        ar = Gathered(self.client, _name(f), False, self.label)
        ar._dist, ar._return_exceptions = dist, return_exceptions
        return self._answer(_submit_all(self.client, ar, tasks), None)

    def _part_specs(self, fn: str, total: int, chunksize: Optional[int]) -> list[bytes]:
        """One for each part of a sequence of `total` items."""
        raise NotImplementedError

    def remote(self, block: Optional[bool] = None, **flags: Any) -> Callable[[Callable[..., Any]], functions.RemoteFunction]:
        """Decorator: calling the function runs it on the engines; see `RemoteFunction`."""
        return functions.remote(self, block, **flags)

    def parallel(self, dist: str = "b", block: Optional[bool] = None, ordered: bool = True,
                 **options: Any) -> Callable[[Callable[..., Any]], functions.ParallelFunction]:
        """Decorator: calling the function runs it on parts of its arguments; see `ParallelFunction`."""
        return functions.parallel(self, dist, block, ordered, **options)

    # --- what the client does

    def wait(self, jobs: Any = None, timeout: Optional[float] = None) -> bool:
        """Wait for AsyncResults; see `Client.wait`."""
        return self.client.wait(jobs, timeout)  # type: ignore[no-any-return]

    def abort(self, jobs: Any = None, targets: Any = None, block: Optional[bool] = None, *, interrupt: bool = False) -> None:
        """Take back tasks that have not started; see `Client.abort`."""
        self.client.abort(jobs, targets, self._waits(block), interrupt=interrupt)

    def queue_status(self, targets: Any = None, verbose: bool = False) -> dict[Any, Any]:
        """What the engines of this view have to do; see `Client.queue_status`."""
        return self.client.queue_status(self._ids(targets)[0], verbose)  # type: ignore[no-any-return]

    @property
    def history(self) -> Any:
        """The ids of all tasks of this view's client; see `Client.history`."""
        return self.client.history

    @property
    def outstanding(self) -> set[str]:
        """The ids of the client's tasks that have not ended."""
        return self.client.outstanding  # type: ignore[no-any-return]

    @property
    def results(self) -> Any:
        """Values of the client's tasks whose AsyncResults are alive; see `Client.results`."""
        return self.client.results

    @property
    def metadata(self) -> Any:
        """Metadata of the client's tasks whose AsyncResults are alive; see `Client.metadata`."""
        return self.client.metadata

    def get_result(self, ids: Any = None, block: Optional[bool] = None, owner: bool = True) -> AsyncResult:
        """Results of tasks by their ids; see `Client.get_result`."""
        return self.client.get_result(ids, self._waits(block), owner)  # type: ignore[no-any-return]

    def result_status(self, msg_ids: Any, status_only: bool = True) -> dict[str, Any]:
        """Which tasks have ended; see `Client.result_status`."""
        return self.client.result_status(msg_ids, status_only)  # type: ignore[no-any-return]

    def purge_results(self, jobs: Any = (), targets: Any = ()) -> None:
        """Forget tasks that have ended, here and in the controller; see `Client.purge_results`."""
        self.client.purge_results(jobs, targets)

    def shutdown(self, targets: Any = None, restart: bool = False, hub: bool = False, block: Optional[bool] = None) -> None:
        """End the engines of this view; see `Client.shutdown`."""
        self.client.shutdown(self._ids(targets)[0], restart=restart, hub=hub, block=self._waits(block))

    def spin(self) -> None:
        """Does nothing: results come in by themselves."""


class DirectView(View):
    """Addresses each engine of `targets`: an id gives single results, a list of ids or 'all' lists of results, in order.

    'all' means the engines that are there at each call; `rc[:]` is the list of those that are there now.

    Example:
        >>> view = rc[:]
        >>> view["x"] = 3
        >>> view.apply_sync(lambda y: x + y, 4)
        [7, 7, 7, 7]
    """

    def __repr__(self) -> str:
        return f"<DirectView {self.targets if self.targets != 'all' else 'all'}>"

    _marks: dict[str, Any] = {}  # metadata of what it submits

    def _addressed(self, targets: Any = None) -> tuple[list[int], bool]:
        ids, single = self._ids(targets)
        if not ids:
            raise NoEnginesRegistered("there are no engines yet: start some, or call wait_for_engines() first")
        return ids, single

    def _call(self, op: str, payload: Any, fn: Optional[str], targets: Any, ar: AsyncResult, wake: bool) -> AsyncResult:
        """One payload to all targets."""
        ids, ar._single = self._addressed(targets)
        if self._marks:
            ar._extra = self._marks
        return self.client._connection.submit(ar, [(self._spec(op, fn, ids), payload, len(ids))], wake)  # type: ignore[no-any-return]

    def _apply(self, f: Callable[..., Any], args: Any, kwargs: Any, block: bool) -> AsyncResult:
        ar = AsyncResult(self.client, _name(f), False, self.label)
        return self._call("apply", pack.pack((args, kwargs)), self.client._function(f), None, ar, not block)

    def _chunk_spec(self, fn: str) -> bytes:
        ids, _ = self._addressed()
        return self._spec("map", fn, [ids[self.client._connection.next_number % len(ids)]])

    def _part_specs(self, fn: str, total: int, chunksize: Optional[int]) -> list[bytes]:
        ids, _ = self._addressed()
        return [self._spec("apply", fn, [engine]) for engine in ids]

    def _map(self, f: Callable[..., Any], sequences: Sequence[Any], ordered: bool = True, return_exceptions: bool = False,
             track: Optional[bool] = None, label: Optional[str] = None) -> AsyncMapResult:
        """One chunk of items per engine."""
        if label is not None:
            return self._with(label=label)._map(f, sequences, ordered, return_exceptions)
        ids, _ = self._addressed()
        found, total = columns(sequences)
        fn = self.client._function(f)
        pieces = [(engine, a, b) for engine, (a, b) in zip(ids, split(total, len(ids))) if b > a]
        ar = AsyncMapResult(self.client, _name(f), [b - a for _, a, b in pieces], ordered, return_exceptions, self.label)
        return _submit_all(self.client, ar, [(self._spec("map", fn, [engine]), pack.pack(tuple(c[a:b] for c in found)), 1)
                                             for engine, a, b in pieces])

    # --- code

    def execute(self, code: str, silent: bool = True, targets: Any = None, block: Optional[bool] = None,
                label: Optional[str] = None) -> Any:
        """Run Python source on the engines, in their namespace.

        Args:
            code: the source.
            silent: False: the reply shows the value of the last expression, like an interactive prompt.
            label: in place of the view's own.

        Returns:
            An AsyncResult of an `ExecuteReply` per engine, or the replies if `block`.

        Raises:
            SyntaxError: at once, if the code does not compile here.
        """
        view = self if label is None else self._with(label=label)
        return view._execute(code, "<execute>", not silent, targets, block)

    def run(self, filename: str, targets: Any = None, block: Optional[bool] = None, label: Optional[str] = None) -> Any:
        """Run a local Python file on the engines, in their namespace; see `execute`."""
        view = self if label is None else self._with(label=label)
        with open(filename, encoding="utf-8") as f:
            return view._execute(f.read(), filename, False, targets, block)

    def _execute(self, code: str, name: str, show: bool, targets: Any, block: Optional[bool]) -> Any:
        ar = AsyncExecuteResult(self.client, "execute", False, self.label)
        ar._source = code
        return self._answer(self._call("execute", pack.pack((code, name, show)), None, targets, ar, not self._waits(block)), block)

    # --- names

    def push(self, ns: dict[str, Any], targets: Any = None, block: Optional[bool] = None, track: Optional[bool] = None) -> Any:
        """Set names on the engines: {name: value}. Attributes and items of what is there have names, too: "a.b", "a['b']"."""
        for name in ns:
            _check_name(name)
        ar = AsyncResult(self.client, "push", False, self.label)
        return self._answer(self._call("push", pack.pack(dict(ns)), None, targets, ar, not self._waits(block)), block)

    def pull(self, names: Union[str, Sequence[str]], targets: Any = None, block: Optional[bool] = None) -> Any:
        """Get the value of a name or expression (str), or a list of values (list of them), from each engine."""
        ar = AsyncResult(self.client, "pull", False, self.label)
        wanted = names if isinstance(names, str) else list(names)
        return self._answer(self._call("pull", pack.pack(wanted), None, targets, ar, not self._waits(block)), block)

    def update(self, ns: dict[str, Any]) -> Any:
        """`push`, under dict's name."""
        return self.push(ns)

    def get(self, name: str) -> Any:
        """The value of a name, waited for."""
        return self.pull(name, block=True)

    def __getitem__(self, name: str) -> Any:
        return self.pull(name, block=True)

    def __setitem__(self, name: str, value: Any) -> None:
        self.push({name: value}, block=True)

    @property
    def importer(self) -> functions.SyncImports:
        """`sync_imports()`, for `with view.importer:`."""
        return self.sync_imports()

    def sync_imports(self, local: bool = True, quiet: bool = False) -> functions.SyncImports:
        """Context manager: the imports in the block are made here and on the engines.

        Args:
            local: False: on the engines only.
            quiet: do not print what is imported.

        Raises (within the block):
            ImportError: an engine has no such module.
        """
        def run(line: str) -> None:
            try:
                self.execute(line, block=True)
            except CompositeError as e:
                raise e.elist[0] from None

        return functions.SyncImports(run, local, quiet)

    def activate(self, suffix: str = "") -> "DirectView":
        """The view itself."""
        return self

    def use_pickle(self) -> None:
        """Pickle as at first, in this process and on the engines: a function sees the names of the engine's namespace, and
        those that it lacks as they are here."""
        self._use("pickle")

    def use_cloudpickle(self) -> None:
        """Pickle so that a function prefers the values that its names have here to those in the engine's namespace."""
        self._use("cloudpickle")

    def use_dill(self) -> None:
        """Leave to dill what can not be pickled otherwise, in this process and on the engines.

        Raises:
            PackError: dill is not installed, here or there.
        """
        self._use("dill")

    def _use(self, pickler: str) -> None:
        pack.use(pickler)
        self._with(block=True).apply(pack.use, pickler)

    def clear(self, targets: Any = None, block: Optional[bool] = None) -> Any:
        """Empty the engines' namespaces; their startup code runs again."""
        ar = AsyncResult(self.client, "clear", False, self.label)
        return self._answer(self._call("clear", pack.pack(None), None, targets, ar, not self._waits(block)), block)

    def scatter(self, key: str, seq: Any, dist: str = "b", flatten: bool = False, targets: Any = None,
                block: Optional[bool] = None, track: Optional[bool] = None) -> Any:
        """Cut a sequence into one part per engine and set it there as `key`.

        Args:
            seq: anything that can be sliced (list, tuple, range, numpy array, pandas object), else it is made a list.
            dist: "b" for contiguous parts, "r" for every n-th element.
            flatten: where a part has one element, set that element rather than a sequence.
        """
        ids, single = self._addressed(targets)
        _check_name(key)
        parts = cut(seq, len(ids), dist)
        if flatten:
            parts = [getattr(part, "iloc", part)[0] if len(part) == 1 else part for part in parts]
        ar = AsyncResult(self.client, "scatter", single, self.label)
        tasks = [(self._spec("push", None, [engine]), pack.pack({key: part}), 1) for engine, part in zip(ids, parts)]
        return self._answer(self.client._connection.submit(ar, tasks, not self._waits(block)), block)

    def gather(self, key: str, dist: str = "b", targets: Any = None, block: Optional[bool] = None) -> Any:
        """The inverse of `scatter`: the parts named `key` put together again."""
        check_dist(dist)
        ar = Gathered(self.client, "gather", False, self.label)
        ar._dist = dist
        ids, _ = self._addressed(targets)
        self.client._connection.submit(ar, [(self._spec("pull", None, ids), pack.pack(key), len(ids))], not self._waits(block))
        return self._answer(ar, block)


class BroadcastView(DirectView):
    """A DirectView for many engines: what it sends to all of them is one message, and with `is_coalescing` so is the answer.

    Attributes (besides View's):
        is_coalescing: the controller keeps the results of a call until it has all of them, and sends them together.

    Example:
        >>> view = rc.broadcast_view(is_coalescing=True)
        >>> view.apply_sync(lambda x: x + 1, 2)
        [3, 3, 3, 3]
    """

    _flags = (*View._flags, "is_coalescing")
    is_coalescing = False

    @property
    def _marks(self) -> dict[str, Any]:  # type: ignore[override]
        return {"is_broadcast": True, "is_coalescing": bool(self.is_coalescing)}

    def __repr__(self) -> str:
        return f"<BroadcastView {self.targets}>"

    def _spec(self, op: str, fn: Optional[str], targets: Optional[Sequence[int]], **more: Any) -> bytes:
        if self.is_coalescing and targets is not None and len(targets) > 1:
            more["coalesce"] = True
        return super()._spec(op, fn, targets, **more)


class LoadBalancedView(View):
    """Gives each task to the engine with the least to do.

    Attributes (besides View's):
        retries: how often a task that raised is run again, each time on an engine that has not failed it yet. To set it to 0 says more
            than the default of 0: a task that may have been started is not run again either when its engine or the controller dies, but
            fails with EngineError.
        after: tasks that must have ended before: an AsyncResult, a message id, a list of these, or a `Dependency`. When that
            can not happen any more the task fails with ImpossibleDependency, when one is not known with InvalidDependency.
        follow: the same, and the task runs on an engine where one of them (a Dependency with `all`: each of them) ran.
        timeout: s that a task may wait for these and for an engine; then it fails with DependencyTimeout or TaskTimeout. 0:
            it runs at once or not at all. None: any time.

    Example:
        >>> view = rc.load_balanced_view()
        >>> view.map_sync(lambda x: x**2, range(5))
        [0, 1, 4, 9, 16]
        >>> first = view.apply_async(os.getpid)
        >>> with view.temp_flags(follow=first):
        ...     view.apply_sync(os.getpid) == first.get()
        True
    """

    _flags = (*View._flags, "follow", "after", "timeout", "retries")
    follow: Any = None
    after: Any = None
    timeout: Union[float, timedelta, None] = None
    retries = 0
    _chunks = True
    _map_options = ("chunksize", "ordered", "return_exceptions", "label")

    def __init__(self, client: Any, targets: Any = None, block: Optional[bool] = None, **flags: Any):
        super().__init__(client, targets, block, **flags)

    @property
    def targets(self) -> Optional[list[int]]:
        """The engines that may run its tasks: ids, or None for all, whoever comes and goes."""
        return self._chosen

    @targets.setter
    def targets(self, given: Any) -> None:
        anyone = given is None or (isinstance(given, str) and given == "all")
        self._chosen = None if anyone else self.client._targets(given)[0]
        if self._chosen == []:
            raise ValueError("targets name no engine: give None for all of them, or ids of some")

    def __repr__(self) -> str:
        return f"<LoadBalancedView {'all' if self.targets is None else self.targets}>"

    def _ids(self, targets: Any = None) -> tuple[list[int], bool]:
        if targets is None and self._chosen is not None:  # those that have gone do not matter while others are there
            return [i for i in self._chosen if i in self.client._engines], False
        return super()._ids(targets)

    def _task_spec(self, op: str, fn: str) -> bytes:
        if self.after is None and self.follow is None and self.timeout is None and not self.retries and "retries" not in self.__dict__:
            return self._spec(op, fn, self._chosen)
        return self._spec(op, fn, self._chosen, **self._conditions())

    _chunk_spec = functools.partialmethod(_task_spec, "map")

    def _one_by_one(self) -> bool:
        return self.run_timeout is not None or bool(self.retries)

    def _conditions(self) -> dict[str, Any]:
        """The flags that the scheduler reads, as it reads them."""
        found: dict[str, Any] = {}
        if self.retries:
            if type(self.retries) is not int or self.retries < 0:
                raise ValueError(f"retries must be a whole number from 0 up, not {self.retries!r}")
            found["retries"] = self.retries
        elif "retries" in self.__dict__:
            found["once"] = True
        if self.timeout is not None:
            found["timeout"] = _seconds("timeout", self.timeout, 0)
        for name in ("after", "follow"):
            tasks = getattr(self, name)
            if tasks is not None:
                needs = functions.Dependency.of(tasks)
                if needs:
                    found[name] = needs.as_spec()
        return found

    def _dependencies(self) -> dict[str, Any]:
        """`after` and `follow`, as metadata show them."""
        given = {name: getattr(self, name) for name in ("after", "follow")}
        return {name: functions.Dependency.of(tasks).as_dict() for name, tasks in given.items() if tasks is not None}

    def _part_specs(self, fn: str, total: int, chunksize: Optional[int]) -> list[bytes]:
        return [self._task_spec("apply", fn)] * -(-total // _checked(chunksize or 1))

    def _apply(self, f: Callable[..., Any], args: Any, kwargs: Any, block: bool) -> AsyncResult:
        client = self.client
        payload = pack.pack((args, kwargs))
        spec = self._task_spec("apply", client._function(f))
        ar = AsyncResult(client, _name(f), True, self.label)
        if self.after is not None or self.follow is not None:
            ar._extra = self._dependencies()
        return client._connection.submit(ar, ((spec, payload, 1),), not block)  # type: ignore[no-any-return]

    def _map(self, f: Callable[..., Any], sequences: Sequence[Any], chunksize: Optional[int] = None, ordered: bool = True,
             return_exceptions: bool = False, label: Optional[str] = None) -> AsyncMapResult:
        """Chunks of `chunksize` items; None: sized so that every engine gets about 32."""
        if label is not None:
            return self._with(label=label)._map(f, sequences, chunksize, ordered, return_exceptions)
        found, total = columns(sequences)
        if chunksize is None:
            chunksize = 1 if self._one_by_one() else max(1, -(-total // (CHUNKS_PER_ENGINE * max(1, len(self)))))
        _checked(chunksize)
        starts = range(0, total, chunksize)
        ar = AsyncMapResult(self.client, _name(f), [min(chunksize, total - a) for a in starts], ordered, return_exceptions, self.label)
        ar._extra = self._dependencies()
        spec = self._task_spec("map", self.client._function(f))
        tasks = [(spec, pack.pack(tuple(c[a : min(a + chunksize, total)] for c in found)), 1) for a in starts]
        return _submit_all(self.client, ar, tasks)


AnyResult = TypeVar("AnyResult", bound=AsyncResult)


def _submit_all(client: Any, ar: AnyResult, tasks: list[Any]) -> AnyResult:
    """Submit the tasks of a call, of which there may be none."""
    client._connection.submit(ar, tasks)
    if not tasks:
        ar._finish()
    return ar


def _name(f: Any) -> str:
    return getattr(f, "__name__", None) or type(f).__name__


def _checked(chunksize: Any) -> int:
    if type(chunksize) is not int or chunksize < 1:
        raise ValueError(f"chunksize must be a whole number from 1 up, not {chunksize!r}")
    return chunksize


def _check_name(name: Any) -> None:
    if not isinstance(name, str) or not (name.isidentifier() or _is_place(name)):
        raise ValueError(f"{name!r} is not a name that can be set on an engine")


def _is_place(text: str) -> bool:
    """Whether a value can be assigned to it: `a.b`, `a["b"]`, `a.b[0][1:3]`."""
    import ast

    try:
        return isinstance(ast.parse(text.strip(), mode="eval").body, (ast.Attribute, ast.Subscript))
    except SyntaxError:
        return False


def _seconds(name: str, value: Any, least: float) -> float:
    """A flag that is a time, in s."""
    if isinstance(value, timedelta):
        value = value.total_seconds()
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number of seconds or a timedelta, not {value!r}")
    if not least <= value < FOREVER_S:
        raise ValueError(f"{name} must be a number of seconds {'from 0 up' if not least else 'above 0'}, not {value!r}")
    return value
