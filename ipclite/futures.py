"""The future behind every result: how it hears of its tasks, resolves, waits and is cancelled.

    Connection ──► _arrive ──► _finish ──► waiters, callbacks, asyncio
                      └──────► _announce ──► those who wait for one of several tasks

A `TaskFuture` is a `concurrent.futures.Future` over one task or many that costs next to nothing: the lock and the
lists that `concurrent.futures` wants are made when somebody first waits through it, and values stay packed until
somebody asks.

Rule that holds here: `_arrive` is called once per task, by whichever thread receives; no lock is held then.
"""

from __future__ import annotations

import logging
import threading
import time
from concurrent.futures import CancelledError, Future, InvalidStateError
from concurrent.futures import TimeoutError as FutureTimeout
from typing import Any, Iterator, NamedTuple, Optional, Sequence, Tuple

from . import pack, wire
from .errors import CompositeError, ControllerLost, KernelError, TaskAborted, RecordExpired

if issubclass(FutureTimeout, TimeoutError):
    NotInTime = TimeoutError
else:  # before Python 3.11

    class NotInTime(TimeoutError, FutureTimeout):  # type: ignore[no-redef]
        """A result did not come in time."""


# concurrent.futures' own words for `_state`
PENDING, FINISHED, CANCELLED = "PENDING", "FINISHED", "CANCELLED_AND_NOTIFIED"
KEPT_PACKED = 1024  # bytes of a payload that are not worth forgetting once it is unpacked


class Source(NamedTuple):
    """Where results came from; shared by those that came in one message. `received` in s since the epoch."""

    engine_id: int
    received: float


Outcome = Tuple[Source, wire.Result]


def _combine(errors: list[Any], fname: str) -> Optional[BaseException]:
    if not errors:
        return None
    # One cause, however many tasks it ends, is one error.
    if len(errors) == 1 or all(isinstance(e, (ControllerLost, RecordExpired)) for e in errors):
        return errors[0]  # type: ignore[no-any-return]
    return CompositeError(f"{len(errors)} exceptions in {fname or 'the call'}", errors)


