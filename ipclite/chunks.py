"""What a journal of tasks consists of, and what it asks of the store that keeps it.

    parts (a batch, a section, an assignment, some output) ──Draft──► a chunk: head and data ──► Store
                                                           ◄──Chunk──

A *part* is a batch or a section as it came, or who got which tasks, or what they printed. The parts of one commit go
into *chunks*, one for each kind: what was submitted, what happened to it, what was printed. A chunk is a head (JSON: whose
parts, which numbers) and its data (the frames, one after the other). A *span* says which numbers of a session a chunk has
something about. So a task costs no row, and is found by a range. Sets of tasks are bits in large integers (*masks*).

Rules that hold here: a head is read without the data; nothing in a frame is looked at when it is written.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any, Dict, Iterable, Iterator, Mapping, NamedTuple, Optional, Protocol, Sequence, Union

from . import wire
from .db import Function, Section
from .errors import IPythonError

PLACES = 4096  # bits that are kept together
SUBMITTED, HAPPENED, PRINTED = KINDS = ("B", "R", "O")  # kinds of chunks
BATCH, SECTION, SENT, OUTPUT = "b", "r", "a", "o"  # kinds of parts
COUNTED = {SUBMITTED: BATCH, HAPPENED: SECTION, PRINTED: OUTPUT}  # kind of a chunk -> of the parts that keep it alive

Masks = Dict[int, int]  # number of a block of PLACES tasks -> a bit for each


class Reader(Protocol):
    """Whoever can get what a chunk does not hold itself."""

    def read(self, chunk: int) -> bytes:
        """The data of a chunk."""

    def function(self, session: bytes, digest: bytes) -> Optional[Function]:
        """A function of a session."""


class StoreError(IPythonError):
    """The store can't do what it is asked. `passing`: it may be able to at the next try."""

    def __init__(self, message: str, passing: bool = False):
        super().__init__(message)
        self.passing = passing


class Span(NamedTuple):
    """A chunk has something about tasks of a session from `first` to `last`."""

    session: bytes
    first: int
    last: int


class Meta(NamedTuple):
    """What is known of a chunk without reading it.

    Attributes:
        live: how much it has about tasks on record: of each once per part. It is dropped when nothing is left.
        size: bytes.
        when: s since the epoch.
    """

    id: int
    kind: str
    live: int
    size: int
    when: float


class Owner(NamedTuple):
    """A session: its cluster, the number after that of its newest task, and why records of it were dropped.

    `width`: a span of it is not wider.
    """

    cluster: str = ""
    end: int = 0
    width: int = 0
    reason: str = ""


class Change:
    """What one commit does, all or nothing.

    Attributes:
        chunks: new ones: (meta, head, frames of the data, spans).
        metas: chunks about which less is on record.
        hollowed: chunks that lose their data and spans, but not their head.
        dropped: chunks that go.
        marks: tasks that are dropped while chunks about them stay.
        unmarked: tasks whose mark is not needed any more.
        extras: changes of records; None if the record goes.
    """

    def __init__(self) -> None:
        self.chunks: list[tuple[Meta, bytes, list[Any], list[Span]]] = []
        self.functions: dict[tuple[bytes, bytes], list[Any]] = {}
        self.owners: dict[bytes, Owner] = {}
        self.metas: dict[int, Meta] = {}
        self.hollowed: list[int] = []
        self.dropped: list[int] = []
        self.marks: list[wire.TaskKey] = []
        self.unmarked: list[wire.TaskKey] = []
        self.extras: dict[wire.TaskKey, Optional[bytes]] = {}
        self.floor: Optional[int] = None


class State(NamedTuple):
    """What a store knows when it is opened. No chunk of tasks that is below `floor` has an unfinished one."""

    next_id: int
    floor: int
    owners: dict[bytes, Owner]


