"""Task records in memory: of the last tasks that ended, and of all that have not.

    Batch ──► origins, payloads ─┐
    (place: where it is now)     ├─ a block of rows per 256 numbers ──► Row ──► a record
    Section ──► fates ───────────┘

What the controller tells goes into slots of lists, a slice at a time, and points to the batch or section that it came
with; nothing is decoded before somebody asks. Rules that hold here: unfinished tasks are always on record; finished
ones are dropped with the section that brought their result, oldest first, when there are more than `record_limit`,
when they hold more than `size_limit` bytes or when they are older than `record_age` seconds; asking for one that was
dropped says so.
"""

from __future__ import annotations

import time
from collections import deque
from typing import Any, Callable, Iterable, Mapping, Optional, Sequence, Union

from . import wire
from .db import KEYS, Batch, Section, Volatile, check_keys, compile_query, size_of
from .errors import NoRecord, RecordExpired
from .records import OUTPUT_MAX, Place, Row, read_arguments, shown_keys

RECORD_LIMIT = 10_000  # finished tasks on record
SIZE_LIMIT = 64 * 1024 * 1024  # bytes of their arguments, results and output
ROW_SIZE = 200  # what a record takes besides, and ...
SECTION_SIZE = 600  # ... what the messages that brought it do
BLOCK = 256  # rows that are kept together
KEPT_AT_LEAST = 0.8  # of the records that there may be, when whole sections are dropped
OPENED = 64  # sections that are decoded at a time
SESSIONS_KEPT = 1000  # clients of which is known how many tasks they had


class _Origin:
    """What tasks that came together have in common; `share` is the size of one's arguments, `frame` may hold all."""

    __slots__ = ("spec", "first", "fan", "when", "function", "frame", "share", "order")

    def __init__(self, batch: Batch, share: float, order: int):
        self.spec, self.first, self.fan = batch.spec, batch.seqs[0], batch.fan
        self.when, self.function, self.frame = batch.when, batch.function, batch.frame
        self.share, self.order = share, order


class _Block:
    """BLOCK rows of one session, in three columns; `live` of them are in use."""

    __slots__ = ("origins", "payloads", "fates", "live")

    def __init__(self) -> None:
        self.origins: list[Optional[_Origin]] = [None] * BLOCK
        self.payloads: list[Any] = [None] * BLOCK
        self.fates: list[Optional[Section]] = [None] * BLOCK  # what brought the result
        self.live = 0


class _Session:
    """The rows of a client; `end` is the number after that of its newest task, `reason` why rows were dropped."""

    __slots__ = ("blocks", "end", "reason")

    def __init__(self) -> None:
        self.blocks: dict[int, _Block] = {}
        self.end = 0
        self.reason = ""


