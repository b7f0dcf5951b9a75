"""Task records: the contract of databases, and the language they are asked in.

    submitted, assigned, finished, output ──► TaskDB ──► get_record, find_records, get_history
                                           DictDB │ NoDB

The controller tells the database of tasks in batches, as they travel, so that a record need not be made before somebody
asks for it. Records are dicts with the keys of `KEYS`; payloads in them are opaque pieces of bytes.

Rules that hold here: a query is compiled once, and what it does not understand is an error; a database that keeps
nothing says so when it is asked; one that has dropped a record says that, and why.
"""

from __future__ import annotations

from datetime import datetime, timezone
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Callable, Iterable, Iterator, Mapping, NamedTuple, Optional, Protocol, Sequence, Union

from . import wire
from .errors import NoRecord

KEYS = ("msg_id", "client_uuid", "engine_uuid", "engine_id", "submitted", "started", "completed", "received",
        "resubmitted", "queue", "label", "status", "error", "ename", "evalue", "attempt", "op", "fn", "targets",
        "stdout", "stderr", "header", "metadata", "result_header", "buffers", "result_buffers", "function")
DATES = ("submitted", "started", "completed", "received")
BUFFERS = ("buffers", "result_buffers", "function")  # a query gives them only when they are asked for by name

Condition = Callable[[Any], bool]
Get = Callable[[str], Any]


class Function:
    """The bytes of a function, shared by the tasks that call it. `counted`: whether their size was added up."""

    __slots__ = ("frames", "size", "counted")

    def __init__(self, frames: list[Any]):
        self.frames, self.size, self.counted = frames, size_of(frames), False


class Batch:
    """Tasks of one client that came together and have the same spec.

    Attributes:
        session: the client's.
        spec: JSON, as it travelled.
        seqs: the number of each.
        payloads: the arguments of each; None if they are in `frame`, the section as it travelled.
        when: s since the epoch.
        function: what they call; None if they need none.
        fan: of so many in turn each goes to one of the spec's targets, if that is more than 1.
    """

    __slots__ = ("session", "spec", "seqs", "payloads", "when", "function", "fan", "frame")

    def __init__(self, session: bytes, spec: bytes, seqs: list[int], payloads: Optional[list[wire.Payload]],
                 when: float, function: Optional[Function] = None, fan: int = 1, frame: Optional[bytes] = None):
        self.session, self.spec, self.seqs, self.payloads = session, spec, seqs, payloads
        self.when, self.function, self.fan, self.frame = when, function, fan, frame


class Section:
    """Results of tasks of one client that came together from one engine.

    Attributes:
        engine_id, engine_uuid: where they ran; `wire.NO_ENGINE` and "" if no engine made the result.
        received: s since the epoch.
        seqs: the numbers of the tasks.
        frames: as they travelled.
        size, left: used by DictDB: bytes that go with it, rows that still refer to it.
    """

    __slots__ = ("session", "engine_id", "engine_uuid", "received", "seqs", "frames", "size", "left")

    def __init__(self, session: bytes, engine_id: int, engine_uuid: str, received: float, seqs: Sequence[int],
                 frames: Sequence[Any]):
        self.session, self.engine_id, self.engine_uuid, self.received = session, engine_id, engine_uuid, received
        self.seqs, self.frames, self.size, self.left = seqs, frames, 0.0, 0

    def results(self) -> Iterator[wire.Result]:
        """The results, decoded."""
        for _, _, records, section in wire.result_sections([b"", *self.frames]):
            yield from wire.section_results(records, section)


class Unfinished(NamedTuple):
    """A task of a former run that has not ended.

    Attributes:
        spec: JSON, of this task alone.
        attempt: the highest that is known to have been sent to an engine; 0 if none.
        engine_uuid: the engine that it was sent to last; "" if none.
        digest: of the function; b"" if it needs none.
    """

    key: wire.TaskKey
    spec: bytes
    payload: wire.Payload
    attempt: int
    engine_uuid: str
    digest: bytes