class Store(Protocol):
    """Where a journal is kept. Methods are called by one thread at a time, and raise `StoreError`."""

    name: str  # as in "c.<name>.record_limit"

    def open(self, profile_dir: Path, cluster_id: str) -> State:
        """Take hold of it.

        Raises:
            UserError: it can't be used.
        """

    def commit(self, change: Change) -> None:
        """Do all of it, or nothing. Chunks of what happened that are below the floor and of which nothing is on record go,
        too."""

    def metas(self, kind: Optional[str], after: int, limit: int) -> list[Meta]:
        """The next chunks of a kind, or of all, with larger ids, in their order."""

    def totals(self) -> dict[str, tuple[int, int, int]]:
        """{kind: (chunks, sum of `live`, bytes)}"""

    def meta(self, chunk: int) -> Optional[Meta]:
        """None if there is no such chunk."""

    def head(self, chunk: int) -> Optional[bytes]:
        """None if there is no such chunk."""

    def data(self, chunk: int) -> bytes:
        """The frames of a chunk, one after the other."""

    def spanning(self, session: bytes, kind: str, first: int, last: int, width: int) -> list[int]:
        """The chunks of a kind that have a span over one of these tasks, in order. No span is wider than `width`."""

    def marked(self, session: bytes, first: int, last: int) -> list[int]:
        """Which of these tasks are marked."""

    def extras(self, session: bytes, first: int, last: int) -> dict[int, bytes]:
        """What was changed in the records of these tasks."""

    def function(self, session: bytes, digest: bytes) -> Optional[list[Any]]:
        """The frames of a function."""

    def beat(self) -> None:
        """Say that we are there, to whom else may want the store."""

    def stats(self) -> dict[str, Any]:
        """Where it is, and what there is to say of it."""

    def vacuum(self) -> None:
        """Give back the room of what was dropped."""

    def close(self) -> None:
        """Let go of it."""


# --- numbers


def masks_of(seqs: Sequence[int]) -> Iterator[tuple[int, int]]:
    """(block, bits) of the tasks with these numbers."""
    for number, a, b in wire.slots(seqs, PLACES):
        yield number, ((1 << (b - a)) - 1) << a


def numbers_in(masks: Mapping[int, int]) -> Iterator[int]:
    """The inverse: numbers of tasks, in order."""
    for number in sorted(masks):
        bits, base = masks[number], number * PLACES
        while bits:
            low = bits & -bits
            yield base + low.bit_length() - 1
            bits ^= low


def pack_numbers(seqs: Sequence[int]) -> list[Any]:
    """Numbers as they are in a head: [[first, count]] if they are in a row, else each."""
    first, n = seqs[0], len(seqs)
    return [[first, n]] if type(seqs) is range or seqs == list(range(first, first + n)) else list(seqs)


def unpack_numbers(packed: list[Any]) -> Sequence[int]:
    """The inverse."""
    return range(packed[0][0], sum(packed[0])) if packed and isinstance(packed[0], list) else packed


def count(bits: int) -> int:
    """How many are set."""
    return bin(bits).count("1")


# --- chunks


class Part:
    """A batch, a section, an assignment or some output in a chunk that was read; a batch is an `Origin` as well.

    Attributes:
        seqs: the numbers that count; the frames may hold more.
        about: what else the head says: of a batch when it came, its fan, first number, spec and function; of a section
            where it ran and when it came; of an assignment the engine and [[numbers, attempt], ...].
    """

    __slots__ = ("kind", "session", "seqs", "about", "chunk", "_at", "_lengths", "spec", "first", "fan", "when")

    def __init__(self, chunk: Chunk, at: int, row: list[Any]):
        self.kind, self.session, self.seqs, self._lengths = row[0], bytes.fromhex(row[1]), unpack_numbers(row[2]), row[3]
        self.about, self.chunk, self._at = row[4:], chunk, at
        if self.kind == BATCH:
            self.when, self.fan, self.first, spec, _ = self.about
            self.spec: bytes = spec.encode(errors="surrogateescape")

    @property
    def frame(self) -> list[memoryview]:
        """The frames, as they travelled."""
        data, at, frames = memoryview(self.chunk.data()), self._at, []
        for length in self._lengths:
            frames.append(data[at : at + length])
            at += length
        return frames

    @property
    def function(self) -> Optional[Function]:
        """What the tasks of a batch call."""
        digest = bytes.fromhex(self.about[4])
        return self.chunk.reader.function(self.session, digest) if digest else None

    def section(self) -> Section:
        """What a section was when it came."""
        engine_id, engine_uuid, received = self.about
        return Section(self.session, engine_id, engine_uuid, received, self.seqs, self.frame)


