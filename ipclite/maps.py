"""Cutting sequences into parts, putting results together again, and the map that runs ahead of its reader.

    input ──► feeder thread ──► chunks under way on the engines ──► results that wait ──► reader

`LazyMapIterator` (what `imap` returns) takes items as room appears: a feeder thread of its own takes them, since
taking one may block. Small items travel in chunks: a chunk is sent as soon as it is full, or fewer chunks than engines
are under way, so that no item is kept back while an engine is idle.
"""

from __future__ import annotations

import math
import sys
import threading
import weakref
from collections import deque
from itertools import count, islice, repeat
from queue import SimpleQueue
from typing import Any, Callable, Iterable, Optional, Sequence, Union

from . import pack
from .errors import PackError
from .futures import Outcome
from .results import AsyncMapResult, AsyncResult, _ItemError

CHUNK_MAX = 64  # items of an imap that travel together at most
CHUNK_S = 0.002  # about so much work
PER_ENGINE = 16  # items of an imap under way per engine, or ...
CHUNKS_PER_ENGINE = 4  # ... so many chunks if that is more
AHEAD = 4  # times as many items may be under way or wait for the reader
UNBLOCKED = (list, tuple, range, count, repeat)  # taking an item of these takes no time, so several are taken at once


# ---------------------------------------------------------------- cutting and joining


def columns(sequences: Sequence[Any]) -> tuple[list[Any], int]:
    """Sequences that can be sliced, and the length of the shortest, at which `map` ends."""
    if not sequences:
        raise TypeError("map needs at least one sequence")
    found = [s if _is_sequence(s) and not hasattr(s, "iloc") else list(s) for s in sequences]
    return found, min(len(c) for c in found)


def split(total: int, parts: int) -> list[tuple[int, int]]:
    """Bounds of `parts` contiguous ranges that cover range(total), the longer ones first."""
    size, longer = divmod(total, parts)
    bounds, at = [], 0
    for i in range(parts):
        end = at + size + (i < longer)
        bounds.append((at, end))
        at = end
    return bounds


def cut(seq: Any, n: int, dist: str) -> list[Any]:
    """n parts of a sequence, in its own kind: "b" for contiguous ones, "r" for every n-th item."""
    check_dist(dist)
    if not _is_sequence(seq):
        seq = list(seq)
    rows = seq.iloc if hasattr(seq, "iloc") else seq  # pandas
    return [rows[a:b] for a, b in split(len(seq), n)] if dist == "b" else [rows[i::n] for i in range(n)]


def check_dist(dist: str) -> None:
    """Raise ValueError unless `dist` is a way to cut."""
    if dist not in ("b", "r"):
        raise ValueError(f"dist must be 'b' (block) or 'r' (round-robin), not {dist!r}")


def _is_sequence(value: Any) -> bool:
    return hasattr(value, "__getitem__") and hasattr(value, "__len__") and not isinstance(value, dict)


def joined(parts: list[Any], dist: str) -> Any:
    """The inverse of `cut`; a part that is no sequence counts as one item."""
    if not parts:
        return []
    numpy, pandas = sys.modules.get("numpy"), sys.modules.get("pandas")
    if pandas is not None and all(isinstance(part, (pandas.Series, pandas.DataFrame)) for part in parts):
        whole = pandas.concat([part for part in parts if len(part)] or parts[:1])
        return whole if dist == "b" else whole.iloc[_places(parts)]
    if numpy is not None and any(isinstance(part, numpy.ndarray) for part in parts):
        arrays = [numpy.atleast_1d(part) for part in parts]
        whole = numpy.concatenate(arrays)
        if isinstance(parts[0], numpy.recarray):
            whole = whole.view(numpy.recarray)
        return whole if dist == "b" else whole[_places(arrays)]
    lists = [list(p) if _is_sequence(p) and not isinstance(p, (str, bytes)) else [p] for p in parts]
    items = [item for part in lists for item in part]
    return items if dist == "b" else [items[i] for i in _places(lists)]


def _places(parts: list[Any]) -> list[int]:
    """Where, among all items of the parts one after the other, each item of the whole is that was dealt out in turn."""
    starts = [0]
    for part in parts:
        starts.append(starts[-1] + len(part))
    longest = max(map(len, parts))
    return [starts[k] + i for i in range(longest) for k, part in enumerate(parts) if i < len(part)]


class Gathered(AsyncResult):
    """One sequence, put together from the parts that tasks returned."""

    _dist = "b"
    _return_exceptions = False

    def _final(self, return_exceptions: bool) -> Any:
        parts = super()._final(return_exceptions or self._return_exceptions)
        return joined(parts, self._dist)

    def __iter__(self) -> Any:
        return iter(self.get())