class DictDB(Volatile):
    """Records in memory, of the last tasks that finished and of all that have not.

    Args:
        record_limit: at most so many finished tasks; 0 = no limit.
        size_limit: at most so many bytes of arguments, results, output and functions with them; 0 = no limit.
        record_age: s after which the record of a finished task is dropped; 0 = never.
        place: tells on which engine an unfinished task is.
        clock: s since the epoch.
    """

    keeps = True

    def __init__(self, record_limit: int = RECORD_LIMIT, size_limit: int = SIZE_LIMIT, record_age: float = 0.0,
                 place: Place = lambda key: None, clock: Callable[[], float] = time.time):
        self.record_limit, self.size_limit, self.record_age = record_limit, size_limit, record_age
        self._place, self._clock = place, clock
        self.count, self.size = 0, 0.0  # of finished tasks
        self._sessions: dict[bytes, _Session] = {}
        self._done: deque[Section] = deque()  # oldest first
        self._extra: dict[wire.TaskKey, dict[str, Any]] = {}  # output and changes, of the few tasks that have some
        self._opened: dict[Union[Section, _Origin], dict[int, Any]] = {}
        self._orders = 0

    # --- what the controller tells

    def submitted(self, batch: Batch) -> None:
        """See TaskDB."""
        payloads, at = batch.payloads or (), 0
        session = self._sessions.get(batch.session)
        if session is None:
            session = self._new_session(batch.session)
        size = len(batch.frame or b"") + sum([len(p) if type(p) is bytes else size_of(p) for p in payloads])
        function = batch.function
        if function is not None and not function.counted:
            function.counted = True
            size += function.size
        self._orders += 1
        origin = _Origin(batch, size / len(batch.seqs), self._orders)
        for number, a, b in wire.slots(batch.seqs, BLOCK):
            block = session.blocks.get(number)
            if block is None:
                block = session.blocks[number] = _Block()
            n = b - a
            new = block.origins[a:b].count(None)
            if new == n:
                block.origins[a:b] = [origin] * n
                if payloads:
                    block.payloads[a:b] = payloads[at : at + n]
            else:
                for i in range(a, b):
                    if block.origins[i] is None:
                        block.origins[i], block.payloads[i] = origin, payloads[at + i - a] if payloads else None
            block.live += new
            at += n
        session.end = max(session.end, max(batch.seqs) + 1)

    def assigned(self, session: bytes, engine_id: int, engine_uuid: str, tasks: Sequence[tuple[int, int, Any]]) -> None:
        """Nothing to note: `place` tells where unfinished tasks are."""

    def finished(self, section: Section) -> None:
        """See TaskDB."""
        session = self._sessions.get(section.session)
        if session is None:
            return
        run = range(section.seqs[0], section.seqs[0] + len(section.seqs))
        if section.seqs == list(run):
            section.seqs = run
        size, rows = 0.0, 0
        for number, a, b in wire.slots(section.seqs, BLOCK):
            block = session.blocks.get(number)
            if block is None:
                continue
            origins, n = block.origins[a:b], b - a
            origin = origins[0]
            if origin is not None and origins.count(origin) == n:
                block.fates[a:b] = [section] * n
                size += origin.share * n
                rows += n
                continue
            for i, origin in enumerate(origins, a):
                if origin is not None:
                    block.fates[i] = section
                    size += origin.share
                    rows += 1
        if not rows:
            return
        section.left = rows
        size += sum([len(f) if type(f) is bytes else f.nbytes for f in section.frames])
        section.size = size + rows * ROW_SIZE + SECTION_SIZE
        self.count += rows
        self.size += section.size
        self._done.append(section)
        self._expire()

    def output(self, session: bytes, pieces: list[Any]) -> None:
        """See TaskDB. Of each task the first `OUTPUT_MAX` characters are kept."""
        for seq, name, text in pieces:
            if name not in ("stdout", "stderr") or self._find((session, seq)) is None:
                continue
            extra = self._extra.setdefault((session, seq), {})
            kept = extra.get(".size", 0)
            text = text[: OUTPUT_MAX - kept]
            if text:
                extra.setdefault("." + name, []).append(text)
                extra[".size"] = kept + len(text)
                self.size += len(text)

    # --- retention

    def _new_session(self, name: bytes) -> _Session:
        if len(self._sessions) >= SESSIONS_KEPT:
            for old in [n for n, s in self._sessions.items() if not s.blocks][: SESSIONS_KEPT // 2]:
                del self._sessions[old]
        session = self._sessions[name] = _Session()
        return session

    def _expire(self) -> None:
        """Drop what exceeds the limits."""
        too_old = self._clock() - self.record_age if self.record_age else 0.0
        while self._done:
            if self.record_limit and self.count > self.record_limit:
                reason = f"c.DictDB.record_limit is {self.record_limit}"
                if self.count - self._done[0].left < self.record_limit * KEPT_AT_LEAST:
                    self._drop_oldest(self._done[0], self.count - self.record_limit, reason)
                    continue
            elif self.size_limit and self.size > self.size_limit:
                reason = f"c.DictDB.size_limit is {self.size_limit} bytes"
            elif self._done[0].received < too_old:
                reason = f"c.DictDB.record_age is {self.record_age:g} s"
            else:
                break
            self._drop_section(self._done.popleft(), reason)

    def _drop_oldest(self, section: Section, n: int, reason: str) -> None:
        """Drop the first n rows of a section, which holds more."""
        session = self._sessions[section.session]
        session.reason = reason
        for seq in section.seqs:
            found = self._find((section.session, seq))
            if n and found is not None and found[0].fates[found[1]] is section:
                self._drop((section.session, seq))
                n -= 1

    def _drop_section(self, section: Section, reason: str) -> None:
        session = self._sessions[section.session]
        session.reason = reason
        self._opened.clear()
        if self._extra:
            for seq in section.seqs:
                self._drop_extra((section.session, seq))
        self.count -= section.left
        self.size -= section.size
        for number, a, b in wire.slots(section.seqs, BLOCK):
            block = session.blocks.get(number)
            if block is None:
                continue
            n = b - a
            if block.fates[a:b].count(section) == n:
                nothing: list[Any] = [None] * n
                block.origins[a:b] = block.payloads[a:b] = block.fates[a:b] = nothing
                block.live -= n
            else:
                for i in range(a, b):
                    if block.fates[i] is section:
                        block.origins[i] = block.payloads[i] = block.fates[i] = None
                        block.live -= 1
            if not block.live:
                del session.blocks[number]

    def _drop_extra(self, key: wire.TaskKey) -> None:
        extra = self._extra.pop(key, None)
        if extra is not None:
            self.size -= extra.get(".size", 0)

    def _drop(self, key: wire.TaskKey) -> None:
        """Forget one task that is on record."""
        session = self._sessions[key[0]]
        number, i = divmod(key[1], BLOCK)
        block = session.blocks[number]
        section, origin = block.fates[i], block.origins[i]
        self._drop_extra(key)
        if section is not None and origin is not None:
            section.left -= 1
            freed = origin.share + ROW_SIZE if section.left else section.size
            section.size -= freed
            self.size -= freed
            self.count -= 1
        block.origins[i] = block.payloads[i] = block.fates[i] = None
        block.live -= 1
        if not block.live:
            del session.blocks[number]

    # --- what is asked

    def _find(self, key: wire.TaskKey) -> Optional[tuple[_Block, int]]:
        session = self._sessions.get(key[0])
        number, i = divmod(key[1], BLOCK)
        block = session.blocks.get(number) if session is not None else None
        return None if block is None or block.origins[i] is None else (block, i)

    def _known(self, msg_id: str) -> wire.TaskKey:
        """The task of an id, if it is on record."""
        self._expire()
        key = wire.task_key(msg_id)
        if self._find(key) is not None:
            return key
        session = self._sessions.get(key[0])
        if session is None or not 0 < key[1] < session.end:
            raise NoRecord(f"the controller knows of no task {msg_id}")
        if session.reason:
            raise RecordExpired(f"the record of task {msg_id} expired or was purged: {session.reason}, which can be "
                                "raised in ipcontroller_config.py")
        raise RecordExpired(f"the record of task {msg_id} was purged")

    def _open(self, source: Union[Section, _Origin]) -> dict[int, Any]:
        """The results, or arguments, that came together, by number; the last few are kept for the next question."""
        found = self._opened.get(source)
        if found is None:
            if len(self._opened) >= OPENED:
                self._opened.clear()
            if isinstance(source, Section):
                found = {r.seq: r for r in source.results()}
            else:
                found = read_arguments([source.frame or b""])
            self._opened[source] = found
        return found

    def _row(self, key: wire.TaskKey, block: _Block, i: int) -> Row:
        origin = block.origins[i]
        assert origin is not None
        return Row(key, origin, block.payloads[i], block.fates[i], self._extra.get(key, {}), self._open, self._place)

    def _rows(self) -> list[Row]:
        """All tasks on record, in the order of submission."""
        self._expire()
        rows = [self._row((name, number * BLOCK + i), block, i)
                for name, session in self._sessions.items() for number, block in session.blocks.items()
                for i, origin in enumerate(block.origins) if origin is not None]
        rows.sort(key=lambda row: (row.origin.order, row.key[1]))  # type: ignore[attr-defined]  # they are ours
        return rows

    def get_record(self, msg_id: str) -> dict[str, Any]:
        """See TaskDB."""
        key = self._known(msg_id)
        block, i = self._find(key)  # type: ignore[misc]
        row = self._row(key, block, i)
        return {k: row(k) for k in KEYS}

    def find_records(self, query: Mapping[str, Any], keys: Optional[Iterable[str]] = None) -> list[dict[str, Any]]:
        """See TaskDB."""
        matches = compile_query(query)
        wanted = shown_keys(keys)
        return [{k: row(k) for k in wanted} for row in self._rows() if matches(row)]

    def get_history(self) -> list[str]:
        """See TaskDB."""
        return [wire.msg_id(row.key) for row in self._rows()]

    def drop_record(self, msg_id: str) -> None:
        """See TaskDB."""
        self._drop(self._known(msg_id))
        self._tidy()

    def drop_matching_records(self, query: Mapping[str, Any]) -> int:
        """See TaskDB."""
        matches = compile_query(query)
        chosen = [row.key for row in self._rows() if matches(row)]
        for key in chosen:
            self._drop(key)
        self._tidy()
        return len(chosen)

    def _tidy(self) -> None:
        self._opened.clear()
        if any(not section.left for section in self._done):
            self._done = deque(section for section in self._done if section.left)

    def update_record(self, msg_id: str, changes: Mapping[str, Any]) -> None:
        """See TaskDB."""
        check_keys(changes)
        self._extra.setdefault(self._known(msg_id), {}).update(changes)

    def stats(self) -> dict[str, Any]:
        """See TaskDB."""
        self._expire()
        live = sum(block.live for session in self._sessions.values() for block in session.blocks.values())
        return {"database": "DictDB", "finished": self.count, "unfinished": live - self.count, "clients": len(self._sessions),
                "bytes": int(self.size), "record_limit": self.record_limit, "size_limit": self.size_limit,
                "record_age": self.record_age}

    def close(self) -> None:
        """See TaskDB."""
