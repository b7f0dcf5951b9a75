"""The engines as a standard `concurrent.futures.Executor` (PEP 3148).

    submit ──► view.apply_async ──► AsyncResult, which is a Future
    map    ──► view.map_async   ──► a generator in order, that takes the rest back when it is not read to the end

An executor owns nothing: shutting it down ends no engine. It knows its futures by their `_executor`, so that a
submission costs what `apply_async` costs.
"""

from __future__ import annotations

import time
from concurrent.futures import Executor
from typing import Any, Callable, Iterable, Iterator, Optional

from .results import AsyncMapResult, AsyncResult, _ItemError


class ViewExecutor(Executor):
    """Runs calls on the engines of a view.

    Where a Future of the standard library is told what happens in its process, an AsyncResult is told what has ended:
    `running()` says that the call has left this process, and `cancel()` always gives the result up, also of a call
    that an engine has begun (which goes on, unless it is `cancel(interrupt=True)`).

    Args:
        view: a LoadBalancedView (each call to the engine with the least to do), or a DirectView (each call to each of
            its engines; `map` deals the items out).

    Example:
        >>> with rc.executor() as executor:
        ...     executor.submit(pow, 2, 10).result()
        ...     list(executor.map(pow, range(4), range(4)))
        1024
        [1, 1, 4, 27]
    """

    def __init__(self, view: Any):
        self.view = view
        self._down = False

    def __repr__(self) -> str:
        return f"<ViewExecutor of {self.view!r}{': shut down' if self._down else ''}>"

    @property
    def _max_workers(self) -> int:
        return len(self.view)

    def _check_open(self) -> None:
        if self._down:
            raise RuntimeError("cannot schedule new futures after shutdown: make a new executor")

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> AsyncResult:
        """Call fn(*args, **kwargs) on an engine; returns its future.

        Raises:
            RuntimeError: the executor was shut down.
        """
        self._check_open()
        ar: AsyncResult = self.view._apply(fn, args, kwargs, False)
        ar._executor = self
        return ar

    def map(self, fn: Callable[..., Any], *iterables: Iterable[Any], timeout: Optional[float] = None,
            chunksize: int = 1, **options: Any) -> Iterator[Any]:
        """Like the built-in `map`, over the engines: all items are taken and sent at once, the values yielded in order.

        Args:
            timeout: s from now on after which waiting for a value raises TimeoutError.
            chunksize: items per task; a DirectView sends one task to each engine.
            options: those of `View.imap` (`ordered`, `max_outstanding`, `return_exceptions`): then items are taken as
                values are read, so that the iterables may be endless.

        Raises (from the iteration):
            TimeoutError, or what a call raised; the calls that have not started are taken back then.
        """
        self._check_open()
        if type(chunksize) is not int or chunksize < 1:
            raise ValueError(f"chunksize must be a whole number from 1 up, not {chunksize!r}")
        if options:
            if timeout is not None or chunksize != 1:
                raise TypeError(f"map takes timeout and chunksize, or else {', '.join(options)}")
            return iter(self.view.imap(fn, *iterables, **options))
        deadline = None if timeout is None else time.monotonic() + timeout
        sizes = {"chunksize": chunksize} if self.view._chunks else {}
        ar: AsyncMapResult = self.view._map(fn, iterables, **sizes)
        ar._executor = self
        return _values(ar, deadline)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Take no more calls. The engines live on.

        Args:
            wait: until those that were submitted have ended.
            cancel_futures: cancel those that have not started.
        """
        self._down = True
        pending = {id(ar): ar for ar, _ in self.view.client._connection.unfinished.values() if ar._executor is self}
        if cancel_futures:
            for ar in pending.values():
                ar._withdrawn = True
            self.view.client.abort(list(pending.values()), block=False)
        if wait:
            self.view.client.wait(list(pending.values()))


def _values(ar: AsyncMapResult, deadline: Optional[float]) -> Iterator[Any]:
    """The values of a map in order; nothing keeps those that were yielded."""
    try:
        for i in range(ar._count):
            ar._wait_for(i, None if deadline is None else max(0.0, deadline - time.monotonic()))
            values = ar._take(i)[::-1]
            while values:
                if type(values[-1]) is _ItemError:
                    raise values[-1].error.with_traceback(None)
                yield values.pop()
    finally:
        ar.cancel()