# ---------------------------------------------------------------- imap


class _Chunk(AsyncMapResult):
    """Some items of an imap, in one task."""

    def __init__(self, run: "_Run", size: int):
        super().__init__(run.view.client, run.name, [size], label=run.view.label)
        self.run, self.size = run, size
        self.failed: dict[int, Exception] = {}  # items that could not be sent
        self.landed = False

    def _arrive(self, i: int, outcome: Outcome) -> None:
        super()._arrive(i, outcome)
        self.run.land(self, outcome[1].duration / self._total)

    def outcome(self) -> list[Any]:
        """The values of the items, with `_ItemError`s."""
        arrived = iter(self._items(0) if len(self.failed) < self.size else ())
        return [_ItemError(self.failed[i]) if i in self.failed else next(arrived) for i in range(self.size)]


class _Run:
    """What an imap has under way. Shared by the feeder thread, the client's threads and the readers."""

    def __init__(self, view: Any, f: Callable[..., Any], sequences: Sequence[Iterable[Any]], ordered: bool,
                 limit: float):
        self.view, self.ordered, self.limit = view, ordered, limit
        self.calls = zip(*sequences)
        self.at_once = all(isinstance(s, UNBLOCKED) for s in sequences)
        self.name: str = getattr(f, "__name__", None) or type(f).__name__
        self.function = pack.pack_function(f)
        self.connection = view.client._connection
        self.engines = 1
        self.stopped = False  # no more items are to be taken
        self.abandoned = False  # and nobody wants the results
        self._condition = threading.Condition()
        self._bell: "SimpleQueue[None]" = SimpleQueue()  # tells the feeder that there is room, or that it is to stop
        self._feeder_waits = False
        self._open: list[Any] = []  # items of the next chunk
        self._size = 1  # of a chunk
        self._ahead = 0  # items taken that have not been read
        self._out: dict[_Chunk, None] = {}  # under way
        self._out_items = 0
        self._lined_up: deque[_Chunk] = deque()  # to be read next: all in order, or those that have landed
        self._fed = False  # the input has ended
        self._trouble: Optional[BaseException] = None  # what the input raised
        threading.Thread(target=self._feed, name="imap", daemon=True).start()

    # --- items go out

    def _has_room(self) -> bool:
        window = max(self._size, self.limit or self.engines * max(PER_ENGINE, CHUNKS_PER_ENGINE * self._size))
        under_way = self._out_items + len(self._open)
        return under_way + self._size <= window and self._ahead + self._size <= AHEAD * window

    def _feed(self) -> None:
        calls = self.calls
        try:
            while self._wait_for_room():
                taken = list(islice(calls, self._size if self.at_once else 1))
                if not taken:
                    break
                with self._condition:
                    self._open += taken
                    self._ahead += len(taken)
                    chunk = self._take(self._size)
                self._send(chunk)
        except BaseException as e:  # of the user's input: for the reader
            self._trouble = e
        with self._condition:
            chunk = self._take(1)
        self._send(chunk)
        with self._condition:
            self._fed = True
            self._condition.notify_all()
        self.connection._wake()  # a reader may be leading
        if self.abandoned:
            self.abort()

    def _wait_for_room(self) -> bool:
        while not self.stopped:
            with self._condition:
                if self._has_room():
                    self._feeder_waits = False
                    return True
                self._feeder_waits = True
            self._bell.get()
        return False

    def _take(self, at_least: int) -> Optional[tuple[_Chunk, list[Any]]]:
        """The next chunk, if it has enough items or engines lack work. The caller holds `_condition`."""
        if not self._open or (len(self._open) < at_least and len(self._out) >= self.engines):
            return None
        items, self._open = self._open, []
        chunk = _Chunk(self, len(items))
        self._out[chunk] = None
        self._out_items += chunk.size
        if self.ordered:
            self._lined_up.append(chunk)
        return chunk, items

    def _send(self, taken: Optional[tuple[_Chunk, list[Any]]]) -> None:
        if taken is None:
            return
        chunk, items = taken
        try:
            self.engines = max(1, self.view._reach())  # more may have come
            payload = _packed(chunk, items)
            if payload is None:
                self.land(chunk, 0.0)
                return
            spec = self.view._chunk_spec(self.connection.function(*self.function))
            self.connection.submit(chunk, [(spec, payload, 1)])
        except Exception as e:  # the connection or the engines are gone
            chunk.failed = dict.fromkeys(range(chunk.size), e)
            self.land(chunk, 0.0)

    # --- results come in

    def land(self, chunk: _Chunk, seconds: float) -> None:
        """A chunk has ended, after so long per item."""
        with self._condition:
            chunk.landed = True
            del self._out[chunk]
            self._out_items -= chunk.size
            if not self.ordered:
                self._lined_up.append(chunk)
            best = min(CHUNK_MAX, 2 * self._size, CHUNK_S / max(seconds, 1e-6))
            if self.view._one_by_one():
                best = 1
            elif self.limit:
                best = min(best, self.limit / (2 * self.engines))
            self._size = max(1, int(best))
            chunk_out = self._take(self._size)
            self._ring()
            self._condition.notify_all()
        self._send(chunk_out)

    def _ring(self) -> None:
        if self._feeder_waits and self._has_room():
            self._feeder_waits = False
            self._bell.put(None)

    def read(self) -> list[Any]:
        """Wait for the next chunk; the values of its items."""
        if not self._readable():
            self.connection.wait(self._readable, self)
        with self._condition:
            if not self._lined_up:
                trouble, self._trouble = self._trouble, None
                if trouble is not None:
                    raise trouble
                raise StopIteration
            chunk = self._lined_up.popleft()
            self._ahead -= chunk.size
            self._ring()
        return chunk.outcome()

    def _readable(self) -> bool:
        if self._lined_up:
            return self._lined_up[0].landed
        return self._fed and not self._out

    # --- the end

    def stop(self, abandon: bool = False) -> None:
        """Take no more items. Takes no lock, as it may be called by the garbage collector at any time."""
        self.abandoned = self.abandoned or abandon
        self.stopped = True
        self._bell.put(None)

    def abort(self) -> None:
        """Take back what is under way and has not started."""
        with self._condition:
            chunks = [chunk for chunk in self._out if chunk._count]  # those that have been submitted
        if chunks and self.connection.lost is None:
            self.view.client.abort(chunks, block=False)


