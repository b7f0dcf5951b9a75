"""Answers what clients ask about tasks: the scheduler knows of those that have not ended, the database of the others.

    QUERY {"what": ..., ...} ──► Desk.answer ──► REPLY {"value": ...} or {"error": ..., "ename": ...}
                                  │  ▲   │
                 questions to the │  │   └── a result that a client asked for ──► RESULTS, at once or when it comes (`watchers`)
                  database, if it ▼  │ wake_fd
                      may be slow: clerk, a thread

Whoever answers a query is a generator that yields questions to the database, as functions, and is sent what they return.

Rules that hold here: a query either does all it is asked or nothing; results and other payloads travel as frames;
nobody polls; what the scheduler knows may have changed after each question.
"""

from __future__ import annotations

import json
import os
import time
from collections import deque
from importlib import import_module
from typing import Any, Callable, Dict, Generator, Iterable, Mapping, Optional

from . import wire
from .db import Function, Section, TaskDB
from .records import Place
from .errors import ConfigError, NoRecord, ProtocolError, RecordExpired
from .scheduler import Scheduler
from .tasks import Spec, Task

QUOTED_MAX = 2000  # characters of an error that a client gets to read
_ANSWERED = (NoRecord, RuntimeError, ValueError)  # what a client is told as it is
_MALFORMED = (AttributeError, LookupError, TypeError, OverflowError, ProtocolError)  # what comes of a query that is not as it should be
_EXPECTED = (*_ANSWERED, *_MALFORMED)

FEW = 20  # records are asked for one by one
# What of records is needed: to send the result, to run the task again, to tell about it.
RESULT = ("started", "completed", "status", "attempt", "engine_id", "result_buffers")
AGAIN = ("metadata", "buffers", "function")
ABOUT = ("op", "fn", "label", "submitted", "stdout", "stderr", "engine_uuid")

LIMITS = ("record_limit", "size_limit", "record_age")
# Name -> module, and the settings that it takes, besides the place of a task if there are any.
DATABASES = {
    "DictDB": (".dictdb", LIMITS),
    "NoDB": (".db", ()),
    "SQLiteDB": (".sqlitedb", ("filename", "location", "table", *LIMITS)),
    "MongoDB": (".mongodb", ("database", "connection_args", "connection_kwargs", *LIMITS)),
}
# What databases of users have: TaskDB's, or IPython Parallel's.
CONTRACT = (*TaskDB.__annotations__, *(name for name in TaskDB.__dict__ if not name.startswith("_")))
OWN_CONTRACT = ("add_record", "update_record", "get_record", "find_records", "get_history", "drop_record", "drop_matching_records")

