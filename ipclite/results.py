"""What a call returns at once: futures over one task or many.

    AsyncResult      a `concurrent.futures.Future` for the tasks of one call; also awaitable and iterable
    AsyncMapResult   the same for `map`: its items, in order or as they arrive
    ExecuteReply     what `execute` gives for each engine

Results stay packed until somebody asks for them, and metadata are built when somebody looks at them, so that a task
nobody inspects costs next to nothing. All methods may be called from any thread.
"""

from __future__ import annotations

import sys
import threading
import time
from concurrent.futures import CancelledError, Future
from datetime import datetime, timezone
from typing import Any, Iterator, NamedTuple, Optional, Sequence, TextIO, Tuple

from . import pack, wire
from .errors import CompositeError, ControllerLost, KernelError


class Source(NamedTuple):
    """Where results came from; shared by those that came in one message. `received` in s since the epoch."""

    engine_id: int
    received: float


Outcome = Tuple[Source, wire.Result]


class ExecuteReply:
    """The outcome of `execute` on one engine.

    Attributes: `source` (the code), `result` (`repr` of the last expression's value, or None), `metadata`.
    """

    def __init__(self, source: str, result: Optional[str], metadata: dict[str, Any]):
        self.source, self.result, self.metadata = source, result, metadata

    def __repr__(self) -> str:
        text = f": {self.result}" if self.result is not None else ""
        return f"<ExecuteReply[{self.metadata['engine_id']}]{text}>"

    @property
    def stdout(self) -> str:
        """What the code printed."""
        return str(self.metadata["stdout"])

    @property
    def stderr(self) -> str:
        """What the code wrote to sys.stderr."""
        return str(self.metadata["stderr"])


PENDING, FINISHED = "PENDING", "FINISHED"  # concurrent.futures' own words for `_state`
KEPT_PACKED = 1024  # bytes of a payload that are not worth forgetting once it is unpacked

_METADATA = ("msg_id", "submitted", "started", "completed", "received", "engine_id", "engine_uuid", "status", "attempt",
             "error", "stdout", "stderr", "label")


