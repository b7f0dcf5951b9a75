"""What a client knows of tasks that it does not wait for: its own earlier ones, and those of others.

    History         the ids of what a client has submitted, worked out from their numbers
    Kept            results or metadata of those whose AsyncResults the user keeps alive
    AsyncHubResult  results by task ids, whoever submitted the tasks

Rule that holds here: a task that has ended and whose AsyncResult is gone costs a client nothing.
"""

from __future__ import annotations

import gc
from collections.abc import Mapping as MappingABC, Sequence as SequenceABC
from typing import Any, Callable, Iterator, Mapping, Optional, Sequence

from . import pack, wire
from .errors import RecordExpired
from .display import ExecuteReply
from .futures import Outcome, _combine
from .results import AsyncExecuteResult, AsyncMapResult, AsyncResult, _when


class History(SequenceABC):  # type: ignore[type-arg]
    """The ids of the tasks `first` .. `end - 1` of a session, in the order of submission: a snapshot."""

    def __init__(self, session: bytes, first: int, end: int):
        self._session, self._numbers = session, range(first, end)

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, slice):
            return [wire.msg_id((self._session, n)) for n in self._numbers[key]]
        try:
            return wire.msg_id((self._session, self._numbers[key]))
        except IndexError:
            raise IndexError(f"there is no task [{key}] in the history: it holds {len(self)}") from None

    def __contains__(self, msg_id: object) -> bool:
        try:
            session, number = wire.task_key(msg_id)  # type: ignore[arg-type]
        except ValueError:
            return False
        return session == self._session and number in self._numbers

    def __eq__(self, other: object) -> bool:
        return list(self) == list(other) if isinstance(other, (History, list)) else NotImplemented

    def __repr__(self) -> str:
        return f"<History: {len(self)} tasks{', the last one ' + self[-1] if len(self) else ''}>"


def kept(client: Any) -> dict[int, tuple[AsyncResult, int]]:
    """The tasks of a client whose AsyncResults are alive: {number: (future, place in it)}.

    The garbage collector is asked for them, so that nothing needs to be noted for each task.
    """
    found: dict[int, tuple[AsyncResult, int]] = {}
    for obj in gc.get_objects():
        kind = type(obj)
        if issubclass(kind, AsyncResult) and kind is not AsyncHubResult and obj.__dict__.get("_client") is client:
            found.update((obj._first + i, (obj, i)) for i in range(obj._count))
    return dict(sorted(found.items()))


class Kept(MappingABC):  # type: ignore[type-arg]
    """{task id: result or metadata} of the tasks that have ended and whose AsyncResults are alive.

    A snapshot: what is in it stays alive with it. A failed task's result is the exception.
    """

    def __init__(self, client: Any, what: Callable[[AsyncResult, int], Any]):
        self._what = what
        self._places = {wire.msg_id((client.session, n)): place for n, place in kept(client).items()
                        if place[0]._outcomes[place[1]] is not None and not is_purged(*place)}

    def __getitem__(self, msg_id: str) -> Any:
        if msg_id not in self._places:
            raise KeyError(f"{msg_id}: no AsyncResult of it is alive here that has ended; see Client.get_result")
        return self._what(*self._places[msg_id])

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def __repr__(self) -> str:
        return f"<Kept: {len(self)} tasks>"


def is_purged(ar: AsyncResult, i: int) -> bool:
    """Whether `purge` had task i of a future."""
    return isinstance((ar._values or {}).get(i), RecordExpired)


def purge(ar: AsyncResult, i: int) -> None:
    """Forget what task i of a future has brought: from now on it is a failed one."""
    source, result = ar._outcomes[i]
    if ar._values is None:
        ar._values = {}
    ar._values[i] = RecordExpired(f"the result of task {ar.msg_ids[i]} was purged")
    ar._outcomes[i] = (source, result._replace(status=wire.ERROR, payload=None))
    for name in (*wire.PRINTED, *wire.TOLD):
        (ar._output or {}).pop((i, name), None)


def outcome_of(ar: AsyncResult, i: int) -> Optional[Outcome]:
    """What task i of a future has brought, if it is still there as it came."""
    outcome: Optional[Outcome] = ar._outcomes[i]
    return None if outcome is None or outcome[1].payload is None or is_purged(ar, i) else outcome


def about(ar: AsyncResult, i: int) -> dict[str, Any]:
    """Of task i of a future what `Client._tasks` tells of others."""
    op = "map" if isinstance(ar, AsyncMapResult) else "execute" if isinstance(ar, AsyncExecuteResult) else "apply"
    return {"op": op, "label": ar._label, "submitted": _when(ar._submitted), "engine_uuid": None,
            "stdout": ar._printed(i, "stdout"), "stderr": ar._printed(i, "stderr")}


class AsyncHubResult(AsyncResult):
    """Results by task ids, whoever submitted the tasks: what `Client.get_result` and `Client.resubmit` return.

    A task of `map` gives the list of its items' values, one of `execute` an `ExecuteReply`.

    Example:
        >>> ids = rc.load_balanced_view().apply_async(abs, -5).msg_ids
        >>> rc.get_result(ids[0]).get(), rc.get_result(ids).get()
        (5, [5])
    """

    def __init__(self, client: Any, keys: Sequence[wire.TaskKey], tasks: Sequence[Mapping[str, Any]], single: bool,
                 fname: str = "get_result"):
        super().__init__(client, fname, single)
        self._keys, self._tasks = list(keys), list(tasks)
        self._count = self._left = len(self._keys)
        self._outcomes = [None] * self._count
        known = [t["submitted"].timestamp() for t in self._tasks if t["submitted"] is not None]
        self._submitted = min(known, default=self._submitted)
        for i, task in enumerate(self._tasks):
            for name in ("stdout", "stderr"):
                if task[name]:
                    self._write(i, name, task[name])

    def _sent_as(self, first: int, count: int) -> None:
        super()._sent_as(first, count)
        self._keys = [(self._client.session, first + i) for i in range(count)]

    def _arrive(self, i: int, outcome: Outcome) -> None:
        if self._outcomes[i] is None:  # it may be sent twice when we ask for what is on its way already
            super()._arrive(i, outcome)

    def _unpacked(self, i: int, value: Any) -> Any:
        if self._tasks[i]["op"] == "map":
            values, failures = value
            failure = _combine([pack.unpack_error(packed) for packed in failures.values()], self._fname)
            if failure is not None:
                raise failure
            return values
        return ExecuteReply("", value, self._metadata_of(i)) if self._tasks[i]["op"] == "execute" else value

    @property
    def msg_ids(self) -> list[str]:
        """The ids of the tasks."""
        return [wire.msg_id(key) for key in self._keys]

    @property
    def owner(self) -> bool:
        """Whether this client submitted the tasks."""
        return all(session == self._client.session for session, _ in self._keys)

    @property
    def sent(self) -> bool:
        """Whether the tasks have left the client: they are known to the controller."""
        return True

    def _metadata_of(self, i: int) -> Any:
        meta, task = super()._metadata_of(i), self._tasks[i]
        meta.update(msg_id=wire.msg_id(self._keys[i]), label=task["label"])
        meta["submitted"] = task["submitted"] or meta["submitted"]
        meta["engine_uuid"] = task["engine_uuid"] or meta["engine_uuid"]
        return meta
