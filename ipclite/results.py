"""What a call returns at once: futures over one task or many.

    AsyncResult          a `concurrent.futures.Future` for the tasks of one call; also awaitable and iterable
    AsyncMapResult       the same for `map`: its items, in order or as they arrive
    AsyncExecuteResult   the same for `execute`
    Selection            some tasks of these: what `split` and `join` give

Results stay packed until somebody asks for them, and metadata are built when somebody looks at them, so that a task
nobody inspects costs next to nothing. All methods may be called from any thread.
"""

from __future__ import annotations

import binascii
import json
import sys
import threading
import time
from concurrent.futures import ALL_COMPLETED, FIRST_COMPLETED, FIRST_EXCEPTION, CancelledError
from concurrent.futures import wait as wait_for_futures
from contextlib import contextmanager
from datetime import datetime, timezone
from typing import Any, Callable, Iterator, Mapping, Optional, Sequence

from . import pack, wire
from .display import ExecuteReply, Streamer, progress, show_outputs, table
from .futures import NotInTime, Outcome, TaskFuture, _combine


class Metadata(dict):  # type: ignore[type-arg]
    """What is known of a task; its keys are attributes, too."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"there is no metadata {name!r}; there is {', '.join(self)}") from None


_METADATA = ("msg_id", "submitted", "started", "completed", "received", "engine_id", "engine_uuid", "status", "attempt",
             "error", "stdout", "stderr", "outputs", "label", "data", "execute_input", "execute_result", "after", "follow",
             "is_broadcast", "is_coalescing")


class AsyncResult(TaskFuture):
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

    Example:
        >>> ar = rc[:].apply_async(lambda x: 2 * x, 21)
        >>> ar.get(timeout=30)
        [42, 42, 42, 42]
        >>> ar.done(), ar.successful(), ar.engine_id
        (True, True, [0, 1, 2, 3])
    """

    _output: Optional[dict[tuple[int, str], list[str]]] = None
    _speakers: Optional[dict[int, Optional[int]]] = None  # place -> engine that printed
    _streamers: Sequence[Any] = ()
    _parts: Optional[tuple[Any, ...]] = None
    _extra: Mapping[str, Any] = {}  # metadata that few tasks have

    # --- output

    def _write(self, i: int, name: str, text: str, engine_id: Optional[int] = None) -> None:
        """Task i has printed something, published ("data") or shown ("display") something."""
        with self._condition:
            if self._output is None:
                self._output, self._speakers = {}, {}
            self._output.setdefault((i, name), []).append(text)
            if self._speakers is not None:
                self._speakers[i] = engine_id
            for only, streamer in self._streamers:
                if name != "data" and (only is None or i in only):
                    streamer(name, engine_id, text)

    def _printed(self, i: int, name: str) -> str:
        pieces = self._output.get((i, name)) if self._output else None
        return "".join(pieces) if pieces else ""

    def _displayed(self, i: int) -> list[dict[str, Any]]:
        """What task i has given to `display`: MIME bundles."""
        return [json.loads(text) for text in (self._output or {}).get((i, "display"), ())]

    def _published(self, i: int) -> dict[str, Any]:
        """What task i has published."""
        data: dict[str, Any] = {}
        for text in (self._output or {}).get((i, "data"), ()):
            data.update(pack.unpack(binascii.a2b_base64(text)))
        return data

    # --- values

    def get(self, timeout: Optional[float] = None, return_exceptions: Optional[bool] = None,
            return_when: Optional[str] = None) -> Any:
        """Wait for the result and return it.

        Args:
            timeout: s to wait at most; None or negative: for ever.
            return_exceptions: put exceptions where the values of failed tasks would be, instead of raising.
            return_when: FIRST_EXCEPTION: raise as soon as one task has failed. All else waits for all of them.

        Raises:
            TimeoutError: it is not there in time. The tasks go on.
        """
        if return_when is not None:
            _check_return_when(return_when)
        if return_when == FIRST_EXCEPTION and not return_exceptions and not self.done():
            failed = [part._error() for part in self.wait(timeout, return_when)[0] if not part.cancelled()]
            if any(failed) and not self.done():
                raise _combine([e for e in failed if e], self._fname).with_traceback(None)  # type: ignore[union-attr]
            timeout = 0
        return super().get(timeout, return_exceptions)

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

    def wait(self, timeout: Optional[float] = None, return_when: Optional[str] = None) -> Any:
        """Wait until all tasks have ended.

        Args:
            timeout: s to wait at most; None or negative: for ever.
            return_when: FIRST_COMPLETED, FIRST_EXCEPTION or ALL_COMPLETED, as for `concurrent.futures.wait`.

        Returns:
            Whether they have ended; with `return_when`, two sets of AsyncResults, one per task: the tasks that have
            ended, and those that have not.
        """
        if return_when is not None:
            _check_return_when(return_when)
            self._client._connection.flush()
            patience = None if timeout is None or timeout < 0 else timeout
            return tuple(wait_for_futures(self.split(), patience, return_when))
        return super().wait(timeout)

    def wait_for_output(self, timeout: Optional[float] = None) -> bool:
        """Wait until all that the tasks print is here. That is so when they have ended; see `wait`."""
        return bool(self.wait(timeout))

    def wait_for_send(self, timeout: Optional[float] = None) -> bool:
        """Wait until arrays that were sent may be changed: large ones are not copied, but read while they are sent.

        Raises:
            TimeoutError: that was not so after `timeout` s (None or negative: any time).
        """
        deadline = None if timeout is None or timeout < 0 else time.monotonic() + timeout
        pause = threading.Event()
        self._client._connection.flush()
        while not self.sent:
            if deadline is not None and time.monotonic() >= deadline:
                raise NotInTime(f"{self!r} is still being sent")
            pause.wait(0.002)
        return True

    def wait_interactive(self, interval: float = 0.1, timeout: Optional[float] = None, widget: Optional[bool] = None,
                         return_when: str = ALL_COMPLETED) -> bool:
        """Wait and show the progress on stderr: a bar if tqdm is installed, a line otherwise.

        Args:
            interval: s between two looks.
            timeout: s to wait at most; None or negative: for ever.
            widget: whether tqdm's bar is a notebook widget; None: in notebooks.
            return_when: return already when the first task has ended, or failed; see `wait`.

        Returns:
            Whether all tasks have ended.
        """
        _check_return_when(return_when)
        deadline = None if timeout is None or timeout < 0 else time.monotonic() + timeout
        show = progress(len(self), self._fname or "tasks", sys.stderr, widget)
        enough = False
        try:
            while not enough and not self.done():
                left = interval if deadline is None else min(interval, deadline - time.monotonic())
                if left <= 0:
                    break
                if return_when == ALL_COMPLETED:
                    self.wait(left)
                else:
                    ended = self.wait(left, return_when)[0]
                    enough = bool(ended) if return_when == FIRST_COMPLETED else any(part._error() for part in ended)
                show(self.progress)
        finally:
            show(self.progress, end=True)
        return self.done()

    @contextmanager
    def stream_output(self) -> Iterator[None]:
        """Within the `with` block, print what the tasks have printed and print, with `[stdout:3] ` before each line."""
        streamer = Streamer()
        self._stream_to(streamer, None)
        try:
            yield
        finally:
            self._stream_no_more(streamer)
            streamer.end()

    def _stream_to(self, streamer: Streamer, only: Optional[set[int]]) -> None:
        with self._condition:
            for (i, name), pieces in (self._output or {}).items():
                if name != "data" and (only is None or i in only):
                    for text in ["".join(pieces)] if name in wire.PRINTED else pieces:
                        streamer(name, (self._speakers or {}).get(i), text)
            self._streamers = [*self._streamers, (only, streamer)]

    def _stream_no_more(self, streamer: Streamer) -> None:
        with self._condition:
            self._streamers = [entry for entry in self._streamers if entry[1] is not streamer]

    def display_outputs(self, groupby: str = "type", result_only: bool = False) -> None:
        """Wait, and print what the tasks have printed and show what `execute` returned.

        Args:
            groupby: "type": all of stdout, then all of stderr, then all values; "engine": engine by engine; "order":
                task by task.
            result_only: leave out what was printed.
        """
        self.wait()
        tasks = []
        for i in range(self._count):
            meta = self._metadata_of(i)
            shown = None if self._failed(i) else self._shown(i)
            bundles = [output["data"] for output in meta["outputs"]]
            tasks.append((meta["engine_id"], meta["stdout"], meta["stderr"], bundles, shown))
        show_outputs(tasks, groupby, result_only, not self._single)

    def _shown(self, i: int) -> Any:
        return None

    # --- parts

    def __len__(self) -> int:
        return self._count

    def split(self) -> tuple["AsyncResult", ...]:
        """An AsyncResult for each task; itself if there is one only."""
        if self._count == 1:
            return (self,)
        if self._parts is None:
            self._parts = tuple(Selection([(self, i)], True) for i in range(self._count))
        return self._parts

    @classmethod
    def join(cls, *async_results: "AsyncResult") -> "AsyncResult":
        """One AsyncResult for the tasks of several: the inverse of `split`.

        Raises:
            ValueError: there is none to join, or they are not one client's.
        """
        if not async_results:
            raise ValueError("join needs at least one AsyncResult")
        if len({id(ar._client) for ar in async_results}) > 1:
            raise ValueError("AsyncResults of different clients can not be joined")
        if len(async_results) == 1:
            return async_results[0]
        return Selection([place for ar in async_results for place in ar._places()], False)

    def _places(self) -> list[tuple["AsyncResult", int]]:
        return [(self, i) for i in range(self._count)]

    def _part(self, i: int) -> Any:
        self._wait_for(i)
        value = self._value(i)
        if self._failed(i):
            raise value.with_traceback(None)
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

    def _msg_id(self, i: int) -> str:
        return wire.msg_id((self._client.session, self._first + i))

    @property
    def msg_ids(self) -> list[str]:
        """The ids of the tasks."""
        return [self._msg_id(i) for i in range(self._count)]

    @property
    def owner(self) -> bool:
        """Whether this client submitted the tasks."""
        return True

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

    @staticmethod
    def timedelta(start: Any, end: Any, start_key: Callable[[Any], Any] = min,
                  end_key: Callable[[Any], Any] = max) -> float:
        """s between two datetimes, or two lists of them as in `ar.timedelta(ar.submitted, ar.received)`.

        Args:
            start_key, end_key: which of a list counts: the earliest start and the latest end.
        """
        first = start if isinstance(start, datetime) else start_key(start)
        last = end if isinstance(end, datetime) else end_key(end)
        return float((last - first).total_seconds())

    def _metadata_of(self, i: int) -> Metadata:
        outcome = self._outcomes[i]
        meta = Metadata(dict.fromkeys(_METADATA))
        meta.update(msg_id=self._msg_id(i), submitted=_when(self._submitted),
                    stdout=self._printed(i, "stdout"), stderr=self._printed(i, "stderr"), label=self._label,
                    data=self._published(i), is_broadcast=False, is_coalescing=False,
                    outputs=[{"output_type": "display_data", "data": d, "metadata": {}} for d in self._displayed(i)])
        meta.update(self._extra)
        if outcome is None:
            meta["status"] = "cancelled" if self.cancelled() else "pending"
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
        """A dict per task (a list of them unless the result is single): msg_id, submitted, started, completed, received
        (datetimes with time zone), engine_id, engine_uuid, status, attempt, error, stdout, stderr, outputs (what it gave
        to `display`), label, data (what it published), execute_input and execute_result (of `execute`), after and follow
        (dependencies, as dicts), is_broadcast, is_coalescing. Its keys are attributes, too."""
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

    def _repr_html_(self) -> str:
        rows = []
        for i in range(min(self._count, 20)):
            outcome, meta = self._outcomes[i], self._metadata_of(i)
            took = "" if outcome is None else f"{outcome[1].duration:.3g} s"
            engine = "" if meta["engine_id"] is None else meta["engine_id"]
            rows.append((engine, meta["status"], took, meta["error"] or ""))
        return table(repr(self).strip("<>"), ("engine", "status", "run time", "error"), rows, self._count)


