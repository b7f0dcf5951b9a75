"""Task records that last: a journal of what the controller tells, written behind its back in few large pieces.

    submitted, assigned, finished, output ──► queue ──► the writer, a thread: every COMMIT_S one commit
                                                 │                             │
    a question ── waits until all is written ◄───┘      chunks of parts ──► Store (SQLite, MongoDB)
        └── chunks, opened when asked ──► Row ──► a record

What parts, chunks and spans are, chunks.py says. Which tasks have not ended is known by a bit for each. A task is on record
if it has not ended, or if a chunk has its result and it was not dropped.

Rules that hold here: who tells waits for nothing, unless QUEUE_BYTES wait to be written; a commit is whole or not there;
what can not be written is said once, and from then on nothing is kept; unfinished tasks are never dropped.
"""

from __future__ import annotations

import contextlib
import json
import os
import struct
import threading
import time
from collections import OrderedDict, deque
from pathlib import Path
from typing import Any, Callable, Iterable, Iterator, Mapping, Optional, Sequence, Union

from . import wire
from .chunks import (BATCH, COUNTED, HAPPENED, KINDS, OUTPUT, PLACES, PRINTED, SECTION, SENT, SUBMITTED, Change, Chunk, Draft,
                     Masks, Meta, Owner, Part, Seen, Store, StoreError, count, masks_of, numbers_in, pack_changes, pack_numbers,
                     unpack_changes, unpack_numbers)
from .db import KEYS, Batch, Function, Section, Unfinished, check_keys, compile_query, size_of
from .errors import ConfigError, NoRecord, ProtocolError, RecordExpired
from .records import OUTPUT_MAX, Place, Row, asks_for_unfinished, named_tasks, read_arguments, read_spec, shown_keys

COMMIT_S = 0.2  # what comes within this time is written at once
CHUNK_BYTES = 4 << 20  # about the largest chunk, unless one part is larger
QUEUE_BYTES = 64 << 20  # what may wait to be written
ITEM_BYTES, TASK_BYTES = 500, 150  # about what one takes there, besides its data
STALL_S = 4.0  # the controller waits so long for room there, if nothing at all gets written
PATIENCE_S = 60.0  # for a store that can't be reached
RETRY_S = 1.0
BEAT_S = 10.0  # the store's owner says that often that it is there
ANSWER_S = 30.0  # a question waits so long until what was told before is written
OPENED_BYTES = 64 << 20  # of chunks in memory for the next question
DRAFT_BYTES = 200  # about what a part takes in a head
REMEMBERED = 10_000  # functions, specs: of so many is known what they are
FUNCTIONS_BYTES = 16 << 20  # of functions in memory for the next question
OPENED = 64  # parts that are decoded at a time
METAS = 1000  # chunks that are listed at a time
FEW = 20  # tasks are looked up one by one
# What comes of reading what nobody of us has written.
DAMAGED = (StoreError, ProtocolError, ArithmeticError, AttributeError, LookupError, MemoryError, RecursionError, TypeError, ValueError,
           struct.error)
KEPT_AT_LEAST = 0.8  # of the records that there may be, when whole chunks are dropped


