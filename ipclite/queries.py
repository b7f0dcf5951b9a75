"""Answers what clients ask about tasks: the scheduler knows of those that have not ended, the database of the others.

    QUERY {"what": ..., ...} ──► Desk.answer ──► REPLY {"value": ...} or {"error": ..., "ename": ...}
                                     │
             a result that a client asked for ──► RESULTS, at once or when it comes (`watchers`)

Rules that hold here: a query either does all it is asked or nothing; results and other payloads travel as frames;
nobody polls.
"""

from __future__ import annotations

import json
from typing import Any, Callable, Iterable, Mapping, Optional

from . import wire
from .db import Function, NoDB, TaskDB
from .dictdb import DictDB, Place
from .errors import ConfigError, NoRecord, ProtocolError, RecordExpired
from .scheduler import Scheduler
from .tasks import Spec, Task

QUOTED_MAX = 2000  # characters of an error that a client gets to read
_ANSWERED = (NoRecord, RuntimeError, ValueError)  # what a client is told as it is

Submit = Callable[[Any, list[Task]], None]


class Desk:
    """Where clients ask.

    Args:
        scheduler, db: who knows.
        send: send frames to the client of a session, if it is there.
        submit: queue tasks for a client.
    """

    def __init__(self, scheduler: Scheduler, db: TaskDB, send: Callable[[bytes, list[Any]], None], submit: Submit):
        self.scheduler, self.db, self._send, self._submit = scheduler, db, send, submit
        self.watchers: dict[wire.TaskKey, dict[bytes, None]] = {}  # who wants the result, besides the one who submitted
        self.table: dict[str, Callable[[Any, dict[str, Any]], Any]] = {
            "queue_status": self._on_queue_status, "history": self._on_history, "db_query": self._on_db_query,
            "tasks": self._on_tasks, "fetch": self._on_fetch, "resubmit": self._on_resubmit, "purge": self._on_purge,
        }

    def answer(self, client: Any, body: dict[str, Any]) -> dict[str, Any]:
        """The body of the reply to a query that is in `table`."""
        try:
            return {"value": self.table[body["what"]](client, body)}
        except _ANSWERED as e:
            return {"ename": type(e).__name__, "error": str(e)[:QUOTED_MAX]}
        except (AttributeError, LookupError, TypeError, OverflowError, ProtocolError) as e:
            return {"ename": "ValueError",
                    "error": f"the query {body['what']!r} is malformed: {type(e).__name__}: {str(e)[:QUOTED_MAX]}"}

    # --- what the controller tells

    def results(self, session: bytes, section: list[Any]) -> None:
        """Results are on their way to their owner: send them to the others who want them, too."""
        for _, engine_id, records, frames in wire.result_sections([b"", *section]):
            wanted: dict[bytes, list[wire.Result]] = {}
            for result in wire.section_results(records, frames):
                for watcher in self.watchers.pop((session, result.seq), ()):
                    wanted.setdefault(watcher, []).append(result)
            for watcher, results in wanted.items():
                self._send(watcher, [wire.RESULTS, *wire.encode_results(session, engine_id, results)])

    def output(self, session: bytes, engine_id: int, pieces: list[Any]) -> None:
        """Tasks have printed: tell those who want to know, besides their owner."""
        wanted: dict[bytes, list[Any]] = {}
        for piece in pieces:
            for watcher in self.watchers.get((session, piece[0]), ()):
                wanted.setdefault(watcher, []).append(piece)
        for watcher, chosen in wanted.items():
            self._send(watcher, wire.encode_output(session, engine_id, chosen))

    def left(self, session: bytes) -> None:
        """A client has gone."""
        for key, watchers in list(self.watchers.items()):
            watchers.pop(session, None)
            if not watchers:
                del self.watchers[key]

    # --- what clients ask

    def _on_queue_status(self, client: Any, body: dict[str, Any]) -> Any:
        ids = self.scheduler.engines if body["targets"] is None else body["targets"]
        status = self.scheduler.queue_status(ids)
        return self._listed(status) if body.get("verbose") else status

    def _listed(self, status: dict[Any, Any]) -> dict[Any, Any]:
        """The queue status with ids in place of numbers. Of the completed tasks those on record are listed."""
        waiting = {task.key: task for task in self.scheduler.tasks.values()}
        for engine_id in [e for e in status if e != "unassigned"]:
            engine = self.scheduler.engines[engine_id]
            only = frozenset((engine_id,))
            queued = [t for q in engine.queues if q.allowed == only for t in q.tasks()]
            bound = [t for t in engine.outstanding.values() if t.allowed == only] + queued
            query = {"engine_id": engine_id, "completed": {"$ne": None}}
            done = self.db.find_records(query, ["msg_id"]) if self.db.keeps else []
            status[engine_id] = {"queue": _ids(bound), "completed": [r["msg_id"] for r in done],
                                 "tasks": _ids(t for t in engine.outstanding.values() if t.allowed != only)}
        for engine in self.scheduler.engines.values():
            only = frozenset((engine.id,))
            queued = [t for q in engine.queues if q.allowed == only for t in q.tasks()]
            for task in [*engine.outstanding.values(), *queued]:
                waiting.pop(task.key, None)
        status["unassigned"] = _ids(waiting.values())
        return status

    def _on_history(self, client: Any, body: dict[str, Any]) -> Any:
        return self.db.get_history()

    def _on_db_query(self, client: Any, body: dict[str, Any]) -> Any:
        return self.db.find_records(body["query"], body["keys"])

    def _on_tasks(self, client: Any, body: dict[str, Any]) -> Any:
        """What is known of tasks, but for their results."""
        return [self._about(msg_id) for msg_id in _texts(body["ids"])]

    def _about(self, msg_id: str) -> dict[str, Any]:
        task = self.scheduler.tasks.get(wire.task_key(msg_id))
        try:
            record = self.db.get_record(msg_id)
        except NoRecord:
            if task is None:
                raise
            spec = json.loads(task.spec.raw)
            record = {"op": spec.get("op"), "fn": spec.get("fn"), "label": spec.get("label"), "submitted": None,
                      "stdout": "", "stderr": "", "engine_uuid": None}
        about = {k: record[k] for k in ("op", "fn", "label", "submitted", "stdout", "stderr", "engine_uuid")}
        return {**about, "done": task is None}

    def _on_fetch(self, client: Any, body: dict[str, Any]) -> None:
        """Send results: now, or when they are there. The tasks of the client itself are sent to it anyway."""
        ready: list[tuple[bytes, int, wire.Result]] = []
        later: list[wire.TaskKey] = []
        for msg_id in _texts(body["ids"]):
            key = wire.task_key(msg_id)
            if key in self.scheduler.tasks:
                later.append(key)
            else:
                ready.append((key[0], *_result_of(key, self.db.get_record(msg_id))))
        for key in later:
            if key[0] != client.session:
                self.watchers.setdefault(key, {})[client.session] = None
        for session, engine_id, result in ready:
            self._send(client.session, [wire.RESULTS, *wire.encode_results(session, engine_id, [result])])

    def _on_resubmit(self, client: Any, body: dict[str, Any]) -> None:
        """Queue tasks again, for the client that asks, under the numbers from `first` on."""
        ids, first, label = _texts(body["ids"]), body["first"], body.get("label")
        if type(first) is not int or not 0 < first <= wire.SEQ_END - len(ids):
            raise ValueError(f"{first!r} is not the number of a task")
        tasks: list[Task] = []
        functions: dict[str, Function] = {}
        for i, msg_id in enumerate(ids):
            if wire.task_key(msg_id) in self.scheduler.tasks:
                raise RuntimeError(f"task {msg_id} has not ended, so it can not be submitted again")
            record = self.db.get_record(msg_id)
            spec = self._again(record["metadata"], label)
            if spec.fn and spec.fn not in client.functions:
                if record["function"] is None:
                    raise NoRecord(f"the function of task {msg_id} is not on record")
                functions[spec.fn] = Function(record["function"])
            pieces = record["buffers"]
            payload = pieces[0] if len(pieces) == 1 and type(pieces[0]) is bytes else pieces
            tasks.append(Task((client.session, first + i), spec, payload))
        client.functions.update(functions)
        self._submit(client, tasks)
        for msg_id, task in zip(ids, tasks):
            self.db.update_record(msg_id, {"resubmitted": wire.msg_id(task.key)})

    def _again(self, spec: dict[str, Any], label: Any) -> Spec:
        """The spec for another run: what the task waited for has been, and engines that are gone do not count."""
        spec = {k: v for k, v in spec.items() if k not in ("after", "follow", "coalesce")}
        if label is not None:
            spec["label"] = label
        if not any(t in self.scheduler.engines for t in spec.get("targets") or ()):
            spec["targets"] = None
        return Spec.from_json(json.dumps(spec, separators=(",", ":")).encode())

    def _on_record(self, msg_id: str) -> bool:
        """False if it was dropped; raises NoRecord if there never was one."""
        try:
            self.db.get_record(msg_id)
        except RecordExpired:
            return False
        return True

    def _on_purge(self, client: Any, body: dict[str, Any]) -> int:
        """Forget tasks that have ended: those named, those of the engines named, or all."""
        if body.get("all"):
            return self.db.drop_matching_records({"status": {"$ne": "pending"}})
        ids = list(dict.fromkeys(_texts(body["ids"])))
        unfinished = [i for i in ids if wire.task_key(i) in self.scheduler.tasks]
        if unfinished:
            raise RuntimeError(f"tasks that have not ended can not be purged: {', '.join(unfinished[:5])}"
                               + (f" and {len(unfinished) - 5} more" if len(unfinished) > 5 else ""))
        if ids and self.db.keeps:
            ids = [msg_id for msg_id in ids if self._on_record(msg_id)]
        for msg_id in ids:
            self.db.drop_record(msg_id)
        dropped = len(ids)
        if body.get("targets"):
            query = {"engine_id": {"$in": body["targets"]}, "status": {"$ne": "pending"}}
            dropped += self.db.drop_matching_records(query)
        return dropped