class AsyncExecuteResult(AsyncResult):
    """What `execute` returns: an `ExecuteReply` per engine."""

    _source = ""

    def _unpacked(self, i: int, value: Any) -> ExecuteReply:
        return ExecuteReply(self._source, value, super()._metadata_of(i))

    def _metadata_of(self, i: int) -> Metadata:
        meta = super()._metadata_of(i)
        meta["execute_input"] = self._source
        if meta["status"] == "ok":
            reply = self._value(i)
            if isinstance(reply, ExecuteReply) and reply.data:
                meta["execute_result"] = {"data": reply.data, "execution_count": reply.execution_count, "metadata": {}}
        return meta

    def _shown(self, i: int) -> Any:
        return self._value(i)


class AsyncMapResult(AsyncResult):
    """What `map` returns: the values of all items, however they were cut into tasks.

    Args:
        sizes: the number of items of each task.
        ordered: whether iteration keeps the order of the items, or yields chunks as they arrive.
        return_exceptions: put exceptions where the values of failed items would be.

    Example:
        >>> ar = rc.load_balanced_view().map_async(abs, [-1, 2, -3])
        >>> list(ar), ar.get(), len(ar)
        ([1, 2, 3], [1, 2, 3], 3)
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
        errors = any(type(v) is _ItemError for v in values)
        if errors and not (return_exceptions or self._return_exceptions):
            raise self._error().with_traceback(None)  # type: ignore[union-attr]
        return [v.error if type(v) is _ItemError else v for v in values] if errors else values

    def _task_value(self, i: int) -> Any:
        values = self._items(i)
        errors = list({id(v.error): v.error for v in values if type(v) is _ItemError}.values())
        if errors and not self._return_exceptions:
            return _combine(errors, self._fname)
        return [v.error if type(v) is _ItemError else v for v in values] if errors else values

    def _task_failed(self, i: int) -> bool:
        return not self._return_exceptions and any(type(v) is _ItemError for v in self._items(i))

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
                self._client._connection.wait(lambda k=k: len(self._arrived) > k or self.cancelled(), self)
            if self.cancelled():
                raise CancelledError
            yield self._arrived[k]

    def __iter__(self) -> Iterator[Any]:
        for i in self._in_turn():
            for value in self._items(i):
                if type(value) is _ItemError:
                    if not self._return_exceptions:
                        raise value.error.with_traceback(None)
                    value = value.error
                yield value

    def _take(self, i: int) -> list[Any]:
        """The values of task i, which are kept no longer."""
        values = self._items(i)
        source, result = self._outcomes[i]
        self._outcomes[i] = (source, result._replace(payload=None))
        if self._values is not None:
            self._values[i] = []
        return values

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, (int, slice)):
            return self.get()[key]
        return super().__getitem__(key)


class Selection(AsyncResult):
    """Some tasks of other AsyncResults, each counting as one value: what `split` and `join` give.

    Args:
        places: (AsyncResult, place of the task in it) of each.
        single: whether the result is one value rather than a list.
    """

    def __init__(self, places: Sequence[tuple[AsyncResult, int]], single: bool):
        first = places[0][0]
        super().__init__(first._client, first._fname, single, first._label)
        self._chosen = list(places)
        self._submitted = min(ar._submitted for ar, _ in places)
        self._outcomes: list[Any] = [None] * len(places)
        self._count = self._left = len(places)
        for k, (ar, i) in enumerate(places):
            ar._follow(i, self, k)

    def _arrive(self, k: int, outcome: Outcome) -> None:
        with self._making:  # tasks of several AsyncResults may end at once
            self._outcomes[k] = outcome
            self._left -= 1
            left = self._left
        if self._watched:
            self._announce(k, outcome)
        if not left:
            self._finish()

    def _places(self) -> list[tuple[AsyncResult, int]]:
        return self._chosen

    def _value(self, k: int) -> Any:
        ar, i = self._chosen[k]
        return ar._task_value(i)

    def _failed(self, k: int) -> bool:
        ar, i = self._chosen[k]
        return self._outcomes[k] is not None and ar._task_failed(i)

    def _has_failures(self) -> bool:
        return any(self._failed(k) for k in range(self._count))

    def _final(self, return_exceptions: bool) -> Any:
        values = super()._final(return_exceptions)
        if not self._single and all(isinstance(ar, AsyncMapResult) for ar, _ in self._chosen):
            return [v for part in values for v in (part if isinstance(part, list) else [part])]
        return values

    def _metadata_of(self, k: int) -> Metadata:
        ar, i = self._chosen[k]
        return ar._metadata_of(i)

    def _shown(self, k: int) -> Any:
        ar, i = self._chosen[k]
        return ar._shown(i)

    def _msg_id(self, k: int) -> str:
        ar, i = self._chosen[k]
        return ar._msg_id(i)

    @property
    def sent(self) -> bool:
        """Whether the tasks have left the client; see `AsyncResult.sent`."""
        return all(ar.sent for ar in {id(ar): ar for ar, _ in self._chosen}.values())

    def _stream_to(self, streamer: Streamer, only: Optional[set[int]]) -> None:
        for ar, i in self._chosen:
            ar._stream_to(streamer, {i})

    def _stream_no_more(self, streamer: Streamer) -> None:
        for ar, _ in self._chosen:
            ar._stream_no_more(streamer)


class _ItemError:
    """Marks a failed item among the values of a map; an exception object may be a value."""

    __slots__ = ("error",)

    def __init__(self, error: BaseException):
        self.error = error


def _check_return_when(given: str) -> None:
    if given not in (FIRST_COMPLETED, FIRST_EXCEPTION, ALL_COMPLETED):
        raise ValueError(f"return_when must be {FIRST_COMPLETED}, {FIRST_EXCEPTION} or {ALL_COMPLETED}, not {given!r}")


def _when(seconds: float) -> datetime:
    return datetime.fromtimestamp(seconds, timezone.utc)