class Journal:
    """The database over a store: see TaskDB.

    Args:
        store: where records are kept.
        record_limit: at most so many finished tasks; 0 = no limit.
        size_limit: at most so many bytes; 0 = no limit.
        record_age: s after which the record of a finished task is dropped; 0 = never.
        place: tells on which engine an unfinished task is.
        clock: s since the epoch.
    """

    waits = True

    def __init__(self, store: Store, record_limit: int = 0, size_limit: int = 0, record_age: float = 0.0,
                 place: Place = lambda key: None, clock: Callable[[], float] = time.time):
        self.store, self.record_limit, self.size_limit, self.record_age = store, record_limit, size_limit, record_age
        self._place, self._clock = place, clock
        self.keeps, self.persists, self.failed = True, True, ""
        self.wake_fd: Optional[int] = None
        self._wake_w: Optional[int] = None
        self._cluster = ""
        self._lock = threading.RLock()  # the store, and all that follows
        self._owners: dict[bytes, Owner] = {}
        self._seen: dict[bytes, Seen] = {}
        self._unfinished: dict[bytes, Masks] = {}
        self._held: deque[tuple[int, dict[bytes, Masks]]] = deque()  # chunks with unfinished tasks: which may be those
        self._floor = self._next = 0
        self._sent: dict[wire.TaskKey, tuple[int, str]] = {}  # of former runs' unfinished tasks: attempt, engine
        self._printed: dict[wire.TaskKey, int] = {}  # characters on record of tasks that print
        self._totals: Optional[dict[str, tuple[int, int, int]]] = None  # what the store says, if that is known
        self._dead = -1  # no chunk up to this one has results on record
        self._written_functions: set[tuple[bytes, bytes]] = set()
        self._digests: dict[bytes, bytes] = {}  # spec -> digest of its function
        self._functions: OrderedDict[tuple[bytes, bytes], Optional[Function]] = OrderedDict()
        self._chunks: OrderedDict[int, Chunk] = OrderedDict()
        self._opened: dict[Any, dict[int, Any]] = {}
        self._queue: deque[tuple[Any, int]] = deque()  # what was told, and its size
        self._told = self._told_bytes = 0  # the controller counts
        self._done = self._done_bytes = 0  # the writer counts
        self._safe: deque[Union[Batch, Section]] = deque()
        self._work, self._hurry, self._closing = threading.Event(), threading.Event(), False
        self._progress = threading.Condition()
        self._trouble = ""  # why the store can't be reached just now
        self._writer: Optional[threading.Thread] = None

    def open(self, profile_dir: Path, cluster_id: str) -> None:
        """See TaskDB."""
        self._cluster = cluster_id
        try:
            state = self.store.open(profile_dir, cluster_id)
            self._next, self._floor, self._owners = state.next_id, state.floor, state.owners
            self._recover()
        except DAMAGED as e:
            self.store.close()
            raise self._damaged(e) from None
        self.wake_fd, self._wake_w = os.pipe()
        os.set_blocking(self.wake_fd, False)
        os.set_blocking(self._wake_w, False)
        self._writer = threading.Thread(target=self._write, name="records", daemon=True)
        self._writer.start()

    def _damaged(self, e: BaseException) -> ConfigError:
        return ConfigError(f"the records in {self.store.name} can't be used: {type(e).__name__}: {e}; restore them from a copy, or "
                           "choose another place for new ones.")

    def close(self) -> None:
        """See TaskDB. What was told is written first."""
        if self._writer is None:
            return
        self._closing = True
        self._hurry.set()
        self._work.set()
        self._writer.join(ANSWER_S)
        self._writer = None
        try:
            self.store.close()
        except StoreError:
            pass  # what could be written has been
        for fd in (self.wake_fd, self._wake_w):
            os.close(fd)  # type: ignore[arg-type]
        self.wake_fd = self._wake_w = None

    # --- what the controller tells

    def submitted(self, batch: Batch) -> None:
        """See TaskDB."""
        self._tell(batch, len(batch.frame) if batch.frame is not None else sum([size_of(p) for p in batch.payloads or ()]))

    def assigned(self, session: bytes, engine_id: int, engine_uuid: str, tasks: Sequence[tuple[int, int, Any]]) -> None:
        """See TaskDB."""
        self._tell((SENT, session, engine_id, engine_uuid, tasks), TASK_BYTES * len(tasks))

    def finished(self, section: Section) -> None:
        """See TaskDB."""
        self._tell(section, sum([len(f) if type(f) is bytes else f.nbytes for f in section.frames]))

    def output(self, session: bytes, pieces: list[Any]) -> None:
        """See TaskDB. Of each task the first `OUTPUT_MAX` characters are kept."""
        self._tell((OUTPUT, session, pieces), sum([len(piece[2]) for piece in pieces]))

    def _tell(self, item: Any, size: int) -> None:
        if not self.keeps:
            return
        size += ITEM_BYTES
        self._queue.append((item, size))
        self._told += 1
        self._told_bytes += size
        if not self._work.is_set():
            self._work.set()
        if self._told_bytes - self._done_bytes > QUEUE_BYTES:
            self._wait_for_room()

    def _wait_for_room(self) -> None:
        """The store is slower than the tasks: wait, as long as it gets on."""
        self._hurry.set()
        with self._progress:
            done = self._done
            while self.keeps and self._told_bytes - self._done_bytes > QUEUE_BYTES:
                if not self._progress.wait(STALL_S) and self._done == done:
                    self._give_up(f"for {STALL_S:g} s nothing could be written to {self.store.name}, and there is no room left for "
                                  f"what waits" + (f": {self._trouble}" if self._trouble else ""))
                done = self._done

    def collect(self) -> list[Union[Batch, Section]]:
        """See TaskDB."""
        if self.wake_fd is not None:
            try:
                os.read(self.wake_fd, 4096)
            except BlockingIOError:
                pass  # nobody has written since
        return [self._safe.popleft() for _ in range(len(self._safe))]

    def _wake(self) -> None:
        try:
            os.write(self._wake_w, b"!")  # type: ignore[arg-type]
        except (BlockingIOError, OSError, TypeError):
            pass  # it is full, so there is something to wake by; or closed

    def _give_up(self, why: str) -> None:
        if not self.failed:
            self.failed = f"no records of tasks are kept any more, as {why}"
            self.keeps = self.persists = False
            self._queue.clear()
            with self._progress:
                self._progress.notify_all()
            self._wake()

    # --- the writer

    def _write(self) -> None:
        beat = time.monotonic()
        while self.keeps:
            self._work.wait(BEAT_S)
            if self._told != self._done and not self._closing:
                self._hurry.wait(COMMIT_S)
            self._hurry.clear()
            self._work.clear()
            items = [self._queue.popleft() for _ in range(len(self._queue))]
            try:
                if items:
                    self._store(items)
                if time.monotonic() - beat > BEAT_S:
                    beat = time.monotonic()
                    with self._lock:
                        self.store.beat()
                        self._expire()
            except StoreError as e:
                self._give_up(str(e))
            except Exception as e:  # whatever it is must not leave the controller waiting for us
                self._give_up(f"writing them failed: {type(e).__name__}: {e}")
            if self._closing and not self._queue:
                return

    def _store(self, items: list[tuple[Any, int]]) -> None:
        """Write what was told, and say what is safe."""
        with self._lock:
            at = 0
            while at < len(items) and self.keeps:
                change, end = self._draft(items, at)
                self._commit(change)
                taken = items[at:end]
                self._safe += [item for item, _ in taken if isinstance(item, (Batch, Section))]
                at = end
                with self._progress:
                    self._done += len(taken)
                    self._done_bytes += sum(size for _, size in taken)
                    self._progress.notify_all()
                self._wake()
            self._expire()

    def _commit(self, change: Change) -> None:
        """Have the store do it, trying for a while if it can't be reached."""
        give_up = time.monotonic() + PATIENCE_S
        while True:
            try:
                self.store.commit(change)
                self._trouble = ""
                return
            except StoreError as e:
                if not e.passing or time.monotonic() > give_up or self._closing:
                    raise
                self._trouble = str(e)
                time.sleep(RETRY_S)
            if not self.keeps:
                raise StoreError(self._trouble)

    def _draft(self, items: list[tuple[Any, int]], at: int) -> tuple[Change, int]:
        """A change that writes items from `at` on, about CHUNK_BYTES of them; and where it ends."""
        change = Change()
        drafts = {kind: Draft(kind) for kind in KINDS}
        size = 0
        while at < len(items) and size < CHUNK_BYTES:
            item, nbytes = items[at]
            size += nbytes + DRAFT_BYTES
            at += 1
            if type(item) is Batch:
                self._draft_batch(change, drafts[SUBMITTED], item)
            elif type(item) is Section:
                self._draft_section(drafts[HAPPENED], item)
            elif item[0] == SENT:
                self._draft_sent(drafts[HAPPENED], *item[1:])
            else:
                self._draft_output(drafts[PRINTED], *item[1:])
        now = self._clock()
        for kind, draft in drafts.items():
            if self._totals is not None and draft.rows:
                n, live, size = self._totals.get(kind, (0, 0, 0))
                self._totals[kind] = (n + 1, live + draft.live, size + draft.size + DRAFT_BYTES * len(draft.rows))
            id, self._next = self._next, draft.into(change, self._next, now)
            if draft.kind == SUBMITTED and self._next > id:
                held: dict[bytes, Masks] = {}
                for _, session, packed, *_ in draft.rows:
                    for number, bits in masks_of(unpack_numbers(packed)):
                        masks = held.setdefault(bytes.fromhex(session), {})
                        masks[number] = masks.get(number, 0) | bits
                self._held.append((id, held))
            for session, (low, high) in draft.ends.items():
                owner = self._owners[session]
                if high - low > owner.width:
                    change.owners[session] = self._owners[session] = owner._replace(width=high - low)
        self._raise_floor(change)
        return change, at

    def _draft_batch(self, change: Change, draft: Draft, batch: Batch) -> None:
        session, fan = batch.session, batch.fan
        owner, seen = self._owners.get(session), self._seen.get(session)
        if seen is None:
            seen = self._seen[session] = self._look_back(session)
        unfinished = self._unfinished.setdefault(session, {})
        new: Masks = {}
        n = 0
        for number, bits in masks_of(batch.seqs):
            bits = seen.add(number, bits)
            n += count(bits)
            new[number] = new.get(number, 0) | bits
            unfinished[number] = unfinished.get(number, 0) | bits
        if not n:
            return
        seqs = batch.seqs if n == len(batch.seqs) else list(numbers_in(new))
        end = seqs[-1] if isinstance(seqs, range) else max(seqs)
        if owner is None or end >= owner.end:
            change.owners[session] = self._owners[session] = (owner or Owner(self._cluster))._replace(end=min(end + 1, wire.SEQ_END - 1))
        digest = self._note_function(change, batch)
        frames: Sequence[Any] = [batch.frame]
        if batch.frame is None:
            frames = wire.encode_tasks(batch.spec, session, [(seq, fan, payload) for seq, payload in
                                                             zip(batch.seqs[::fan], (batch.payloads or ())[::fan])])
        draft.add(BATCH, session, seqs, frames, batch.when, fan, batch.seqs[0], batch.spec.decode(errors="surrogateescape"),
                  digest.hex())

    def _look_back(self, session: bytes) -> Seen:
        """What a session of a former run has submitted."""
        seen = Seen()
        owner = self._owners.get(session)
        for id in self.store.spanning(session, SUBMITTED, 0, wire.SEQ_END - 1, wire.SEQ_END) if owner else ():
            chunk = self._chunk(id)
            for number, bits in chunk.masks(BATCH).get(session, {}).items() if chunk else ():
                seen.add(number, bits)
        return seen

    def _note_function(self, change: Change, batch: Batch) -> bytes:
        digest = self._digests.get(batch.spec)
        if digest is None:
            if len(self._digests) >= REMEMBERED:
                self._digests.clear()
            try:
                digest = bytes.fromhex(json.loads(batch.spec).get("fn") or "")
            except ValueError:
                digest = b""  # it is nobody's
            self._digests[batch.spec] = digest
        key = (batch.session, digest)
        if digest and batch.function is not None and key not in self._written_functions:
            if len(self._written_functions) >= REMEMBERED:
                self._written_functions.clear()
            self._written_functions.add(key)
            change.functions[key] = batch.function.frames
            self._functions.pop(key, None)
        return digest

    def _draft_section(self, draft: Draft, section: Section) -> None:
        unfinished = self._unfinished.get(section.session)
        if unfinished is None:
            return
        known: Masks = {}
        n = 0
        for number, bits in masks_of(section.seqs):
            had = unfinished.get(number, 0)
            n += count(bits & had)
            known[number] = known.get(number, 0) | (bits & had)
            if had & ~bits:
                unfinished[number] = had & ~bits
            else:
                unfinished.pop(number, None)
        if n:
            seqs = section.seqs if n == len(section.seqs) else list(numbers_in(known))
            draft.add(SECTION, section.session, seqs, section.frames, section.engine_id, section.engine_uuid, section.received)
        if self._printed or self._sent:
            for seq in section.seqs:
                self._printed.pop((section.session, seq), None)
                self._sent.pop((section.session, seq), None)

    def _draft_sent(self, draft: Draft, session: bytes, engine_id: int, engine_uuid: str, tasks: Sequence[Any]) -> None:
        by_attempt: dict[int, list[int]] = {}
        for seq, attempt, _ in tasks:
            by_attempt.setdefault(attempt, []).append(seq)
        runs = [[pack_numbers(seqs), attempt] for attempt, seqs in by_attempt.items()]
        draft.add(SENT, session, (), (), engine_id, engine_uuid, runs)

    def _draft_output(self, draft: Draft, session: bytes, pieces: list[Any]) -> None:
        kept = []
        for seq, name, text in pieces:
            if name in ("stdout", "stderr") and self._is_unfinished((session, seq)):
                before = self._printed.get((session, seq), 0)
                text = text[: OUTPUT_MAX - before]
                if text:
                    self._printed[session, seq] = before + len(text)
                    kept.append([seq, name, text])
        if kept:
            seqs = sorted({seq for seq, _, _ in kept})
            draft.add(OUTPUT, session, seqs, [json.dumps(kept, separators=(",", ":")).encode()])

    def _is_unfinished(self, key: wire.TaskKey) -> bool:
        number, at = divmod(key[1], PLACES)
        return bool(self._unfinished.get(key[0], {}).get(number, 0) >> at & 1)

    def _raise_floor(self, change: Change) -> None:
        """The chunks before the first that has an unfinished task need not be read by the next run."""
        while self._held and not any(bits & self._unfinished.get(session, {}).get(number, 0)
                                     for session, masks in self._held[0][1].items() for number, bits in masks.items()):
            self._held.popleft()
        floor = self._held[0][0] if self._held else self._next
        if floor != self._floor:
            self._floor = change.floor = floor

    # --- what former runs have left

    def _recover(self) -> None:
        """Which tasks have not ended, from the chunks since the floor."""
        sent: list[tuple[bytes, int, str, Any]] = []
        for meta in self._metas(None, self._floor - 1):
            chunk = self._chunk(meta.id)
            if chunk is None or meta.kind == PRINTED:
                continue
            for session, came in chunk.masks(BATCH).items():
                masks = self._unfinished.setdefault(session, {})
                for number, bits in came.items():
                    masks[number] = masks.get(number, 0) | bits
            if meta.kind == SUBMITTED:
                self._held.append((meta.id, chunk.masks(BATCH)))
            for session, ended in chunk.masks(SECTION).items():
                self._forget_bits(session, ended)
            sent += [(part.session, *part.about) for part in chunk.parts if part.kind == SENT]
        for session in list(self._unfinished):
            for seq in self.store.marked(session, 0, wire.SEQ_END - 1):
                self._forget_bits(session, {seq // PLACES: 1 << seq % PLACES})
        for session, _, engine_uuid, runs in sent:
            masks = self._unfinished.get(session, {})
            for packed, attempt in runs if masks else ():
                ran = {number: bits & masks.get(number, 0) for number, bits in masks_of(unpack_numbers(packed))}
                for seq in numbers_in(ran):
                    before = self._sent.get((session, seq), (0, ""))[0]
                    self._sent[session, seq] = (max(before, attempt), engine_uuid)

    def _forget_bits(self, session: bytes, masks: Masks) -> None:
        unfinished = self._unfinished.get(session, {})
        for number, bits in masks.items():
            left = unfinished.get(number, 0) & ~bits
            if left:
                unfinished[number] = left
            else:
                unfinished.pop(number, None)

    def unfinished(self) -> Iterator[Unfinished]:
        """See TaskDB.

        Raises:
            ConfigError: the records are damaged.
        """
        specs: dict[tuple[bytes, int], bytes] = {}
        for id, _ in list(self._held):
            try:
                with self._lock:
                    chunk = self._chunk(id)
                    parts = [p for p in chunk.parts if self._owners[p.session].cluster == self._cluster] if chunk else []
                    found = [left for part in parts for left in self._left_of(part, specs)]
            except DAMAGED as e:
                raise self._damaged(e) from None
            yield from found

    def _left_of(self, part: Part, specs: dict[tuple[bytes, int], bytes]) -> Iterator[Unfinished]:
        seqs = [seq for seq in part.seqs if self._is_unfinished((part.session, seq))]
        arguments = read_arguments(part.frame) if seqs else {}
        for seq in seqs:
            place = (part.spec, (seq - part.first) % part.fan)
            spec = specs.get(place)
            if spec is None:
                whole = {k: v for k, v in read_spec(part.spec, part.fan, place[1]).items() if k != "coalesce"}
                spec = specs[place] = part.spec if part.fan == 1 else json.dumps(whole).encode()
            payload = arguments[seq]
            if not isinstance(payload, bytes):
                payload = [bytes(piece) for piece in payload]
            attempt, engine_uuid = self._sent.get((part.session, seq), (0, ""))
            yield Unfinished((part.session, seq), spec, payload, attempt, engine_uuid, bytes.fromhex(part.about[4]))

    def function(self, session: bytes, digest: bytes) -> Optional[Function]:
        """See TaskDB."""
        key = (session, digest)
        with self._lock:
            if key in self._functions:
                self._functions.move_to_end(key)
                return self._functions[key]
            try:
                frames = self.store.function(session, digest)
                found = None if frames is None else Function(frames)
            except DAMAGED as e:
                raise self._damaged(e) from None
            self._functions[key] = found
            while len(self._functions) > 1 and sum(f.size for f in self._functions.values() if f) > FUNCTIONS_BYTES:
                self._functions.popitem(last=False)
            return found

    # --- reading

    def read(self, chunk: int) -> bytes:
        """The data of a chunk."""
        with self._lock:
            return self.store.data(chunk)

    def _chunk(self, id: int) -> Optional[Chunk]:
        """A chunk, if there still is one; the last ones are kept for the next question."""
        chunk = self._chunks.get(id)
        if chunk is None:
            head = self.store.head(id)
            if head is None:
                return None
            chunk = self._chunks[id] = Chunk(self, id, head)
            while len(self._chunks) > 1 and sum(c.size for c in self._chunks.values()) > OPENED_BYTES:
                self._chunks.popitem(last=False)
        self._chunks.move_to_end(id)
        return chunk

    def _metas(self, kind: Optional[str], after: int) -> Iterator[Meta]:
        while True:
            with self._lock:
                found = self.store.metas(kind, after, METAS)
            yield from found
            if len(found) < METAS:
                return
            after = found[-1].id

    def _spanning(self, session: bytes, kind: str, first: int, last: int) -> Iterator[Chunk]:
        owner = self._owners.get(session)
        for id in self.store.spanning(session, kind, first, last, owner.width) if owner else ():
            chunk = self._chunk(id)
            if chunk is not None:
                yield chunk

    def _open(self, source: Any) -> dict[int, Any]:
        """The results of a section, or the arguments in a batch, by number."""
        found = self._opened.get(source)
        if found is None:
            if len(self._opened) >= OPENED:
                self._opened.clear()
            found = {r.seq: r for r in source.results()} if isinstance(source, Section) else read_arguments(source.frame)
            self._opened[source] = found
        return found

    def _extras(self, session: bytes, first: int, last: int) -> dict[int, dict[str, Any]]:
        """What was printed by tasks, and changed in their records."""
        found: dict[int, dict[str, Any]] = {}
        for chunk in self._spanning(session, PRINTED, first, last):
            for part in chunk.parts:
                if part.session == session:
                    for seq, name, text in json.loads(bytes(part.frame[0])):
                        found.setdefault(seq, {}).setdefault("." + name, []).append(text)
        for seq, packed in self.store.extras(session, first, last).items():
            found.setdefault(seq, {}).update(unpack_changes(packed))
        return found

    def _rows(self, chunk: Optional[Chunk], client_uuid: str = "") -> list[Row]:
        """The tasks of a chunk that are on record: of all clients or one."""
        rows: list[Row] = []
        about: dict[bytes, tuple[dict[wire.TaskKey, Section], set[int], dict[int, dict[str, Any]]]] = {}
        for session, masks in chunk.masks(BATCH).items() if chunk else ():
            if client_uuid not in ("", session.hex()):
                continue
            low, high = min(masks) * PLACES, (max(masks) + 1) * PLACES - 1
            results: dict[wire.TaskKey, Section] = {}
            for other in self._spanning(session, HAPPENED, low, high):
                results.update(other.where())
            about[session] = results, set(self.store.marked(session, low, high)), self._extras(session, low, high)
        for part in [part for part in chunk.parts if part.session in about] if chunk else ():
            results, marked, extras = about[part.session]
            for seq in sorted(part.seqs):
                key = (part.session, seq)
                section = results.get(key)
                if (self._is_unfinished(key) or (section is not None and seq not in marked)):
                    rows.append(Row(key, part, None, section, extras.get(seq, {}), self._open, self._place))
        return rows

    def _row(self, key: wire.TaskKey) -> Optional[Row]:
        """A task that is on record."""
        session, seq = key
        part = next((p for p in [c.where().get(key) for c in self._spanning(session, SUBMITTED, seq, seq)] if p), None)
        section = next((s for s in [c.where().get(key) for c in self._spanning(session, HAPPENED, seq, seq)] if s), None)
        if part is None or not (self._is_unfinished(key) or (section and not self.store.marked(session, seq, seq))):
            return None
        extra = self._extras(session, seq, seq).get(seq, {})
        return Row(key, part, None, section, extra, self._open, self._place)

    def _known(self, msg_id: str) -> Row:
        key = wire.task_key(msg_id)
        row = self._row(key)
        if row is not None:
            return row
        owner = self._owners.get(key[0])
        if owner is None or not 0 < key[1] < owner.end:
            raise NoRecord(f"the controller knows of no task {msg_id}")
        if owner.reason:
            raise RecordExpired(f"the record of task {msg_id} expired or was purged: {owner.reason}, which can be raised in "
                                "ipcontroller_config.py")
        raise RecordExpired(f"the record of task {msg_id} was purged")

    @contextlib.contextmanager
    def _asking(self) -> Iterator[None]:
        """A question, about what has been written: what goes wrong is said in a sentence."""
        if not self._lock.acquire(timeout=ANSWER_S):
            raise NoRecord(f"the records of tasks can't be read just now: {self._trouble or 'the store is busy'}")
        try:
            if self.failed:
                raise NoRecord(self.failed)
            yield
        except StoreError as e:
            raise NoRecord(f"the records of tasks can't be read just now: {e}") from None
        except (NoRecord, ValueError, TypeError) as e:
            if isinstance(e, json.JSONDecodeError):
                raise NoRecord(f"the records of tasks are damaged: {e}") from None
            raise
        except (ProtocolError, LookupError, struct.error) as e:
            raise NoRecord(f"the records of tasks are damaged: {type(e).__name__}: {e}") from None
        finally:
            self._lock.release()

    def _flush(self) -> None:
        """Wait until all that was told before is written."""
        target, deadline = self._told, time.monotonic() + ANSWER_S
        with self._progress:
            while self.keeps and self._writer is not None and self._done < target:
                self._hurry.set()
                self._work.set()
                if self._trouble or time.monotonic() > deadline:
                    why = self._trouble or f"what was told {ANSWER_S:g} s ago is not written yet"
                    raise NoRecord(f"the records of tasks can't be read just now: {why}")
                self._progress.wait(RETRY_S)
        if self.failed:
            raise NoRecord(self.failed)

    def get_record(self, msg_id: str) -> dict[str, Any]:
        """See TaskDB."""
        wire.task_key(msg_id)
        self._flush()
        with self._asking():
            row = self._known(msg_id)
            return {k: row(k) for k in KEYS}

    def find_records(self, query: Mapping[str, Any], keys: Optional[Iterable[str]] = None) -> list[dict[str, Any]]:
        """See TaskDB."""
        shown = shown_keys(keys)
        return list(self._find(query, lambda row: {k: row(k) for k in shown}))

    def get_history(self) -> list[str]:
        """See TaskDB."""
        return list(self._find({}, lambda row: wire.msg_id(row.key)))

    def _find(self, query: Mapping[str, Any], give: Callable[[Row], Any]) -> Iterator[Any]:
        """Something of each task that meets a query, in the order of submission. Between chunks the writer has its turn."""
        matches = compile_query(query)
        self._flush()
        named, session = named_tasks(query), query.get("client_uuid")
        wanted = None if named is None else set(named)
        if named is not None and len(named) <= FEW:
            with self._asking():
                rows = [row for row in map(self._row, named) if row is not None]
                rows.sort(key=_came)
                yield from [give(row) for row in rows if matches(row)]
            return
        with self._asking():
            if named is None:
                ids = [meta.id for meta in self._metas(SUBMITTED, self._floor - 1 if asks_for_unfinished(query) else -1)]
            else:
                ends: dict[bytes, list[int]] = {}
                for owner, seq in named:
                    ends.setdefault(owner, []).append(seq)
                ids = sorted({chunk.id for owner, seqs in ends.items()
                              for chunk in self._spanning(owner, SUBMITTED, min(seqs), max(seqs))})
        for id in ids:
            with self._asking():
                rows = self._rows(self._chunk(id), session if isinstance(session, str) else "")
                found = [give(row) for row in rows if (wanted is None or row.key in wanted) and matches(row)]
            yield from found

    # --- dropping

    def drop_record(self, msg_id: str) -> None:
        """See TaskDB."""
        wire.task_key(msg_id)
        self._flush()
        with self._asking():
            self._drop([self._known(msg_id).key])

    def drop_matching_records(self, query: Mapping[str, Any]) -> int:
        """See TaskDB."""
        keys = list(self._find(query, lambda row: row.key))
        with self._asking():
            self._drop([key for key in keys if self._row(key) is not None] if len(keys) < METAS else keys)
        return len(keys)

    def update_record(self, msg_id: str, changes: Mapping[str, Any]) -> None:
        """See TaskDB."""
        check_keys(changes)
        wire.task_key(msg_id)
        self._flush()
        with self._asking():
            key = self._known(msg_id).key
            before = self.store.extras(key[0], key[1], key[1]).get(key[1])
            change = Change()
            change.extras[key] = pack_changes({**(unpack_changes(before) if before else {}), **changes})
            self.store.commit(change)

    def _drop(self, keys: Iterable[wire.TaskKey], reason: str = "") -> None:
        """Forget tasks that are on record."""
        change = Change()
        gone: dict[bytes, Masks] = {}
        for session, seq in keys:
            masks = gone.setdefault(session, {})
            masks[seq // PLACES] = masks.get(seq // PLACES, 0) | 1 << seq % PLACES
        for session, masks in gone.items():
            self._drop_of(change, session, masks)
            if reason and self._owners[session].reason != reason:
                change.owners[session] = self._owners[session] = self._owners[session]._replace(reason=reason)
        self._raise_floor(change)
        self.store.commit(change)
        self._totals = None
        for id in change.dropped + change.hollowed:
            self._chunks.pop(id, None)
        self._opened.clear()

    def _drop_of(self, change: Change, session: bytes, gone: Masks) -> None:
        low, high = min(gone) * PLACES, (max(gone) + 1) * PLACES - 1
        kept = dict(gone)  # tasks that need a mark
        for kind in KINDS:
            for chunk in list(self._spanning(session, kind, low, high)):
                meta = change.metas.get(chunk.id) or self.store.meta(chunk.id)
                n = sum(count(bits & gone.get(number, 0)) for part in chunk.parts if part.session == session and
                        part.kind == COUNTED[kind] for number, bits in masks_of(part.seqs))
                if meta is None or not n:
                    continue
                change.metas[chunk.id] = meta = meta._replace(live=meta.live - n)
                if meta.live <= 0:
                    del change.metas[chunk.id]
                    whole = kind == HAPPENED and chunk.id >= self._floor  # the next run must see what has ended
                    (change.hollowed if whole else change.dropped).append(chunk.id)
                    if kind != PRINTED:
                        self._unmark(change, chunk, COUNTED[kind], session, kept)
        change.marks += [(session, seq) for seq in numbers_in(kept)]
        unfinished = self._unfinished.get(session, {})
        self._forget_bits(session, {n: bits & unfinished[n] for n, bits in gone.items() if n in unfinished})
        wanted = set(numbers_in(gone)) if gone else set()
        change.extras.update({(session, seq): None for seq in self.store.extras(session, low, high) if seq in wanted})

    def _unmark(self, change: Change, chunk: Chunk, kind: str, session: bytes, kept: Masks) -> None:
        """A chunk goes: its tasks need no marks."""
        for owner, masks in chunk.masks(kind).items():
            if owner == session:
                for number, bits in masks.items():
                    kept[number] = kept.get(number, 0) & ~bits
            low, high = min(masks) * PLACES, (max(masks) + 1) * PLACES - 1
            for seq in self.store.marked(owner, low, high):
                if masks.get(seq // PLACES, 0) >> seq % PLACES & 1:
                    change.unmarked.append((owner, seq))

    def _expire(self) -> None:
        """Drop what exceeds the limits: the oldest results, with their tasks."""
        if not (self.record_limit or self.size_limit or self.record_age):
            return
        name, too_old = self.store.name, self._clock() - self.record_age if self.record_age else 0.0
        while True:
            if self._totals is None:
                self._totals = self.store.totals()
            results, size = self._totals.get(HAPPENED, (0, 0, 0))[1], sum(t[2] for t in self._totals.values())
            if not (self.record_age or 0 < self.record_limit < results or 0 < self.size_limit < size):
                return
            oldest = next((m for m in self._metas(HAPPENED, self._dead) if m.live > 0), None)
            if oldest is None:
                return
            self._dead, n = oldest.id - 1, oldest.live
            if self.record_limit and results > self.record_limit:
                reason = f"c.{name}.record_limit is {self.record_limit}"
                if results - n < self.record_limit * KEPT_AT_LEAST:
                    n = results - self.record_limit
            elif self.size_limit and size > self.size_limit:
                reason = f"c.{name}.size_limit is {self.size_limit} bytes"
            elif oldest.when < too_old:
                reason = f"c.{name}.record_age is {self.record_age:g} s"
            else:
                return
            if not self._drop_results(oldest.id, n, reason):
                return

    def _drop_results(self, id: int, n: int, reason: str) -> int:
        """Drop the first n tasks whose results a chunk has; returns how many there were."""
        chunk = self._chunk(id)
        keys: list[wire.TaskKey] = []
        for part in chunk.parts if chunk else ():
            if part.kind == SECTION and len(keys) < n:
                marked = set(self.store.marked(part.session, min(part.seqs), max(part.seqs)))
                keys += [(part.session, seq) for seq in part.seqs if seq not in marked][: n - len(keys)]
        self._drop(keys, reason)
        return len(keys)

    # --- looking after it

    def stats(self) -> dict[str, Any]:
        """See TaskDB."""
        self._flush()
        with self._asking():
            totals = self.store.totals()
            pending = sum(count(bits) for masks in self._unfinished.values() for bits in masks.values())
            return {"database": self.store.name, **self.store.stats(), "finished": totals.get(HAPPENED, (0, 0, 0))[1],
                    "unfinished": pending, "clients": len(self._owners), "bytes": sum(t[2] for t in totals.values()),
                    "record_limit": self.record_limit, "size_limit": self.size_limit, "record_age": self.record_age}

    def vacuum(self) -> dict[str, Any]:
        """See TaskDB."""
        self._flush()
        with self._asking():
            self.store.vacuum()
        return self.stats()


def _came(row: Row) -> tuple[int, int, int]:
    """What orders tasks by submission."""
    part: Any = row.origin
    return part.chunk.id, part.chunk.parts.index(part), row.key[1]