def _ids(tasks: Iterable[Task]) -> list[str]:
    return [wire.msg_id(t.key) for t in tasks]


def _texts(ids: Any) -> list[str]:
    if not isinstance(ids, list):
        raise ValueError(f"ids of tasks come as a list, not {type(ids).__name__}")
    return ids


def _result_of(key: wire.TaskKey, record: dict[str, Any]) -> tuple[int, wire.Result]:
    """(engine id, result) of a task that has ended."""
    started, completed = record["started"], record["completed"]
    if started is None:
        raise NoRecord(f"the result of task {wire.msg_id(key)} is not on record")
    pieces = record["result_buffers"]
    payload: wire.Payload = pieces[0] if len(pieces) == 1 and type(pieces[0]) is bytes else pieces
    engine_id: Optional[int] = record["engine_id"]
    result = wire.Result(key[1], started.timestamp(), (completed - started).total_seconds(), record["attempt"],
                         wire.OK if record["status"] == "ok" else wire.ERROR, payload)
    return wire.NO_ENGINE if engine_id is None else engine_id, result


def open_db(name: str, settings: Mapping[str, Any], place: Place) -> TaskDB:
    """The database that `IPController.db_class` names: DictDB or NoDB, in any case, or with a module before it.

    Args:
        settings: {"DictDB.record_limit": ...} and so on.
        place: tells on which engine an unfinished task is, for a database that does not note it.

    Raises:
        ConfigError: there is no such database.
    """
    module, _, kind = str(name).rpartition(".")
    known = module.split(".")[0] in ("", __name__.split(".")[0], "ipyparallel", "IPython")
    short = kind.lower() if known else ""
    if short == "dictdb":
        limits = {key: settings[f"DictDB.{key}"] for key in ("record_limit", "size_limit", "record_age")}
        return DictDB(**limits, place=place)
    if short == "nodb":
        return NoDB()
    if short in ("sqlitedb", "mongodb"):
        raise ConfigError(f"this version has no {kind}: choose DictDB (records in memory) or NoDB with "
                          "c.IPController.db_class, --dictdb or --nodb.")
    raise ConfigError(f"c.IPController.db_class is {name!r}, and there are only DictDB and NoDB.")