class TaskDB(Protocol):
    """What the controller asks of a database. Times are s since the epoch; task ids are text, as users see them.

    Attributes:
        keeps: False if it keeps nothing, so that nobody needs to prepare what it is told.
        persists: whether records outlive the controller. Becomes False with `failed`.
        waits: whether questions may take long, so that they are not to be asked in the controller's thread.
        wake_fd: readable when `collect` has something, or `failed` has changed; None if that never happens.
        failed: "" or, once it had to give up keeping records, a sentence that says why.
    """

    keeps: bool
    persists: bool
    waits: bool
    wake_fd: Optional[int]
    failed: str

    def open(self, profile_dir: Path, cluster_id: str) -> None:
        """Begin: the controller is about to serve this cluster. Nothing else is called before.

        Raises:
            UserError: the store can't be used.
        """

    def collect(self) -> list[Union[Batch, Section]]:
        """The batches and sections that have become safe since the last call, in the order in which they were handed in."""

    def unfinished(self) -> Iterator[Unfinished]:
        """The unfinished tasks of former runs of this cluster, in the order of submission. They stay on record: they are
        not handed to `submitted` again."""

    def function(self, session: bytes, digest: bytes) -> Optional[Function]:
        """A function that tasks of former runs call."""

    def submitted(self, batch: Batch) -> None:
        """Tasks have come. Those that are on record already are left as they are."""

    def assigned(self, session: bytes, engine_id: int, engine_uuid: str, tasks: Sequence[tuple[int, int, Any]]) -> None:
        """(number, attempt, payload) of tasks that were sent to an engine."""

    def finished(self, section: Section) -> None:
        """Results have come, and count."""

    def output(self, session: bytes, pieces: list[Any]) -> None:
        """Tasks have printed: [number, "stdout" or "stderr", text] of each piece."""

    def get_record(self, msg_id: str) -> dict[str, Any]:
        """The record of a task.

        Raises:
            ValueError: not a task id.
            RecordExpired: there was one, and it was dropped.
            NoRecord: there never was one.
        """

    def find_records(self, query: Mapping[str, Any], keys: Optional[Iterable[str]] = None) -> list[dict[str, Any]]:
        """The records that meet a query, oldest first, with the keys asked for and `msg_id`; all but BUFFERS if None.

        Raises:
            ValueError: the query or a key is none.
        """

    def get_history(self) -> list[str]:
        """The ids of all tasks on record, in the order of submission."""

    def drop_record(self, msg_id: str) -> None:
        """Forget a task; raises like `get_record`."""

    def drop_matching_records(self, query: Mapping[str, Any]) -> int:
        """Forget the tasks that meet a query; returns how many."""

    def update_record(self, msg_id: str, changes: Mapping[str, Any]) -> None:
        """Set keys of a record; raises like `get_record`, and ValueError for an unknown key."""

    def stats(self) -> dict[str, Any]:
        """Which database it is, where, how many tasks are on record, the limits."""

    def vacuum(self) -> dict[str, Any]:
        """Give back the room of what was dropped; returns `stats`."""

    def close(self) -> None:
        """Nothing will be asked any more."""


# --- queries


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _comparable(a: Any, b: Any) -> bool:
    return (_is_number(a) and _is_number(b)) or any(isinstance(a, t) and isinstance(b, t) for t in (str, datetime))


def _order(compare: Callable[[Any, Any], bool]) -> Callable[[Any, str], Condition]:
    def make(operand: Any, name: str) -> Condition:
        _require(_comparable(operand, operand), name, "a number, a text or a date", operand)
        return lambda value: _comparable(value, operand) and compare(value, operand)
    return make


def _require(holds: bool, name: str, wanted: str, operand: Any) -> None:
    if not holds:
        raise ValueError(f"{name} takes {wanted}, not {_short(operand)}")