Submit = Callable[[Any, list[Task]], None]
Reply = Callable[[Dict[str, Any]], None]
Steps = Generator[Callable[[], Any], Any, Any]  # yields questions to the database, returns the value of the reply


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
            "tasks": self._on_tasks, "fetch": self._on_fetch, "missed": self._on_missed, "resubmit": self._on_resubmit,
            "purge": self._on_purge, "db_stats": self._on_db_stats, "db_vacuum": self._on_db_vacuum,
        }
        self.wake_fd: Optional[int] = None  # readable when `collect` has something to do
        self._wake_w = -1
        self._asked: Any = None  # a queue of questions for the clerk
        self._answers: deque[tuple[Any, Any, Any]] = deque()
        if db.waits:
            self.wake_fd, self._wake_w = os.pipe()
            os.set_blocking(self.wake_fd, False)

    def close(self) -> None:
        """Nobody will ask any more."""
        if self.wake_fd is not None and self._asked is None:  # else the clerk may be about to use them
            os.close(self.wake_fd)
            os.close(self._wake_w)

    def answer(self, client: Any, body: dict[str, Any], reply: Reply) -> None:
        """Answer a query that is in `table`, at once or when the database has: calls `reply` with the body."""
        self._go_on((self._steps(client, body), body["what"], reply), None, None)

    def _steps(self, client: Any, body: dict[str, Any]) -> Steps:
        answer = self.table[body["what"]](client, body)
        return (yield from answer) if isinstance(answer, Generator) else answer

    def _go_on(self, case: tuple[Steps, str, Reply], found: Any, error: Optional[Exception]) -> None:
        """Give a query what the database said, until it asks again or is answered."""
        steps, what, reply = case
        try:
            while True:
                question = steps.send(found) if error is None else steps.throw(error)
                if self.db.waits:
                    return self._ask(question, case)
                found, error = _outcome(question)
        except StopIteration as e:
            reply({"value": e.value})
        except _ANSWERED as e:
            reply({"ename": type(e).__name__, "error": str(e)[:QUOTED_MAX]})
        except _MALFORMED as e:
            reply({"ename": "ValueError", "error": f"the query {what!r} is malformed: {type(e).__name__}: {str(e)[:QUOTED_MAX]}"})

    # --- questions to a database that may be slow

    def _ask(self, question: Callable[[], Any], case: tuple[Steps, str, Reply]) -> None:
        if self._asked is None:
            import queue
            import threading

            self._asked = queue.SimpleQueue()
            threading.Thread(target=self._clerk, name="clerk", daemon=True).start()
        self._asked.put((question, case))

    def _clerk(self) -> None:
        while True:
            question, case = self._asked.get()
            self._answers.append((case, *_outcome(question)))
            os.write(self._wake_w, b"!")

    def collect(self) -> None:
        """Go on with the queries to which the database has answered."""
        try:
            os.read(self.wake_fd or -1, 4096)
        except BlockingIOError:
            pass  # it was read with the answer before
        for _ in range(len(self._answers)):
            self._go_on(*self._answers.popleft())

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

    def _on_queue_status(self, client: Any, body: dict[str, Any]) -> Steps:
        ids = self.scheduler.engines if body["targets"] is None else body["targets"]
        status: dict[Any, Any] = self.scheduler.queue_status(ids)
        if not body.get("verbose"):
            return status
        done: dict[int, list[str]] = {}
        if self.db.keeps:
            query = {"engine_id": {"$in": [e for e in status if e != "unassigned"]}, "completed": {"$ne": None}}
            for record in (yield lambda: self.db.find_records(query, ["msg_id", "engine_id"])):
                done.setdefault(record["engine_id"], []).append(record["msg_id"])
        return self._listed({e: status[e] for e in status if e == "unassigned" or e in self.scheduler.engines}, done)

    def _listed(self, status: dict[Any, Any], done: dict[int, list[str]]) -> dict[Any, Any]:
        """The queue status with ids in place of numbers; `done` are those on record of the completed tasks."""
        waiting = {task.key: task for task in self.scheduler.tasks.values()}
        for engine_id in [e for e in status if e != "unassigned"]:
            engine = self.scheduler.engines[engine_id]
            only = frozenset((engine_id,))
            queued = [t for q in engine.queues if q.allowed == only for t in q.tasks()]
            bound = [t for t in engine.outstanding.values() if t.allowed == only] + queued
            status[engine_id] = {"queue": _ids(bound), "completed": done.get(engine_id, []),
                                 "tasks": _ids(t for t in engine.outstanding.values() if t.allowed != only)}
        for engine in self.scheduler.engines.values():
            only = frozenset((engine.id,))
            queued = [t for q in engine.queues if q.allowed == only for t in q.tasks()]
            for task in [*engine.outstanding.values(), *queued]:
                waiting.pop(task.key, None)
        status["unassigned"] = _ids(waiting.values())
        return status

    def _on_history(self, client: Any, body: dict[str, Any]) -> Steps:
        return (yield self.db.get_history)

    def _on_db_query(self, client: Any, body: dict[str, Any]) -> Steps:
        query, keys = body["query"], body["keys"]
        return (yield lambda: self.db.find_records(query, keys))

    def _on_db_stats(self, client: Any, body: dict[str, Any]) -> Steps:
        return (yield self.db.stats)

    def _on_db_vacuum(self, client: Any, body: dict[str, Any]) -> Steps:
        return (yield self.db.vacuum)

    def _records(self, keys: Iterable[wire.TaskKey], fields: Iterable[str]) -> dict[wire.TaskKey, Any]:
        """What the database says of tasks: a record, with at least these fields, or a NoRecord of each."""
        asked = list(keys)
        found: dict[wire.TaskKey, Any] = {}
        if len(asked) > FEW and self.db.keeps:
            records = self.db.find_records({"msg_id": {"$in": [wire.msg_id(key) for key in asked]}}, fields)
            found = {wire.task_key(record["msg_id"]): record for record in records}
        for key in [key for key in asked if key not in found]:
            record, error = _outcome(lambda: self.db.get_record(wire.msg_id(key)))  # noqa: B023  # called at once
            if error is not None and not isinstance(error, NoRecord):
                raise error
            found[key] = record if error is None else error
        return found

    def _ended(self, keys: Iterable[wire.TaskKey], fields: Iterable[str]) -> Steps:
        """The records of those of some tasks that have ended, once all of them are known: no other has ended meanwhile."""
        keys = list(dict.fromkeys(keys))
        found: dict[wire.TaskKey, Any] = {}
        while True:
            asked = [key for key in keys if key not in self.scheduler.tasks and key not in found]
            if not asked:
                return found
            found.update((yield lambda: self._records(asked, fields)))  # noqa: B023  # before the next round

    def _on_tasks(self, client: Any, body: dict[str, Any]) -> Steps:
        """What is known of tasks, but for their results."""
        keys = [wire.task_key(msg_id) for msg_id in _texts(body["ids"])]
        records = yield lambda: self._records(keys, ABOUT)
        return [self._about(key, records[key]) for key in keys]

    def _about(self, key: wire.TaskKey, record: Any) -> dict[str, Any]:
        task = self.scheduler.tasks.get(key)
        if isinstance(record, NoRecord):
            if task is None:
                raise record
            spec = json.loads(task.spec.raw)
            record = {"op": spec.get("op"), "fn": spec.get("fn"), "label": spec.get("label"), "submitted": None,
                      "stdout": "", "stderr": "", "engine_uuid": None}
        about = {k: record[k] for k in ABOUT}
        return {**about, "done": task is None}

    def _on_fetch(self, client: Any, body: dict[str, Any]) -> Steps:
        """Send results: now, or when they are there. The tasks of the client itself are sent to it anyway."""
        keys = [wire.task_key(msg_id) for msg_id in _texts(body["ids"])]
        records = yield from self._ended(keys, RESULT)
        ready = [(key, *_result_of(key, records[key])) for key in keys if key in records]
        for key in keys:
            if key not in records and key[0] != client.session:
                self.watchers.setdefault(key, {})[client.session] = None
        for key, engine_id, result in ready:
            self._send(client.session, [wire.RESULTS, *wire.encode_results(key[0], engine_id, [result])])

    def _on_missed(self, client: Any, body: dict[str, Any]) -> Steps:
        """A client came back: send what is on record of these tasks of its own; returns the numbers of the others that have not ended
        here: of those whose records expired, and of those that never came."""
        lost: dict[str, list[int]] = {"expired": [], "unknown": []}
        found: dict[int, list[wire.Result]] = {}
        keys = [(client.session, seq) for run in wire.decode_ranges(body["runs"]) for seq in run]
        for key, record in (yield from self._ended(keys, RESULT)).items():
            try:
                engine_id, result = _result_of(key, record)
                found.setdefault(engine_id, []).append(result)
            except RecordExpired:
                lost["expired"].append(key[1])
            except NoRecord:  # what has ended is not to be sent again, be it on record or not
                lost["expired" if self.scheduler.knows(key) else "unknown"].append(key[1])
        for engine_id, results in found.items():
            for at in range(0, len(results), wire.BATCH_TASKS):
                self._send(client.session, [wire.RESULTS, *wire.encode_results(
                    client.session, engine_id, results[at : at + wire.BATCH_TASKS])])
        return {name: wire.encode_ranges(seqs) for name, seqs in lost.items()}

    def _on_resubmit(self, client: Any, body: dict[str, Any]) -> Steps:
        """Queue tasks again, for the client that asks, under the numbers from `first` on."""
        ids, first, label = _texts(body["ids"]), body["first"], body.get("label")
        if type(first) is not int or not 0 < first <= wire.SEQ_END - len(ids):
            raise ValueError(f"{first!r} is not the number of a task")
        keys = [wire.task_key(msg_id) for msg_id in ids]
        records = yield from self._ended(keys, AGAIN)
        tasks: list[Task] = []
        functions: dict[str, Function] = {}
        for i, (msg_id, key) in enumerate(zip(ids, keys)):
            if key not in records:
                raise RuntimeError(f"task {msg_id} has not ended, so it can not be submitted again")
            record = records[key]
            if isinstance(record, NoRecord):
                raise record
            spec = self._again(record["metadata"], label)
            if spec.fn and spec.fn not in client.functions:
                if record["function"] is None:
                    raise NoRecord(f"the function of task {msg_id} is not on record")
                functions[spec.fn] = Function(record["function"])
            pieces = record["buffers"]
            payload = pieces[0] if len(pieces) == 1 and type(pieces[0]) is bytes else pieces
            tasks.append(Task((client.session, first + i), spec, payload))
        if client.gone:
            return
        client.functions.update(functions)
        self._submit(client, tasks)
        again = {msg_id: wire.msg_id(task.key) for msg_id, task in zip(ids, tasks)}
        yield lambda: self._note_again(again)

    def _note_again(self, again: dict[str, str]) -> None:
        for msg_id, new in again.items():
            self.db.update_record(msg_id, {"resubmitted": new})

    def _again(self, spec: dict[str, Any], label: Any) -> Spec:
        """The spec for another run: what the task waited for has been, and engines that are gone do not count."""
        spec = {k: v for k, v in spec.items() if k not in ("after", "follow", "coalesce")}
        if label is not None:
            spec["label"] = label
        if not any(t in self.scheduler.engines for t in spec.get("targets") or ()):
            spec["targets"] = None
        return Spec.from_json(json.dumps(spec, separators=(",", ":")).encode())

    def _on_purge(self, client: Any, body: dict[str, Any]) -> Steps:
        """Forget tasks that have ended: those named, those of the engines named, or all."""
        ended: dict[str, Any] = {"status": {"$ne": "pending"}}
        if body.get("all"):
            return (yield lambda: self.db.drop_matching_records(ended))
        ids = list(dict.fromkeys(_texts(body["ids"])))
        unfinished = [i for i in ids if wire.task_key(i) in self.scheduler.tasks]
        if unfinished:
            raise RuntimeError(f"tasks that have not ended can not be purged: {', '.join(unfinished[:5])}"
                               + (f" and {len(unfinished) - 5} more" if len(unfinished) > 5 else ""))
        targets = body.get("targets")
        query = {"engine_id": {"$in": targets}, **ended} if targets else None
        return (yield lambda: self._purge(ids, query))

    def _purge(self, ids: list[str], query: Optional[dict[str, Any]]) -> int:
        found = self._records(map(wire.task_key, ids), ()) if self.db.keeps else {}
        unknown = [r for r in found.values() if isinstance(r, NoRecord) and not isinstance(r, RecordExpired)]
        if unknown:
            raise unknown[0]
        dropped = [wire.msg_id(key) for key, record in found.items() if not isinstance(record, RecordExpired)]
        for msg_id in dropped:
            self.db.drop_record(msg_id)
        return len(dropped) + (self.db.drop_matching_records(query) if query is not None else 0)