class Chunk:
    """A chunk that was read: its parts, and which of them has what."""

    def __init__(self, reader: Reader, id: int, head: bytes):
        self.reader, self.id = reader, id
        self.parts: list[Part] = []
        self._data: Optional[bytes] = None
        self._where: Optional[dict[wire.TaskKey, Union[Part, Section]]] = None
        size = 0
        for row in json.loads(head):
            self.parts.append(Part(self, size, row))
            size += sum(row[3])
        self.size = size + len(head)

    def data(self) -> bytes:
        """The frames of all parts."""
        if self._data is None:
            self._data = self.reader.read(self.id)
        return self._data

    def where(self) -> dict[wire.TaskKey, Any]:
        """The batch (a `Part`) or section of each task."""
        if self._where is None:
            self._where = {}
            for part in self.parts:
                if part.kind in (BATCH, SECTION):
                    source = part if part.kind == BATCH else part.section()
                    self._where.update(dict.fromkeys([(part.session, seq) for seq in part.seqs], source))
        return self._where

    def masks(self, kind: str) -> dict[bytes, Masks]:
        """The tasks that parts of a kind have, by session."""
        found: dict[bytes, Masks] = {}
        for part in self.parts:
            if part.kind == kind:
                masks = found.setdefault(part.session, {})
                for number, bits in masks_of(part.seqs):
                    masks[number] = masks.get(number, 0) | bits
        return found


class Draft:
    """A chunk that is being made."""

    def __init__(self, kind: str):
        self.kind, self.size, self.live = kind, 0, 0
        self.rows: list[Any] = []
        self.frames: list[Any] = []
        self.ends: dict[bytes, tuple[int, int]] = {}

    def add(self, kind: str, session: bytes, seqs: Sequence[int], frames: Sequence[Any], *about: Any) -> None:
        """Append a part."""
        lengths = [len(f) if type(f) is bytes else memoryview(f).nbytes for f in frames]
        self.rows.append([kind, session.hex(), pack_numbers(seqs) if seqs else [], lengths, *about])
        self.frames += frames
        self.size += sum(lengths)
        if seqs:
            self.live += len(seqs)
            low, high = (seqs[0], seqs[-1]) if type(seqs) is range else (min(seqs), max(seqs))
            before = self.ends.get(session, (low, high))
            self.ends[session] = (min(low, before[0]), max(high, before[1]))

    def into(self, change: Change, id: int, when: float) -> int:
        """Put it into a change, if there is anything; returns the next id."""
        if not self.rows:
            return id
        head = json.dumps(self.rows, separators=(",", ":")).encode()
        spans = [Span(session, *ends) for session, ends in self.ends.items()]
        change.chunks.append((Meta(id, self.kind, self.live, self.size + len(head), when), head, self.frames, spans))
        return id + 1


class Seen:
    """Which tasks of a session have been submitted. `full`: so many blocks from the first hold no other."""

    __slots__ = ("full", "masks")
    WHOLE = (1 << PLACES) - 1

    def __init__(self) -> None:
        self.full = 0
        self.masks: Masks = {0: 1}  # there is no task 0

    def add(self, number: int, bits: int) -> int:
        """Note tasks; returns those of them that are new."""
        if number < self.full:
            return 0
        before = self.masks.get(number, 0)
        self.masks[number] = before | bits
        while self.masks.get(self.full) == self.WHOLE:
            del self.masks[self.full]
            self.full += 1
        return bits & ~before


def pack_changes(changes: Mapping[str, Any]) -> bytes:
    """Keys of a record, as the store keeps them."""
    frames = [bytes(frame) for frame in wire.encode_query(wire.QUERY, dict(changes))[1:]]
    lengths = json.dumps([len(frame) for frame in frames]).encode()
    return b"".join([struct.pack("<I", len(lengths)), lengths, *frames])


def unpack_changes(packed: bytes) -> dict[str, Any]:
    """The inverse."""
    at = 4 + struct.unpack_from("<I", packed)[0]
    frames: list[Any] = [b""]
    for length in json.loads(packed[4:at]):
        frames.append(packed[at : at + length])
        at += length
    return wire.decode_query(frames)


def pieces(frames: Iterable[Any], largest: int) -> Iterator[bytes]:
    """The frames one after the other, cut into pieces of a size; none if they are empty."""
    data = b"".join(frames)
    for at in range(0, len(data), largest):
        yield data if len(data) <= largest else data[at : at + largest]