def _list(operand: Any, name: str) -> list[Any]:
    _require(isinstance(operand, (list, tuple, set, frozenset)), name, "a list", operand)
    return list(operand)


def _in(operand: Any, name: str) -> Condition:
    wanted = _list(operand, name)
    texts = frozenset(w for w in wanted if type(w) is str)  # often thousands of ids
    others = [w for w in wanted if type(w) is not str]
    return lambda value: value in texts if type(value) is str else value in others


def _nin(operand: Any, name: str) -> Condition:
    unwanted = _in(operand, name)
    return lambda value: not unwanted(value)


def _all(operand: Any, name: str) -> Condition:
    wanted = _list(operand, name)

    def holds(value: Any) -> bool:
        held = value if isinstance(value, (list, tuple)) else [value]
        return bool(wanted) and all(w in held for w in wanted)

    return holds


def _glob(operand: Any, name: str) -> Condition:
    _require(isinstance(operand, str), name, "a text with * and ?", operand)
    return lambda value: isinstance(value, str) and fnmatchcase(value, operand)


def _mod(operand: Any, name: str) -> Condition:
    two = _list(operand, name)
    _require(len(two) == 2 and all(map(_is_number, two)) and two[0] != 0, name, "[divisor, remainder]", operand)
    return lambda value: _is_number(value) and value % two[0] == two[1]


def _exists(operand: Any, name: str) -> Condition:
    _require(isinstance(operand, bool), name, "True or False", operand)
    return lambda value: (value is not None) is operand


OPERATORS: dict[str, Callable[[Any, str], Condition]] = {
    "$eq": lambda operand, name: lambda value: bool(value == operand),
    "$ne": lambda operand, name: lambda value: bool(value != operand),
    "$in": _in,
    "$nin": _nin,
    "$lt": _order(lambda a, b: bool(a < b)),
    "$lte": _order(lambda a, b: bool(a <= b)),
    "$le": _order(lambda a, b: bool(a <= b)),
    "$gt": _order(lambda a, b: bool(a > b)),
    "$gte": _order(lambda a, b: bool(a >= b)),
    "$glob": _glob,
    "$all": _all,
    "$mod": _mod,
    "$exists": _exists,
}


def compile_query(query: Mapping[str, Any], known: Optional[Iterable[str]] = None) -> Callable[[Get], bool]:
    """Make a predicate of a query: {key: value or {operator: operand, ...}, ...}; all conditions must hold.

    A plain value stands for equality, None for "not set". An order holds between two numbers, two texts or two dates
    only, and of None nothing is greater or less. Operands of `DATES` may be ISO text or datetimes; without a time zone
    they are in the controller's.

    Args:
        known: the keys that there are; by default those of records.

    Returns:
        A function that takes a function from key to value.

    Raises:
        ValueError: it is not a query; names the key or operator.
    """
    if not isinstance(query, Mapping):
        raise ValueError(f"a query is a dict, not {_short(query)}")
    known = KEYS if known is None else tuple(known)
    conditions: list[tuple[str, Condition]] = []
    for key, wanted in query.items():
        check_keys([key], known)
        parts = wanted if isinstance(wanted, Mapping) else ()
        operators = [part for part in parts if isinstance(part, str) and part.startswith("$")]
        if operators and len(operators) < len(parts):
            raise ValueError(f"the condition for {key!r} mixes operators and values: {_short(wanted)}")
        for operator, operand in wanted.items() if operators else [("$eq", wanted)]:
            if operator not in OPERATORS:
                raise ValueError(f"unknown operator {operator!r} for {key!r}; there are {', '.join(OPERATORS)}")
            if key in DATES and operator != "$exists":
                several = operator in ("$in", "$nin", "$all")
                operand = [_date(o, key) for o in _list(operand, operator)] if several else _date(operand, key)
            conditions.append((key, OPERATORS[operator](operand, operator)))
    return lambda get: all(condition(get(key)) for key, condition in conditions)


