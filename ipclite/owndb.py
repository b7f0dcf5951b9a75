"""A database of the user's that keeps IPython Parallel's contract: add_record, update_record, find_records and so on.

    submitted ──► add_record(id, record)        finished, assigned, output ──► update_record(id, changes)

Rules that hold here: the user's class gets one record per task, as dicts with the keys of `KEYS`, in the controller's
thread; what it raises is said once, and from then on it is told nothing.
"""

from __future__ import annotations

import logging
from typing import Any, Callable, Iterable, Mapping, Optional, Sequence

from . import wire
from .db import KEYS, Batch, Section, Volatile, check_keys, compile_query
from .errors import NoRecord
from .records import Place, Row, read_arguments, shown_keys


class _Came:
    """A batch as an `Origin`."""

    def __init__(self, batch: Batch):
        self.spec, self.first, self.fan, self.when = batch.spec, batch.seqs[0], batch.fan, batch.when
        self.function, self.frame = batch.function, batch.frame
        self.arguments = (dict(zip(batch.seqs, batch.payloads)) if batch.payloads is not None else
                          read_arguments([batch.frame]))


class OwnDB(Volatile):
    """The contract `TaskDB` over a database of the user's.

    Args:
        own: it.
        place: not asked, as `assigned` tells.
    """

    keeps = True

    def __init__(self, own: Any, place: Place):
        self.own = own
        self._output: dict[wire.TaskKey, dict[str, str]] = {}

    def _tell(self, method: str, *args: Any) -> None:
        if self.failed:
            return
        try:
            getattr(self.own, method)(*args)
        except Exception as e:  # it is the user's code
            self.failed = f"no records of tasks are kept any more, as {type(self.own).__name__}.{method} failed: {type(e).__name__}: {e}"
            self.keeps = False
            logging.getLogger(__package__).error("%s", self.failed)

    def _record(self, key: wire.TaskKey, origin: Any, section: Optional[Section], results: Mapping[int, Any]) -> Row:
        return Row(key, origin, None, section, {}, lambda source: results if source is section else source.arguments, lambda key: None)

    def submitted(self, batch: Batch) -> None:
        """See TaskDB."""
        origin = _Came(batch)
        origin.frame = origin.frame or b"-"  # the arguments are asked for where `_record` says
        for seq in batch.seqs:
            row = self._record((batch.session, seq), origin, None, {})
            self._tell("add_record", wire.msg_id(row.key), {key: row(key) for key in KEYS})

    def assigned(self, session: bytes, engine_id: int, engine_uuid: str, tasks: Sequence[tuple[int, int, Any]]) -> None:
        """See TaskDB."""
        for seq, attempt, _ in tasks:
            changes = {"engine_id": engine_id, "engine_uuid": engine_uuid, "attempt": attempt}
            self._tell("update_record", wire.msg_id((session, seq)), changes)

    FINISHED = ("engine_id", "engine_uuid", "started", "completed", "received", "status", "error", "ename", "evalue", "attempt",
                "result_buffers")

    def finished(self, section: Section) -> None:
        """See TaskDB."""
        results = {result.seq: result for result in section.results()}
        for seq in section.seqs:
            key = (section.session, seq)
            row = self._record(key, None, section, results)
            self._output.pop(key, None)
            self._tell("update_record", wire.msg_id(key), {name: row(name) for name in self.FINISHED})

    def output(self, session: bytes, pieces: list[Any]) -> None:
        """See TaskDB."""
        for seq, stream, text in pieces:
            if stream in ("stdout", "stderr"):
                printed = self._output.setdefault((session, seq), {"stdout": "", "stderr": ""})
                printed[stream] += text
                self._tell("update_record", wire.msg_id((session, seq)), dict(printed))

    def _ask(self, ask: Callable[[], Any]) -> Any:
        if self.failed:
            raise NoRecord(self.failed)
        try:
            return ask()
        except Exception as e:  # it is the user's code
            if isinstance(e, ValueError):
                raise
            raise NoRecord(f"{type(self.own).__name__} does not know it: {type(e).__name__}: {e}") from None

    def get_record(self, msg_id: str) -> dict[str, Any]:
        """See TaskDB."""
        wire.task_key(msg_id)
        found = self._ask(lambda: self.own.get_record(msg_id))
        return {key: found.get(key) for key in KEYS}

    def find_records(self, query: Mapping[str, Any], keys: Optional[Iterable[str]] = None) -> list[dict[str, Any]]:
        """See TaskDB."""
        compile_query(query)
        shown = shown_keys(keys)
        return [{key: record.get(key) for key in shown} for record in self._ask(lambda: self.own.find_records(dict(query), shown))]

    def get_history(self) -> list[str]:
        """See TaskDB."""
        return list(self._ask(self.own.get_history))

    def drop_record(self, msg_id: str) -> None:
        """See TaskDB."""
        wire.task_key(msg_id)
        self._ask(lambda: self.own.drop_record(msg_id))

    def drop_matching_records(self, query: Mapping[str, Any]) -> int:
        """See TaskDB."""
        n = len(self.find_records(query, ["msg_id"]))
        self._ask(lambda: self.own.drop_matching_records(dict(query)))
        return n

    def update_record(self, msg_id: str, changes: Mapping[str, Any]) -> None:
        """See TaskDB."""
        check_keys(changes)
        wire.task_key(msg_id)
        self._ask(lambda: self.own.update_record(msg_id, dict(changes)))

    def close(self) -> None:
        """See TaskDB."""
        if hasattr(self.own, "close"):
            self._tell("close")