class AsyncResult(Future):  # type: ignore[type-arg]
    """The tasks of one call: a Future whose result is one value, or a list with one value per task.

    Args:
        client: who submitted.
        fname: what was called, for people to read.
        single: whether the result is one value rather than a list.
        label: the user's own mark, kept in the metadata.

    Raises (from `get`, `result`, iteration, indexing):
        RemoteError: a task failed; it is also an instance of the exception's own class.
        CompositeError: several tasks failed.
        EngineError, TaskAborted, ControllerLost: the task did not run to its end.
    """

    # Most results never need these: they cost nothing until they do.
    _state = PENDING
    _result = None
    _exception: Optional[BaseException] = None
    _fname, _single, _label = "", True, None
    _first, _count, _left = 0, 0, 0
    _outcomes: Any = ()
    _values: Optional[dict[int, Any]] = None
    _output: Optional[dict[tuple[int, str], list[str]]] = None
    _watched = False  # somebody waits for a part of it
    _made: Optional[threading.Condition] = None
    _making = threading.Lock()

    def __init__(self, client: Any, fname: str = "", single: bool = True, label: Optional[str] = None):
        self._client, self._fname, self._submitted = client, fname, time.time()
        if not single:
            self._single = False
        if label is not None:
            self._label = label

    @property
    def _condition(self) -> threading.Condition:
        """What `concurrent.futures` locks and waits on: made when somebody first does."""
        if self._made is None:
            with self._making:
                if self._made is None:
                    self._waiters: list[Any] = []
                    self._done_callbacks: list[Any] = []
                    self._made = threading.Condition()
        return self._made

    # --- what the client's connection tells us

    def _sent_as(self, first: int, count: int) -> None:
        """The client gave our tasks the numbers first .. first + count - 1."""
        self._first, self._count, self._left = first, count, count
        self._outcomes = [None] * count

    def _arrive(self, i: int, outcome: Outcome) -> None:
        """Task i has ended."""
        self._outcomes[i] = outcome
        self._left -= 1
        if self._left == 0:
            self._finish()
        elif self._watched:
            with self._condition:
                self._condition.notify_all()

    def _finish(self) -> None:
        failed = any([o[1].status for o in self._outcomes]) or self._has_failures()
        if not failed and self._made is None:
            with self._making:
                if self._made is None and self._state is PENDING:
                    self._state = FINISHED
                    return
        if self.cancelled():
            return
        error = self._failure() if failed else None
        if error is None:
            Future.set_result(self, None)
        else:
            Future.set_exception(self, error)

    def _has_failures(self) -> bool:
        """Whether tasks that ended well report failures inside."""
        return False

    def _write(self, i: int, name: str, text: str) -> None:
        """Task i has printed something."""
        if self._output is None:
            self._output = {}
        self._output.setdefault((i, name), []).append(text)

    def _printed(self, i: int, name: str) -> str:
        pieces = self._output.get((i, name)) if self._output else None
        return "".join(pieces) if pieces else ""

    # --- values

    def _value(self, i: int) -> Any:
        """The value of task i, which has ended; an exception object if it failed."""
        if self._values is None:
            self._values = {}
        elif i in self._values:
            return self._values[i]
        source, result = self._outcomes[i]
        payload = result.payload
        if result.status == wire.OK:
            try:
                value = self._unpacked(i, pack.unpack(payload))
            except KernelError as e:
                value = e
                self._outcomes[i] = (source, result._replace(status=wire.ERROR))
        else:
            value = pack.unpack_error(payload)
        value = self._values.setdefault(i, value)  # another thread may have been quicker: all see one object
        if type(payload) is not bytes or len(payload) > KEPT_PACKED:
            self._outcomes[i] = (source, self._outcomes[i][1]._replace(payload=None))
        return value

    def _unpacked(self, i: int, value: Any) -> Any:
        return value

    def _failed(self, i: int) -> bool:
        outcome = self._outcomes[i]
        return outcome is not None and outcome[1].status != wire.OK

    def _failure(self) -> Optional[BaseException]:
        errors = [self._value(i) for i in range(self._count) if self._failed(i)]
        return _combine(errors, self._fname)

    def _final(self, return_exceptions: bool) -> Any:
        """All values in the shape that the caller asked for; every task has ended."""
        if self._count == 1 and self._single:
            value = self._value(0)
            if self._failed(0) and not return_exceptions:
                raise value
            return value
        values = [self._value(i) for i in range(self._count)]
        if not return_exceptions:
            error = self._failure()
            if error is not None:
                raise error
        return values[0] if self._single else values

    def result(self, timeout: Optional[float] = None) -> Any:
        """Wait for the result; see `get`."""
        return self.get(timeout)

    def get(self, timeout: Optional[float] = None, return_exceptions: bool = False) -> Any:
        """Wait for the result and return it.

        Args:
            timeout: s to wait at most; None or negative: for ever.
            return_exceptions: put exceptions where the values of failed tasks would be, instead of raising.

        Raises:
            TimeoutError: it is not there in time. The tasks go on.
        """
        if self._state is not FINISHED and not self.wait(timeout):
            raise TimeoutError(f"{self!r} has no result after {timeout:g} s")
        if self.cancelled():
            raise CancelledError
        return self._final(return_exceptions)

    def exception(self, timeout: Optional[float] = None) -> Optional[BaseException]:
        """Wait for the end; the exception that `get` would raise, or None.

        Raises:
            TimeoutError: it did not end in time.
        """
        try:
            self.get(timeout)
        except CancelledError:
            raise
        except TimeoutError:
            if not self.done():
                raise
            return self._failure()
        except Exception as e:
            return e
        return None

    @property
    def r(self) -> Any:
        """The result, waited for."""
        return self.get()

    def get_dict(self, timeout: Optional[float] = None) -> dict[int, Any]:
        """The results by engine id.

        Raises:
            ValueError: an engine has more than one of them.
        """
        self.get(timeout)
        engines = [o[0].engine_id for o in self._outcomes]
        if len(set(engines)) < len(engines):
            raise ValueError("several results come from one engine, so they can not be told apart by engine; use get()")
        return {engine: self._value(i) for i, engine in enumerate(engines)}

    @property
    def result_dict(self) -> dict[int, Any]:
        """The results by engine id, waited for."""
        return self.get_dict()

    # --- waiting

    def wait(self, timeout: Optional[float] = None) -> bool:
        """Wait until all tasks have ended.

        Args:
            timeout: s to wait at most; None or negative: for ever.

        Returns:
            Whether they have.
        """
        if self._state is PENDING:
            self._client._connection.wait(self.done, self, None if timeout is None or timeout < 0 else timeout)
        return self._state is not PENDING

    def cancelled(self) -> bool:
        """Whether the result was given up."""
        return self._state not in (PENDING, FINISHED)

    def done(self) -> bool:
        """Whether all tasks have ended (or were cancelled)."""
        return self._state is not PENDING

    def ready(self) -> bool:
        """Whether all tasks have ended."""
        return self.done()

    def successful(self) -> bool:
        """Whether all tasks ended without an exception.

        Raises:
            ValueError: they have not ended yet.
        """
        if not self.done():
            raise ValueError(f"{self!r} has not ended yet")
        return not self.cancelled() and self.exception() is None

    def abort(self) -> None:
        """Take back the tasks that have not started; they fail with `TaskAborted`. What runs goes on."""
        self._client.abort(self)

    def cancel(self) -> bool:
        """Give up on the result: tasks that have not started are taken back, and `get` raises CancelledError."""
        if self.done():
            return self.cancelled()
        self.abort()
        return Future.cancel(self)

    def __await__(self) -> Iterator[Any]:
        import asyncio

        self._client._connection.flush()
        return asyncio.wrap_future(self).__await__()

    def wait_interactive(self, interval: float = 0.1, timeout: Optional[float] = None) -> bool:
        """Wait and show the progress on stderr: a bar if tqdm is installed, a line otherwise.

        Args:
            interval: s between two looks.
            timeout: s to wait at most; None or negative: for ever.

        Returns:
            Whether all tasks have ended.
        """
        deadline = None if timeout is None or timeout < 0 else time.monotonic() + timeout
        show = progress(len(self), self._fname or "tasks", sys.stderr)
        try:
            while not self.done():
                left = interval if deadline is None else min(interval, deadline - time.monotonic())
                if left <= 0:
                    break
                self.wait(left)
                show(self.progress)
        finally:
            show(self.progress, end=True)
        return self.done()

    # --- parts

    def __len__(self) -> int:
        return self._count

    def _wait_for(self, i: int) -> None:
        if self._outcomes[i] is None:
            self._watched = True
            self._client._connection.wait(lambda: self._outcomes[i] is not None or self.cancelled(), self)
            if self.cancelled():
                raise CancelledError

    def _part(self, i: int) -> Any:
        self._wait_for(i)
        value = self._value(i)
        if self._failed(i):
            raise value
        return value

    def __iter__(self) -> Iterator[Any]:
        if self._single:
            raise TypeError("this AsyncResult holds one result: use get(), or iterate over what that returns")
        return (self._part(i) for i in range(self._count))

    def __getitem__(self, key: Any) -> Any:
        """An int or slice gives results, a string metadata."""
        if isinstance(key, str):
            if key not in _METADATA:
                raise KeyError(key)
            return self._meta(key)
        if isinstance(key, int):
            return self._part(range(self._count)[key])
        if isinstance(key, slice):
            return [self._part(i) for i in range(self._count)[key]]
        raise TypeError(f"an AsyncResult is indexed by int, slice or metadata key, not {type(key).__name__}")

    # --- about the tasks

    @property
    def msg_ids(self) -> list[str]:
        """The ids of the tasks."""
        return [wire.msg_id((self._client.session, seq)) for seq in range(self._first, self._first + self._count)]

    @property
    def owner(self) -> bool:
        """Whether this client submitted the tasks."""
        return True

    @property
    def sent(self) -> bool:
        """Whether the tasks have left the client."""
        return bool(self._client._connection.sent_up_to >= self._first + self._count)

    @property
    def progress(self) -> int:
        """How many tasks have ended."""
        return self._count - self._left

    @property
    def elapsed(self) -> float:
        """s since the call, or from the call to the last result."""
        last = max((o[0].received for o in self._outcomes if o is not None), default=0.0)
        return (last if self.done() and last else time.time()) - self._submitted

    @property
    def wall_time(self) -> float:
        """s from the call to the last result.

        Raises:
            ValueError: it is not there yet.
        """
        if not self.done():
            raise ValueError(f"{self!r} has not ended yet")
        return self.elapsed

    @property
    def serial_time(self) -> float:
        """s of run time of all tasks together: what one engine would have taken."""
        return sum(o[1].duration for o in self._outcomes if o is not None)

    def _metadata_of(self, i: int) -> dict[str, Any]:
        outcome = self._outcomes[i]
        meta: dict[str, Any] = dict.fromkeys(_METADATA)
        meta.update(msg_id=wire.msg_id((self._client.session, self._first + i)), submitted=_when(self._submitted),
                    stdout=self._printed(i, "stdout"), stderr=self._printed(i, "stderr"), label=self._label)
        if outcome is None:
            meta["status"] = "pending"
            return meta
        (engine_id, received), result = outcome
        meta.update(status="error" if result.status else "ok", started=_when(result.started), attempt=result.attempt,
                    completed=_when(result.started + result.duration), received=_when(received))
        if engine_id != wire.NO_ENGINE:
            meta.update(engine_id=engine_id, engine_uuid=self._client._engine_uuid(engine_id))
        if result.status != wire.OK:
            meta["error"] = self._value(i)
        return meta

    @property
    def metadata(self) -> Any:
        """A dict per task (a list of them unless the result is single): msg_id, submitted, started, completed, received (datetimes
        with time zone), engine_id, engine_uuid, status, attempt, error, stdout, stderr, label."""
        all_ = [self._metadata_of(i) for i in range(self._count)]
        return all_[0] if self._single else all_

    def _meta(self, key: str) -> Any:
        values = [self._metadata_of(i)[key] for i in range(self._count)]
        return values[0] if self._single else values

    def __getattr__(self, name: str) -> Any:
        if name in _METADATA:
            return self._meta(name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def _state_word(self) -> str:
        if self.cancelled():
            return "cancelled"
        if not self.done():
            return f"pending {self.progress}/{len(self)}" if self._count > 1 else "pending"
        return "failed" if any(self._failed(i) for i in range(self._count)) else "finished"

    def __repr__(self) -> str:
        return f"<{type(self).__name__}({self._fname}): {self._state_word()}>"


class AsyncExecuteResult(AsyncResult):
    """What `execute` returns: an `ExecuteReply` per engine."""

    _source = ""

    def _unpacked(self, i: int, value: Any) -> ExecuteReply:
        return ExecuteReply(self._source, value, self._metadata_of(i))


class AsyncMapResult(AsyncResult):
    """What `map` returns: the values of all items, however they were cut into tasks.

    Args:
        sizes: the number of items of each task.
        ordered: whether iteration keeps the order of the items, or yields chunks as they arrive.
        return_exceptions: put exceptions where the values of failed items would be.
    """

    def __init__(self, client: Any, fname: str, sizes: Sequence[int], ordered: bool = True, return_exceptions: bool = False,
                 label: Optional[str] = None):
        super().__init__(client, fname, False, label)
        self._sizes, self._ordered, self._return_exceptions = list(sizes), ordered, return_exceptions
        self._total = sum(self._sizes)
        self._arrived: list[int] = []

    def _arrive(self, i: int, outcome: Outcome) -> None:
        self._arrived.append(i)
        super()._arrive(i, outcome)

    def _unpacked(self, i: int, value: Any) -> list[Any]:
        values, failures = value
        for position, packed in failures.items():
            values[position] = _ItemError(pack.unpack_error(packed))
        return values  # type: ignore[no-any-return]

    def _items(self, i: int) -> list[Any]:
        """The values of task i; a failed one's items are all `_ItemError`s."""
        value = self._value(i)
        return [_ItemError(value)] * self._sizes[i] if self._failed(i) else value

    def _failure(self) -> Optional[BaseException]:
        errors: list[BaseException] = []
        for i in range(self._count):
            if self._failed(i):
                errors.append(self._value(i))
            else:
                errors += [v.error for v in self._value(i) if type(v) is _ItemError]
        return _combine(errors, self._fname)

    def _final(self, return_exceptions: bool) -> Any:
        values: list[Any] = []
        for i in range(self._count):
            values += self._items(i)
        errors = [v.error for v in values if type(v) is _ItemError]
        if errors and not (return_exceptions or self._return_exceptions):
            raise _combine(list({id(e): e for e in errors}.values()), self._fname) or errors[0]
        return [v.error if type(v) is _ItemError else v for v in values] if errors else _joined(values)

    def __len__(self) -> int:
        return self._total

    @property
    def progress(self) -> int:
        """How many items have ended."""
        return sum(size for size, outcome in zip(self._sizes, self._outcomes) if outcome is not None)

    def _in_turn(self) -> Iterator[int]:
        if self._ordered:
            for i in range(self._count):
                self._wait_for(i)
                yield i
            return
        for k in range(self._count):
            if len(self._arrived) <= k:
                self._watched = True
                self._client._connection.wait(lambda: len(self._arrived) > k or self.cancelled(), self)
            if self.cancelled():
                raise CancelledError
            yield self._arrived[k]

    def __iter__(self) -> Iterator[Any]:
        for i in self._in_turn():
            for value in self._items(i):
                if type(value) is _ItemError:
                    if not self._return_exceptions:
                        raise value.error
                    value = value.error
                yield value

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, (int, slice)):
            return self.get()[key]
        return super().__getitem__(key)