def _packed(chunk: _Chunk, items: list[Any]) -> Any:
    """The payload of a chunk, without the items that can't be pickled; None if there are no others."""
    try:
        return pack.pack(tuple(zip(*items)))
    except PackError:
        good = []
        for i, args in enumerate(items):
            try:
                pack.pack(args)
                good.append(args)
            except PackError as e:
                chunk.failed[i] = e
        chunk._sizes = [len(good)]
        return pack.pack(tuple(zip(*good))) if good else None


class LazyMapIterator:
    """What `imap` returns: an iterator over the values, in the order of the items or as they arrive.

    An item that failed raises where its value would come; the values after it can still be read. The engines work ahead
    of the reader, whether it reads or not, until four times `max_outstanding` items have been taken and not read. It
    may be read by several threads.

    Args:
        view, f, sequences: what to call on which engines; the sequences may be endless.
        ordered: the order of the items, or of their arrival.
        max_outstanding: items under way at most; 0: no limit; "auto": 16 per engine, or more if they take very short.
        return_exceptions: yield the exception of an item that failed, instead of raising it.

    Example:
        >>> import itertools
        >>> squares = rc.load_balanced_view().imap(lambda x: x * x, itertools.count())
        >>> [next(squares) for _ in range(4)]
        [0, 1, 4, 9]
        >>> squares.close()
    """

    def __init__(self, view: Any, f: Callable[..., Any], sequences: Sequence[Iterable[Any]], ordered: bool = True,
                 max_outstanding: Union[int, str, None] = "auto", return_exceptions: bool = False):
        if not sequences:
            raise TypeError("imap needs at least one sequence")
        limit: Any = 0 if max_outstanding == "auto" else max_outstanding or math.inf
        if type(limit) is not int and limit is not math.inf or limit < 0:
            raise ValueError("max_outstanding must be a whole number from 0 (no limit) up or 'auto', not "
                             f"{max_outstanding!r}")
        self._run = _Run(view, f, sequences, ordered, limit)
        self._return_exceptions = return_exceptions
        self._values: deque[Any] = deque()
        self._lock, self._closed = threading.Lock(), False
        self._end = weakref.finalize(self, self._run.stop, True)
        self._end.atexit = False

    def __iter__(self) -> "LazyMapIterator":
        return self

    def __repr__(self) -> str:
        run = self._run
        state = "closed" if self._closed else "no more items" if run.stopped or run._fed else "running"
        return f"<LazyMapIterator({run.name}): {state}, {run._out_items} items under way>"

    def __next__(self) -> Any:
        with self._lock:
            if self._closed:
                raise StopIteration
            while not self._values:
                self._values.extend(self._run.read())
            value = self._values.popleft()
        if type(value) is not _ItemError:
            return value
        if self._return_exceptions:
            return value.error
        raise value.error

    def cancel(self) -> None:
        """Take no more items; what is under way can still be read."""
        self._run.stop()

    def close(self) -> None:
        """Take no more items, take back what has not started, and end the iteration."""
        self._run.stop()
        self._run.abort()
        self._closed = True