def _ids(tasks: Iterable[Task]) -> list[str]:
    return [wire.msg_id(t.key) for t in tasks]


def _outcome(question: Callable[[], Any]) -> tuple[Any, Optional[Exception]]:
    """What it returns, or raises."""
    try:
        return question(), None
    except _EXPECTED as e:  # whoever asked decides
        return None, e
    except Exception as e:  # damaged records, or a database of the user's
        return None, RuntimeError(f"the records can't be read: {type(e).__name__}: {e}")


def _texts(ids: Any) -> list[str]:
    if not isinstance(ids, list):
        raise ValueError(f"ids of tasks come as a list, not {type(ids).__name__}")
    return ids


def _result_of(key: wire.TaskKey, record: Any) -> tuple[int, wire.Result]:
    """(engine id, result) of a task that has ended; raises what is in the place of its record."""
    if isinstance(record, NoRecord):
        raise record
    started, completed = record["started"], record["completed"]
    if started is None:
        raise NoRecord(f"the result of task {wire.msg_id(key)} is not on record")
    pieces = record["result_buffers"]
    payload: wire.Payload = pieces[0] if len(pieces) == 1 and type(pieces[0]) is bytes else pieces
    engine_id: Optional[int] = record["engine_id"]
    result = wire.Result(key[1], started.timestamp(), (completed - started).total_seconds(), record["attempt"],
                         wire.OK if record["status"] == "ok" else wire.ERROR, payload)
    return wire.NO_ENGINE if engine_id is None else engine_id, result