def _date(operand: Any, key: str) -> Any:
    if isinstance(operand, str):
        try:
            operand = datetime.fromisoformat(operand[:-1] + "+00:00" if operand.endswith("Z") else operand)
        except ValueError:
            raise ValueError(f"{_short(operand)} is not a date like 2030-12-31T23:59:59+00:00, which {key!r} is "
                             "compared with") from None
    if operand is not None and not isinstance(operand, datetime):
        raise ValueError(f"{key!r} is compared with dates (datetime or ISO text), not {_short(operand)}")
    return operand.astimezone(timezone.utc) if operand is not None and operand.tzinfo is None else operand


def check_keys(keys: Iterable[Any], known: Optional[Iterable[str]] = None) -> list[str]:
    """The keys as a list, if records have them.

    Raises:
        ValueError: they do not.
    """
    known = KEYS if known is None else known
    if isinstance(keys, (str, bytes)) or not isinstance(keys, Iterable):
        raise ValueError(f"keys are a list of names, not {_short(keys)}")
    wanted = list(keys)
    for key in wanted:
        if not isinstance(key, str) or key not in known:
            raise ValueError(f"records have no key {_short(key)}; they have {', '.join(known)}")
    return wanted


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else text[:97] + "..."


def size_of(payload: Any) -> int:
    """Bytes of a payload, or of a list of frames."""
    return len(payload) if type(payload) is bytes else sum([memoryview(piece).nbytes for piece in payload])


class Volatile:
    """What every database says of lasting whose records end with the controller."""

    persists = False
    waits = False
    wake_fd: Optional[int] = None
    failed = ""

    def open(self, profile_dir: Path, cluster_id: str) -> None:
        """There is nothing to prepare."""

    def collect(self) -> list[Union[Batch, Section]]:
        """Nothing ever becomes safe."""
        return []

    def unfinished(self) -> Iterator[Unfinished]:
        """Nothing is left of former runs."""
        return iter(())

    def function(self, session: bytes, digest: bytes) -> Optional[Function]:
        """Nothing is left of former runs."""
        return None

    def stats(self) -> dict[str, Any]:
        """See TaskDB."""
        return {"database": type(self).__name__}

    def vacuum(self) -> dict[str, Any]:
        """There is nothing to give back."""
        return self.stats()


class NoDB(Volatile):
    """Keeps nothing, and says so when asked."""

    keeps = False

    def submitted(self, batch: Batch) -> None:
        """See TaskDB."""

    def assigned(self, session: bytes, engine_id: int, engine_uuid: str, tasks: Sequence[tuple[int, int, Any]]) -> None:
        """See TaskDB."""

    def finished(self, section: Section) -> None:
        """See TaskDB."""

    def output(self, session: bytes, pieces: list[Any]) -> None:
        """See TaskDB."""

    def get_record(self, msg_id: str) -> dict[str, Any]:
        """Raises NoRecord."""
        wire.task_key(msg_id)
        raise NoRecord(f"this controller keeps no records, so it does not know whether there was a task {msg_id}: "
                       "start it with --dictdb")

    def find_records(self, query: Mapping[str, Any], keys: Optional[Iterable[str]] = None) -> list[dict[str, Any]]:
        """Raises NoRecord, or ValueError like others."""
        compile_query(query)
        check_keys(keys or ())
        raise NoRecord("this controller keeps no records: start it with --dictdb")

    def get_history(self) -> list[str]:
        """Raises NoRecord."""
        raise NoRecord("this controller keeps no records: start it with --dictdb")

    def drop_record(self, msg_id: str) -> None:
        """There is nothing to forget."""
        wire.task_key(msg_id)

    def drop_matching_records(self, query: Mapping[str, Any]) -> int:
        """There is nothing to forget."""
        compile_query(query)
        return 0

    def update_record(self, msg_id: str, changes: Mapping[str, Any]) -> None:
        """Raises NoRecord."""
        self.get_record(msg_id)

    def close(self) -> None:
        """See TaskDB."""