class _ItemError:
    """Marks a failed item among the values of a map; an exception object may be a value."""

    __slots__ = ("error",)

    def __init__(self, error: BaseException):
        self.error = error


def _combine(errors: list[Any], fname: str) -> Optional[BaseException]:
    if not errors:
        return None
    if len(errors) == 1 or all(isinstance(e, ControllerLost) for e in errors):  # one cause, however many tasks it ends
        return errors[0]  # type: ignore[no-any-return]
    return CompositeError(f"{len(errors)} exceptions in {fname or 'the call'}", errors)


def _joined(values: list[Any]) -> Any:
    """A map over arrays gives an array, as numpy users expect of `gather`; all else stays a list."""
    return values


def _when(seconds: float) -> datetime:
    return datetime.fromtimestamp(seconds, timezone.utc)


def progress(total: int, what: str, stream: TextIO) -> Any:
    """A function to call with the number done (and `end=True` at last) that shows it: by tqdm if installed."""
    try:
        from tqdm.auto import tqdm
    except ImportError:
        return _Line(total, what, stream)
    bar = tqdm(total=total, desc=what, file=stream)

    def show(done: int, end: bool = False) -> None:
        bar.update(done - bar.n)
        if end:
            bar.close()

    return show


class _Line:
    """A progress line: rewritten in place on a terminal, a line per tenth elsewhere."""

    def __init__(self, total: int, what: str, stream: TextIO):
        self._total, self._what, self._stream = total, what, stream
        self._started = time.monotonic()
        self._told = -1
        self._terminal = stream.isatty()

    def __call__(self, done: int, end: bool = False) -> None:
        step = done if self._terminal else done * 10 // max(self._total, 1)
        if step == self._told and not (end and self._terminal):
            return
        self._told = step
        width = 30
        full = width * done // max(self._total, 1)
        text = f"{self._what} [{'#' * full}{'.' * (width - full)}] {done}/{self._total} {time.monotonic() - self._started:.1f} s"
        self._stream.write(f"\r{text}\x1b[K" + ("\n" if end else "") if self._terminal else text + "\n")
        self._stream.flush()
