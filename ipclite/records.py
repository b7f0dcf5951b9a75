"""What a record of a task consists of: each key is worked out of what travelled, when somebody asks for it.

    what a task came with (Origin), what brought its result (Section), what was noted besides ──► Row ──► a record

Rules that hold here: nothing is decoded before it is asked for; who keeps these things, and how, is not known here.
"""

from __future__ import annotations

import json
from datetime import datetime, timezone
from typing import Any, Callable, Iterable, Mapping, Optional, Protocol, Sequence, Tuple

from . import wire
from .db import BUFFERS, KEYS, Function, Section, check_keys
from .errors import ProtocolError

OUTPUT_MAX = 1 << 20  # characters of a task's output on record

# Of an unfinished task: the engine's id and uuid and the attempt; None if it is on none.
Place = Callable[[wire.TaskKey], Optional[Tuple[int, str, int]]]


class Origin(Protocol):
    """What tasks that came together have in common: see `db.Batch`. `first` is the number of the first of them."""

    spec: bytes
    first: int
    fan: int
    when: float

    @property
    def function(self) -> Optional[Function]:
        """What the tasks call."""

    @property
    def frame(self) -> Any:
        """What holds the arguments of all, or None."""


def read_arguments(frames: Sequence[Any]) -> dict[int, wire.Payload]:
    """The arguments of each task of a section as it travelled, by number."""
    return {seq + i: payload for _, _, tasks in wire.decode_tasks([b"", *frames])
            for seq, fan_out, payload in tasks for i in range(max(1, fan_out))}


def read_spec(raw: bytes, fan: int, position: int) -> dict[str, Any]:
    """The spec of the task at a position of a batch."""
    spec: dict[str, Any] = json.loads(raw)
    if fan > 1:
        spec["targets"] = [spec["targets"][position % fan]]
    return spec


class Row:
    """One task while its record is made: a method or attribute per key, worked out on demand.

    Args:
        payload: the arguments, unless they are in `origin.frame`.
        section: what brought the result; None if nothing has.
        extra: keys that were changed, and pieces of output under ".stdout" and ".stderr".
        opened: gives the results of a section, or the arguments in an origin, by number.
    """

    def __init__(self, key: wire.TaskKey, origin: Origin, payload: Any, section: Optional[Section], extra: Mapping[str, Any],
                 opened: Callable[[Any], Mapping[int, Any]], place: Place):
        self.key, self.origin, self._payload, self.extra = key, origin, payload, extra
        self._spec: Optional[dict[str, Any]] = None
        self.section, self._place = section, place
        self._opened = opened

    def __call__(self, key: str) -> Any:
        return self.extra[key] if key in self.extra else FIELDS[key](self)

    @property
    def result(self) -> Optional[wire.Result]:
        """What came back; None if nothing has."""
        return None if self.section is None else self._opened(self.section)[self.key[1]]

    @property
    def payload(self) -> wire.Payload:
        """The arguments."""
        payload: wire.Payload = self._payload if self.origin.frame is None else self._opened(self.origin)[self.key[1]]
        return payload

    @property
    def spec(self) -> dict[str, Any]:
        """The spec of this one task."""
        if self._spec is None:
            self._spec = read_spec(self.origin.spec, self.origin.fan, self.key[1] - self.origin.first)
        return self._spec

    @property
    def failure(self) -> dict[str, Any]:
        """What is known of its error; {} if there is none."""
        result = self.result
        if result is None or result.status == wire.OK:
            return {}
        try:
            return wire.decode_error(result.payload)[0]
        except ProtocolError as e:
            return {"ename": "ProtocolError", "evalue": str(e)}

    @property
    def attempt(self) -> Optional[int]:
        """Of which execution it is or was."""
        result = self.result
        return self.place[2] if result is None else result.attempt

    @property
    def place(self) -> tuple[Optional[int], Optional[str], Optional[int]]:
        """(engine's id, its uuid, attempt) as far as they are known."""
        if self.section is None:
            return self._place(self.key) or (None, None, None)
        ran = self.section.engine_id != wire.NO_ENGINE
        return (self.section.engine_id, self.section.engine_uuid, None) if ran else (None, None, None)

    def error(self) -> Optional[str]:
        """Name and message of its error."""
        info = self.failure
        return f"{info.get('ename')}: {info.get('evalue')}" if info else None

    def status(self) -> str:
        """"ok", "error" or "pending"."""
        result = self.result
        return "pending" if result is None else "error" if result.status else "ok"

    def finished(self, what: Callable[[wire.Result], Any]) -> Any:
        """Something about the result, if there is one."""
        result = self.result
        return None if result is None else what(result)

    def printed(self, name: str) -> str:
        """What it wrote to a stream."""
        return "".join(self.extra.get("." + name, ()))

    def header(self) -> dict[str, Any]:
        """As messages of IPython Parallel have it."""
        spec = self.spec
        return {"msg_id": wire.msg_id(self.key), "msg_type": f"{spec.get('op')}_request", "session": self.key[0].hex(),
                "date": _when(self.origin.when)}

    def result_header(self) -> Any:
        """The same of its reply."""
        return self.finished(lambda r: {"status": self.status(), "engine_id": self("engine_id"),
                                        "started": _when(r.started), "date": _when(r.started + r.duration)})


