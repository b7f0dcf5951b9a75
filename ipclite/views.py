"""Ways to address engines: `DirectView` (each of them) and `LoadBalancedView` (whichever is free).

A view turns a call into tasks: it packs the function once and the arguments, writes the spec that says what is to be done
under which conditions, and hands both to its client. It holds flags, no state: views are cheap, and may be shared by threads.
"""

from __future__ import annotations

import json
import sys
from collections import deque
from contextlib import contextmanager
from typing import Any, Callable, Iterable, Iterator, Optional, Sequence, Union

from . import pack
from .errors import NoEnginesRegistered
from .results import AsyncExecuteResult, AsyncMapResult, AsyncResult

CHUNKS_PER_ENGINE = 32  # of an automatically chunked map: the last one to end costs about 1/32 of the whole
IMAP_PER_ENGINE = 16  # items of an imap under way per engine


class View:
    """What DirectView and LoadBalancedView share.

    Attributes:
        client: the Client.
        targets: the engines addressed.
        block: whether `apply`, `map` and the like wait for the result.
        label: a mark for the tasks, kept in their metadata.
        run_timeout: s that a task may run; then it is interrupted and fails with TaskTimeout, and if it does not react within
            2 s, its engine is killed and replaced. None: any time.
    """

    _flags: tuple[str, ...] = ("targets", "block", "label", "run_timeout")
    run_timeout: Optional[float] = None

    def __init__(self, client: Any, targets: Any, block: Optional[bool] = None, label: Optional[str] = None):
        self.client, self.targets, self.label = client, targets, label
        self.block: bool = client.block if block is None else block
        self._specs: dict[Any, bytes] = {}

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.targets}>"

    def __len__(self) -> int:
        return len(self._ids()[0])

    def set_flags(self, **flags: Any) -> "View":
        """Set flags; returns the view.

        Raises:
            TypeError: there is no such flag.
        """
        for name, value in flags.items():
            if name not in self._flags:
                raise TypeError(f"{type(self).__name__} has no flag {name!r}; its flags are {', '.join(self._flags)}")
            setattr(self, name, value)
        return self

    @contextmanager
    def temp_flags(self, **flags: Any) -> Iterator["View"]:
        """Set flags within a `with` block."""
        before = {name: getattr(self, name, None) for name in flags}
        self.set_flags(**flags)
        try:
            yield self
        finally:
            self.set_flags(**before)

    def _ids(self, targets: Any = None) -> tuple[list[int], bool]:
        """The engines a call goes to, and whether it is a single one's."""
        return self.client._targets(self.targets if targets is None else targets)  # type: ignore[no-any-return]

    def _spec(self, op: str, fn: Optional[str], targets: Optional[Sequence[int]], **more: Any) -> bytes:
        if self.run_timeout is not None:
            more["run_timeout"] = self.run_timeout
        key = (op, fn, None if targets is None else tuple(targets), *more.items())
        spec = self._specs.get(key)
        if spec is None:
            if len(self._specs) > 1000:
                self._specs.clear()
            body = {"op": op, "fn": fn, "targets": targets, "path": self.client._path, **more}
            spec = self._specs[key] = json.dumps(body, separators=(",", ":")).encode()
        return spec

    def _answer(self, ar: AsyncResult, block: Optional[bool]) -> Any:
        if self.block if block is None else block:
            try:
                return ar.get()
            except KeyboardInterrupt:
                ar.abort()
                raise
        return ar

    def _waits(self, block: Optional[bool]) -> bool:
        return self.block if block is None else block

    # --- calls

    def _apply(self, f: Callable[..., Any], args: Any, kwargs: Any, block: bool) -> AsyncResult:
        raise NotImplementedError

    def _map(self, f: Callable[..., Any], sequences: Sequence[Any], **options: Any) -> AsyncMapResult:
        raise NotImplementedError

    def apply(self, f: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call f(*args, **kwargs) on the engines; returns the result if `block` is set, an AsyncResult otherwise."""
        return self._answer(self._apply(f, args, kwargs, self.block), None)

    def apply_async(self, f: Callable[..., Any], *args: Any, **kwargs: Any) -> AsyncResult:
        """Call f(*args, **kwargs) on the engines; returns an AsyncResult at once."""
        return self._apply(f, args, kwargs, False)

    def apply_sync(self, f: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call f(*args, **kwargs) on the engines and wait for the result."""
        return self._answer(self._apply(f, args, kwargs, True), True)

    def map(self, f: Callable[..., Any], *sequences: Any, block: Optional[bool] = None, **options: Any) -> Any:
        """Like the built-in `map`, over the engines; an AsyncMapResult, or the list of values if `block`.

        Args:
            options: `return_exceptions` puts exceptions in place of the values of failed items, and what the kind of
                view adds.
        """
        return self._answer(self._map(f, sequences, **options), block)

    def map_async(self, f: Callable[..., Any], *sequences: Any, **options: Any) -> AsyncMapResult:
        """`map` that returns an AsyncMapResult at once."""
        return self._map(f, sequences, **options)

    def map_sync(self, f: Callable[..., Any], *sequences: Any, **options: Any) -> list[Any]:
        """`map` that waits for the list of values."""
        return self._answer(self._map(f, sequences, **options), True)  # type: ignore[no-any-return]

    def imap(self, f: Callable[..., Any], *sequences: Iterable[Any], ordered: bool = True,
             max_outstanding: Union[int, str] = "auto") -> Iterator[Any]:
        """`map` that takes its items and yields their values one by one; the input may be endless.

        Args:
            ordered: yield in the order of the items, or as the values arrive.
            max_outstanding: items under way at most; "auto": 16 per engine.
        """
        window = IMAP_PER_ENGINE * max(1, len(self)) if max_outstanding == "auto" else int(max_outstanding)
        if window < 1:
            raise ValueError(f"max_outstanding must be at least 1, not {max_outstanding}")
        calls = zip(*sequences)
        under_way: deque[AsyncResult] = deque()
        while True:
            for args in _take(calls, window - len(under_way)):
                under_way.append(self._apply_one(f, args))
            if not under_way:
                return
            self.client._connection.flush()
            if not ordered:
                _bring_forward(under_way)
            yield under_way.popleft().get()

    def _apply_one(self, f: Callable[..., Any], args: Any) -> AsyncResult:
        return self._apply(f, args, {}, False)

    def wait(self, jobs: Any = None, timeout: Optional[float] = None) -> bool:
        """Wait for AsyncResults; see `Client.wait`."""
        return self.client.wait(jobs, timeout)  # type: ignore[no-any-return]

    def abort(self, jobs: Any = None) -> None:
        """Take back tasks that have not started; see `Client.abort`."""
        self.client.abort(jobs)

    def queue_status(self) -> dict[Any, Any]:
        """What the engines of this view have to do; see `Client.queue_status`."""
        return self.client.queue_status(self._ids()[0])  # type: ignore[no-any-return]


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

    def _addressed(self, targets: Any = None) -> tuple[list[int], bool]:
        ids, single = self._ids(targets)
        if not ids:
            raise NoEnginesRegistered("there are no engines yet: start some, or call wait_for_engines() first")
        return ids, single

    def _call(self, op: str, payload: Any, fn: Optional[str], targets: Any, ar: AsyncResult, wake: bool) -> AsyncResult:
        """One payload to all targets."""
        ids, ar._single = self._addressed(targets)
        return self.client._connection.submit(ar, [(self._spec(op, fn, ids), payload, len(ids))], wake)  # type: ignore[no-any-return]

    def _apply(self, f: Callable[..., Any], args: Any, kwargs: Any, block: bool) -> AsyncResult:
        ar = AsyncResult(self.client, _name(f), False, self.label)
        return self._call("apply", pack.pack((args, kwargs)), self.client._function(f), None, ar, not block)

    def _apply_one(self, f: Callable[..., Any], args: Any) -> AsyncResult:
        ids, _ = self._addressed()
        ar = AsyncResult(self.client, _name(f), True, self.label)
        engine = ids[self.client._connection.next_number % len(ids)]
        spec = self._spec("apply", self.client._function(f), [engine])
        return self.client._connection.submit(ar, [(spec, pack.pack((args, {})), 1)])  # type: ignore[no-any-return]

    def _map(self, f: Callable[..., Any], sequences: Sequence[Any], return_exceptions: bool = False) -> AsyncMapResult:
        """One chunk of items per engine."""
        ids, _ = self._addressed()
        columns, total = _columns(sequences)
        fn = self.client._function(f)
        bounds = _split(total, len(ids))
        pieces = [(engine, a, b) for engine, (a, b) in zip(ids, bounds) if b > a]
        ar = AsyncMapResult(self.client, _name(f), [b - a for _, a, b in pieces], return_exceptions=return_exceptions, label=self.label)
        return _submit_map(self.client, ar, [(self._spec("map", fn, [engine]), pack.pack(tuple(c[a:b] for c in columns)), 1)
                                             for engine, a, b in pieces])

    # --- code

    def execute(self, code: str, silent: bool = True, targets: Any = None, block: Optional[bool] = None) -> Any:
        """Run Python source on the engines, in their namespace.

        Args:
            code: the source.
            silent: False: the reply shows the value of the last expression, like an interactive prompt.

        Returns:
            An AsyncResult of an `ExecuteReply` per engine, or the replies if `block`.

        Raises:
            SyntaxError: at once, if the code does not compile here.
        """
        return self._execute(code, "<execute>", not silent, targets, block)

    def run(self, filename: str, targets: Any = None, block: Optional[bool] = None) -> Any:
        """Run a local Python file on the engines, in their namespace; see `execute`."""
        with open(filename, encoding="utf-8") as f:
            return self._execute(f.read(), filename, False, targets, block)

    def _execute(self, code: str, name: str, show: bool, targets: Any, block: Optional[bool]) -> Any:
        ar = AsyncExecuteResult(self.client, "execute", False, self.label)
        ar._source = code
        return self._answer(self._call("execute", pack.pack((code, name, show)), None, targets, ar, not self._waits(block)), block)

    # --- names

    def push(self, ns: dict[str, Any], targets: Any = None, block: Optional[bool] = None) -> Any:
        """Set names on the engines: {name: value}."""
        if not all(isinstance(name, str) and name.isidentifier() for name in ns):
            raise ValueError("push takes a dict whose keys are Python names")
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

    def clear(self, targets: Any = None, block: Optional[bool] = None) -> Any:
        """Empty the engines' namespaces; their startup code runs again."""
        ar = AsyncResult(self.client, "clear", False, self.label)
        return self._answer(self._call("clear", pack.pack(None), None, targets, ar, not self._waits(block)), block)

    def scatter(self, key: str, seq: Any, dist: str = "b", flatten: bool = False, targets: Any = None,
                block: Optional[bool] = None) -> Any:
        """Cut a sequence into one part per engine and set it there as `key`.

        Args:
            seq: anything that can be sliced (list, tuple, range, numpy array), else it is made a list.
            dist: "b" for contiguous parts, "r" for every n-th element.
            flatten: where a part has one element, set that element rather than a sequence.
        """
        ids, single = self._addressed(targets)
        (column,), total = _columns([seq])
        if dist not in ("b", "r"):
            raise ValueError(f"dist must be 'b' (block) or 'r' (round-robin), not {dist!r}")
        parts = [column[a:b] for a, b in _split(total, len(ids))] if dist == "b" else [column[i :: len(ids)] for i in range(len(ids))]
        if flatten:
            parts = [part[0] if len(part) == 1 else part for part in parts]
        ar = AsyncResult(self.client, "scatter", single, self.label)
        tasks = [(self._spec("push", None, [engine]), pack.pack({key: part}), 1) for engine, part in zip(ids, parts)]
        return self._answer(self.client._connection.submit(ar, tasks, not self._waits(block)), block)

    def gather(self, key: str, dist: str = "b", targets: Any = None, block: Optional[bool] = None) -> Any:
        """The inverse of `scatter`: the parts named `key` put together again."""
        if dist not in ("b", "r"):
            raise ValueError(f"dist must be 'b' (block) or 'r' (round-robin), not {dist!r}")
        ar = _Gathered(self.client, "gather", False, self.label)
        ar._dist = dist
        ids, _ = self._addressed(targets)
        self.client._connection.submit(ar, [(self._spec("pull", None, ids), pack.pack(key), len(ids))], not self._waits(block))
        return self._answer(ar, block)


class _Gathered(AsyncResult):
    """What `gather` returns: one sequence, put together from the engines' parts."""

    _dist = "b"

    def _final(self, return_exceptions: bool) -> Any:
        parts = super()._final(False)
        numpy = sys.modules.get("numpy")
        if numpy is not None and any(isinstance(part, numpy.ndarray) for part in parts):
            if self._dist == "b":
                return numpy.concatenate(parts)
            whole = numpy.empty((sum(len(part) for part in parts), *parts[0].shape[1:]), numpy.result_type(*parts))
            for i, part in enumerate(parts):
                whole[i :: len(parts)] = part
            return whole
        if self._dist == "b":
            return [x for part in parts for x in part]
        longest = max(len(part) for part in parts)
        return [part[i] for i in range(longest) for part in parts if i < len(part)]


class LoadBalancedView(View):
    """Gives each task to the engine with the least to do.

    Attributes (besides View's):
        retries: how often a task that raised is run again, each time on an engine that has not failed it yet.

    Example:
        >>> view = rc.load_balanced_view()
        >>> view.map_sync(lambda x: x**2, range(5))
        [0, 1, 4, 9, 16]
    """

    _flags = (*View._flags, "retries")

    def __init__(self, client: Any, targets: Any = None, block: Optional[bool] = None, label: Optional[str] = None, retries: int = 0):
        super().__init__(client, targets, block, label)
        self.retries = retries

    def __repr__(self) -> str:
        return f"<LoadBalancedView {'all' if self.targets is None else self.targets}>"

    def _task_spec(self, op: str, fn: str) -> bytes:
        return self._spec(op, fn, self.targets, retries=self.retries) if self.retries else self._spec(op, fn, self.targets)

    def _apply(self, f: Callable[..., Any], args: Any, kwargs: Any, block: bool) -> AsyncResult:
        client = self.client
        payload = pack.pack((args, kwargs))
        spec = self._task_spec("apply", client._function(f))
        return client._connection.submit(AsyncResult(client, _name(f), True, self.label), ((spec, payload, 1),), not block)  # type: ignore[no-any-return]

    def _map(self, f: Callable[..., Any], sequences: Sequence[Any], chunksize: Optional[int] = None, ordered: bool = True,
             return_exceptions: bool = False) -> AsyncMapResult:
        """Chunks of `chunksize` items; None: sized so that every engine gets about 32."""
        columns, total = _columns(sequences)
        if chunksize is None and self.run_timeout is not None:
            chunksize = 1  # the time is meant for an item
        if chunksize is None:
            chunksize = max(1, -(-total // (CHUNKS_PER_ENGINE * max(1, len(self)))))
        if type(chunksize) is not int or chunksize < 1:
            raise ValueError(f"chunksize must be a whole number from 1 up, not {chunksize!r}")
        starts = range(0, total, chunksize)
        ar = AsyncMapResult(self.client, _name(f), [min(chunksize, total - a) for a in starts], ordered, return_exceptions, self.label)
        spec = self._task_spec("map", self.client._function(f))
        return _submit_map(self.client, ar, [(spec, pack.pack(tuple(c[a : a + chunksize] for c in columns)), 1) for a in starts])


def _submit_map(client: Any, ar: AsyncMapResult, tasks: list[Any]) -> AsyncMapResult:
    client._connection.submit(ar, tasks)
    if not tasks:
        ar._finish()
    return ar


def _name(f: Any) -> str:
    return getattr(f, "__name__", None) or type(f).__name__


def _columns(sequences: Sequence[Any]) -> tuple[list[Any], int]:
    """Sequences that can be sliced, all of the length of the shortest, as `map` has it."""
    if not sequences:
        raise TypeError("map needs at least one sequence")
    columns = [s if hasattr(s, "__getitem__") and hasattr(s, "__len__") and not isinstance(s, dict) else list(s) for s in sequences]
    return columns, min(len(c) for c in columns)


def _split(total: int, parts: int) -> list[tuple[int, int]]:
    """Bounds of `parts` contiguous ranges that cover range(total), the longer ones first."""
    size, longer = divmod(total, parts)
    bounds, at = [], 0
    for i in range(parts):
        end = at + size + (i < longer)
        bounds.append((at, end))
        at = end
    return bounds


def _take(calls: Iterator[Any], n: int) -> Iterator[Any]:
    for _ in range(n):
        try:
            yield next(calls)
        except StopIteration:
            return


def _bring_forward(under_way: deque[AsyncResult]) -> None:
    """Wait until one of them has ended and put it first."""
    from concurrent.futures import FIRST_COMPLETED, wait

    if not under_way[0].done():
        done = next(iter(wait(under_way, return_when=FIRST_COMPLETED).done))
        under_way.remove(done)  # type: ignore[arg-type]
        under_way.appendleft(done)  # type: ignore[arg-type]