def write_off(db: TaskDB) -> None:
    """The unfinished tasks of former runs have failed: nobody carries on with them."""
    payload = wire.encode_error({"ename": "ControllerLost", "own": True, "evalue": "the controller ended before the task did, and "
                                 "the next one was started without --reuse or --restore"})
    now = time.time()
    left: dict[bytes, list[wire.Result]] = {}
    for task in db.unfinished():
        left.setdefault(task.key[0], []).append(wire.Result(task.key[1], now, 0.0, task.attempt, wire.ERROR, payload))
    for session, results in left.items():
        for at in range(0, len(results), wire.BATCH_TASKS):
            part = results[at : at + wire.BATCH_TASKS]
            frames = wire.encode_results(session, wire.NO_ENGINE, part)
            db.finished(Section(session, wire.NO_ENGINE, "", now, [result.seq for result in part], frames))


def open_db(name: Any, settings: Mapping[str, Any], place: Place) -> TaskDB:
    """The database that `IPController.db_class` names.

    Args:
        name: a row of `DATABASES`, in any case and also with a module of ours or of IPython Parallel before it; or a class of
            the user's, or its dotted path.
        settings: {"DictDB.record_limit": ...} and so on.
        place: tells on which engine an unfinished task is, for a database that does not note it.

    Raises:
        ConfigError: there is no such database, or a setting of it is wrong.
    """
    if isinstance(name, type):
        return _own(name, place)
    module, _, kind = str(name).rpartition(".")
    ours = not module or module.split(".")[0] in ("ipyparallel", "IPython") or (module + ".").startswith(f"{__package__}.")
    found = {known.lower(): known for known in DATABASES}.get(kind.lower()) if ours else None
    if found is None:
        if ours:
            raise ConfigError(f"c.IPController.db_class is {name!r}, which is neither one of {', '.join(DATABASES)} nor the dotted "
                              "path of a class.")
        return _own(_imported(module, kind, name), place)
    home, keys = DATABASES[found]
    chosen = {key: settings[f"{found}.{key}"] for key in keys}
    made: TaskDB = getattr(import_module(home, __package__), found)(**chosen, **({"place": place} if keys else {}))
    return made


def _imported(module: str, kind: str, name: str) -> Any:
    try:
        return getattr(import_module(module), kind)
    except Exception as e:  # it is the user's code
        raise ConfigError(f"c.IPController.db_class is {name!r}, which can't be imported: {type(e).__name__}: {e}.") from None


def _own(kind: Any, place: Place) -> TaskDB:
    """A database of the user's: a class that keeps our contract, or IPython Parallel's."""
    named = f"{kind.__module__}.{kind.__qualname__}" if isinstance(kind, type) else repr(kind)
    try:
        made: Any = kind()
    except Exception as e:  # it is the user's code
        raise ConfigError(f"the database {named} can't be made: {type(e).__name__}: {e}.") from None
    if hasattr(made, "submitted"):
        missing = [method for method in CONTRACT if not hasattr(made, method)]
    else:
        missing = [method for method in OWN_CONTRACT if not hasattr(made, method)]
        made = import_module(".owndb", __package__).OwnDB(made, place) if not missing else made
    if missing:
        raise ConfigError(f"the database {named} lacks {', '.join(missing)}.")
    checked: TaskDB = made
    return checked