FIELDS: dict[str, Callable[[Row], Any]] = {
    "msg_id": lambda row: wire.msg_id(row.key),
    "client_uuid": lambda row: row.key[0].hex(),
    "engine_uuid": lambda row: row.place[1],
    "engine_id": lambda row: row.place[0],
    "submitted": lambda row: _when(row.origin.when),
    "started": lambda row: row.finished(lambda r: _when(r.started)),
    "completed": lambda row: row.finished(lambda r: _when(r.started + r.duration)),
    "received": lambda row: row.section and _when(row.section.received),
    "resubmitted": lambda row: None,
    "queue": lambda row: "task" if not row.spec.get("targets") else "mux",
    "label": lambda row: row.spec.get("label"),
    "status": Row.status,
    "error": Row.error,
    "ename": lambda row: row.failure.get("ename"),
    "evalue": lambda row: row.failure.get("evalue"),
    "attempt": lambda row: row.attempt,
    "op": lambda row: row.spec.get("op"),
    "fn": lambda row: row.spec.get("fn"),
    "targets": lambda row: row.spec.get("targets"),
    "stdout": lambda row: row.printed("stdout"),
    "stderr": lambda row: row.printed("stderr"),
    "header": Row.header,
    "metadata": lambda row: row.spec,
    "result_header": Row.result_header,
    "buffers": lambda row: _pieces(row.payload),
    "result_buffers": lambda row: row.finished(lambda r: _pieces(r.payload)),
    "function": lambda row: None if row.origin.function is None else list(row.origin.function.frames),
}


def _when(seconds: float) -> datetime:
    return datetime.fromtimestamp(seconds, timezone.utc)


def _pieces(payload: wire.Payload) -> list[wire.Buffer]:
    return [payload] if isinstance(payload, bytes) else list(payload)


def shown_keys(keys: Optional[Iterable[str]]) -> list[str]:
    """The keys of the records that a query gives: those asked for and the id; all but BUFFERS if None.

    Raises:
        ValueError: records do not have one of them.
    """
    if keys is None:
        keys = [k for k in KEYS if k not in BUFFERS]
    return list(dict.fromkeys(["msg_id", *check_keys(keys)]))


def named_tasks(query: Mapping[str, Any]) -> Optional[list[wire.TaskKey]]:
    """The tasks that a query asks for by their ids; None if it does not."""
    wanted = query.get("msg_id")
    if isinstance(wanted, Mapping):
        wanted = wanted.get("$in", [wanted["$eq"]] if "$eq" in wanted else None)
    elif wanted is not None:
        wanted = [wanted]
    if wanted is None:
        return None
    keys = []
    for text in wanted:
        try:
            keys.append(wire.task_key(text))
        except ValueError:
            pass  # no task has it
    return list(dict.fromkeys(keys))


def asks_for_unfinished(query: Mapping[str, Any]) -> bool:
    """Does a query ask for tasks only that have not ended?"""
    asked = {"completed": None, "started": None, "received": None, "status": "pending"}
    plain = {key: wanted.get("$eq", ...) if isinstance(wanted, Mapping) else wanted for key, wanted in query.items()}
    return any(key in plain and plain[key] == wanted for key, wanted in asked.items())