class TaskFuture(Future):  # type: ignore[type-arg]
    """The outcome of some tasks: one value, or a list with one value per task.

    Args:
        client: who submitted.
        fname: what was called, for people to read.
        single: whether the result is one value rather than a list.
        label: the user's own mark, kept in the metadata.
    """

    # Most results never need these: they cost nothing until they do.
    _state = PENDING
    _result = None
    _exception: Optional[BaseException] = None
    _fname, _single, _label = "", True, None
    _first, _count, _left = 0, 0, 0
    _outcomes: Any = ()
    _values: Optional[dict[int, Any]] = None
    _watched = False  # somebody waits for a part of it
    _return_exceptions = False
    _withdrawn = False  # if it does not run, it counts as cancelled
    _executor: Any = None  # through which it was submitted
    _lent: Sequence[Any] = ()  # weak references to the buffers that are sent without being copied
    _followers: Optional[dict[int, list[Any]]] = None  # place -> the futures that hold it too, and where
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
        if self._watched:
            self._announce(i, outcome)
        if self._left == 0:
            self._finish()

    def _announce(self, i: int, outcome: Outcome) -> None:
        with self._condition:
            self._condition.notify_all()
        if self._followers is not None:
            with self._making:
                followers = self._followers.pop(i, ())
            for selection, k in followers:
                selection._arrive(k, outcome)

    def _follow(self, i: int, selection: "TaskFuture", k: int) -> None:
        """Have another future told, once, how task i ends; it is the k-th there."""
        self._watched = True  # before the look, so that what arrives after it is announced
        with self._making:
            outcome = self._outcomes[i]
            if outcome is None:
                if self._followers is None:
                    self._followers = {}
                self._followers.setdefault(i, []).append((selection, k))
        if outcome is not None:
            selection._arrive(k, outcome)

    def _finish(self) -> None:
        failed = any(o[1].status for o in self._outcomes) or self._has_failures()
        if not failed and self._made is None:
            with self._making:
                if self._made is None and self._state is PENDING:
                    self._state = FINISHED
                    return
        if self.cancelled():
            return
        error = self._error() if failed else None
        if self._withdrawn and failed and all(isinstance(self._value(i), TaskAborted) for i in range(self._count)
                                              if self._failed(i)):
            self._give_up()
            return
        try:
            if error is None:
                Future.set_result(self, None)
            else:
                Future.set_exception(self, error)
        except InvalidStateError:
            pass  # it was cancelled meanwhile

    def _give_up(self) -> None:
        with self._condition:
            if self._state is not PENDING:
                return
            self._state = CANCELLED
            for waiter in self._waiters:
                waiter.add_cancelled(self)
            self._condition.notify_all()
        self._invoke_callbacks()

    def _invoke_callbacks(self) -> None:
        """As in `concurrent.futures`; and no callback ends the thread that receives for all, even with SystemExit."""
        for callback in self._done_callbacks:
            try:
                callback(self)
            except BaseException:
                logging.getLogger("concurrent.futures").exception("exception calling callback for %r", self)

    def _has_failures(self) -> bool:
        """Whether tasks that ended well report failures inside."""
        return False

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

    def _error(self) -> Optional[BaseException]:
        """What `get` raises: the same each time."""
        if self._exception is None and not self._return_exceptions:
            self._exception = self._failure()
        return self._exception

    def _task_value(self, i: int) -> Any:
        """The value of task i by itself, or its exception."""
        return self._value(i)

    def _task_failed(self, i: int) -> bool:
        return self._failed(i)

    def _final(self, return_exceptions: bool) -> Any:
        """All values in the shape that the caller asked for; every task has ended."""
        if self._count == 1 and self._single:
            value = self._value(0)
            if self._failed(0) and not return_exceptions:
                raise value.with_traceback(None)  # else it would grow each time
            return value
        values = [self._value(i) for i in range(self._count)]
        if not return_exceptions:
            error = self._error()
            if error is not None:
                raise error.with_traceback(None)
        return values[0] if self._single else values

    def result(self, timeout: Optional[float] = None) -> Any:
        """Wait for the result; see `get`."""
        return self.get(timeout)

    def get(self, timeout: Optional[float] = None, return_exceptions: Optional[bool] = None) -> Any:
        """Wait for the result and return it.

        Args:
            timeout: s to wait at most; None or negative: for ever.
            return_exceptions: put exceptions where the values of failed tasks would be, instead of raising.

        Raises:
            TimeoutError: it is not there in time. The tasks go on.
        """
        if self._state is not FINISHED and not self.wait(timeout):
            raise NotInTime(f"{self!r} has no result in the time given")
        if self.cancelled():
            raise CancelledError
        return self._final(bool(return_exceptions))

    def exception(self, timeout: Optional[float] = None) -> Optional[BaseException]:
        """Wait for the end; the exception that `get` would raise, or None.

        Raises:
            TimeoutError: it did not end in time.
        """
        if not self.wait(timeout):
            raise NotInTime(f"{self!r} has no result in the time given")
        if self.cancelled():
            raise CancelledError
        return self._error()

    def _get_snapshot(self) -> tuple[bool, bool, Any, Optional[BaseException]]:
        """(done, cancelled, result, exception): what asyncio copies, from Python 3.14 on."""
        if not self.done() or self.cancelled():
            return self.done(), self.cancelled(), None, None
        error = self._error()
        return True, False, None if error else self.get(), error

    # --- waiting

    def wait(self, timeout: Optional[float] = None) -> Any:
        """Wait until all tasks have ended.

        Args:
            timeout: s to wait at most; None or negative: for ever.

        Returns:
            Whether they have.
        """
        if self._state is PENDING:
            self._client._connection.wait(self.done, self, None if timeout is None or timeout < 0 else timeout)
        return self._state is not PENDING

    def _wait_for(self, i: int, timeout: Optional[float] = None) -> None:
        if self._outcomes[i] is None:
            self._watched = True
            there = self._client._connection.wait(lambda: self._outcomes[i] or self.cancelled(), self, timeout)
            if not there:
                raise NotInTime(f"task {i} of {self!r} has no result in the time given")
            if self._outcomes[i] is None:
                raise CancelledError

    def running(self) -> bool:
        """Whether the tasks have left this client and not ended. Clients are not told when an engine begins one."""
        return self._state is PENDING and self.sent

    def set_running_or_notify_cancel(self) -> bool:
        """Whether it was not cancelled: the executors that this method is for do not run these tasks."""
        return not self.cancelled()

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
            RuntimeError: they have not ended yet.
        """
        if not self.done():
            raise RuntimeError(f"{self!r} has not ended yet")
        return not self.cancelled() and self.exception() is None

    def abort(self, interrupt: bool = False) -> None:
        """Take back the tasks that have not started; they fail with `TaskAborted`. What runs goes on, or is
        interrupted if `interrupt` says so; see `Client.abort`."""
        self._client.abort(self, block=False, interrupt=interrupt)

    def cancel(self, interrupt: bool = False) -> bool:
        """Give up on the result: tasks that have not started are taken back, those that run go on (`interrupt=True`:
        are interrupted), and `get` raises CancelledError.

        Returns:
            Whether it was given up: always, unless it was there already.
        """
        if not self.done():
            self._give_up()  # first, as the answer to the abort may come at once
            self.abort(interrupt)
            self._client._connection._wake()  # another thread may lead, and wait for this
        return self.cancelled()

    def __reduce__(self) -> Any:
        raise TypeError(f"{self!r} can not leave this process: pass its value, as get() returns it, or let the task wait for it, by the "
                        "flag after or follow of a LoadBalancedView")

    def __await__(self) -> Iterator[Any]:
        import asyncio

        self._client._connection.flush()
        return asyncio.wrap_future(self).__await__()

    @property
    def sent(self) -> bool:
        """Whether the tasks have left the client, so that arrays among their arguments may be changed."""
        left = self._client._connection.sent_up_to >= self._first + self._count
        return bool(left) and all(buffer() is None for buffer in self._lent)
