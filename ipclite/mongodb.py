"""Task records in a MongoDB server: a journal over pymongo, which is imported when this database is chosen.

    c.MongoDB.database: chunks, pieces (of their data), spans, owners (of sessions), functions, marks, extras, state
                        held: which controller has it, and when it last said so

What belongs to a chunk is written before it, and counts with it; so a commit that is cut short leaves nothing but what the
next one clears away. Documents stay below the 16 MB that a server takes, as data are cut into pieces.

Rules that hold here: a server that can't be reached is tried again; nothing but plain inserts, updates of single documents,
deletes and finds is asked of it.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from pathlib import Path
from typing import Any, Callable, Iterable, Optional, TypeVar

from . import files
from .chunks import HAPPENED, Change, Meta, Owner, State, StoreError, pieces
from .errors import AlreadyRunning, ConfigError
from .journal import Journal

DATABASE = "ipython-tasks"
PIECE_BYTES = 8 << 20  # a document holds 16 MB at most
ZERO = 1 << 63  # numbers of tasks reach to 2**64, and those of MongoDB to 2**63
REACH_MS = 5000  # a server that does not answer for so long can't be reached
ANSWER_MS = 20_000
GONE_S = 60.0  # a controller on another host that said nothing for so long
COLLECTIONS = ("chunks", "pieces", "spans", "owners", "functions", "marks", "extras", "state", "held")
INDEXES = [("chunks", ["kind", "id"]), ("chunks", ["id"]), ("pieces", ["chunk", "n"]), ("spans", ["session", "kind", "last"]),
           ("spans", ["chunk"]), ("functions", ["key", "n"]), ("marks", ["session", "seq"]), ("extras", ["session", "seq"])]

Answer = TypeVar("Answer")


class MongoStore:
    """See `chunks.Store`.

    Args:
        database: by default `ipython-tasks`, with the cluster's id if it has one.
        connection_args, connection_kwargs: for `pymongo.MongoClient`.
    """

    name = "MongoDB"

    def __init__(self, database: str = "", connection_args: Iterable[Any] = (), connection_kwargs: Optional[dict[str, Any]] = None):
        self.database, self._args, self._kwargs = database, list(connection_args), dict(connection_kwargs or {})
        self._client: Any = None
        self._db: Any = None
        self._held = False
        self._unsure = False  # whether the last commit was cut short

    # --- opening

    def open(self, profile_dir: Path, cluster_id: str) -> State:
        """See Store."""
        try:
            import pymongo
            from pymongo import errors
        except ImportError:
            raise ConfigError("MongoDB needs the package pymongo: run `pip install pymongo`, or choose another database with "
                              "c.IPController.db_class.") from None
        self.database = self.database or "-".join(filter(None, (DATABASE, cluster_id)))
        kwargs = {"serverSelectionTimeoutMS": REACH_MS, "connectTimeoutMS": REACH_MS, "socketTimeoutMS": ANSWER_MS, **self._kwargs}
        try:
            self._client = pymongo.MongoClient(*self._args, **kwargs)
            self._db = self._client[self.database]
            self._client.admin.command("ping")
            return self._prepare()
        except (errors.InvalidName, errors.ConfigurationError, errors.InvalidURI, TypeError, ValueError) as e:
            self.close()
            raise ConfigError(f"MongoDB can't be used as c.MongoDB.database ({self.database!r}), connection_args and "
                              f"connection_kwargs say: {_short(e)}.") from None
        except errors.ConnectionFailure as e:
            self.close()
            raise ConfigError(f"the MongoDB server can't be reached: {_short(e)}; start it, or say where it is with "
                              "c.MongoDB.connection_args.") from None
        except (errors.PyMongoError, StoreError) as e:
            self.close()
            raise ConfigError(f"MongoDB can't be used: {_short(e)}.") from None
        except BaseException:
            self.close()
            raise

    def _prepare(self) -> State:
        holder = self._take_hold()
        if holder:
            raise AlreadyRunning(f"the MongoDB database {self.database!r} is in use by another controller ({holder}); stop that one, or "
                                 "give this one a database of its own with --MongoDB.database=NAME.")
        self._held = True
        for collection, keys in INDEXES:
            self._of(collection).create_index([(key, 1) for key in keys])
        last = self._newest("chunks", "id")
        state = {doc["_id"]: doc["value"] for doc in self._of("state").find({})}
        for collection in ("pieces", "spans"):
            self._of(collection).delete_many({"chunk": {"$gt": last}})
        owners = {bytes.fromhex(doc["_id"]): Owner(doc["cluster"], doc["end"] + ZERO, doc["width"] + ZERO, doc["reason"])
                  for doc in self._of("owners").find({})}
        return State(max(last, state.get("last", 0)) + 1, state.get("floor", 0), owners)

    def _newest(self, collection: str, key: str) -> int:
        found = list(self._of(collection).find({}, {key: 1}).sort([(key, -1)]).limit(1))
        return int(found[0][key]) if found else 0

    def _take_hold(self) -> str:
        """"", or who else has the database."""
        from pymongo.errors import DuplicateKeyError

        pid = os.getpid()
        ours = {"_id": "held", "host": socket.gethostname(), "pid": pid, "pid_start": files.process_start(pid), "beat": time.time()}
        while True:
            try:
                self._of("held").insert_one(dict(ours))
                return ""
            except DuplicateKeyError:
                found = self._of("held").find_one({"_id": "held"})
            if found is None:
                continue
            here = found["host"] == ours["host"]
            if files.process_alive(found["pid"], found["pid_start"]) if here else time.time() - found["beat"] < GONE_S:
                return f"pid {found['pid']} on {found['host']}"
            self._of("held").delete_one({"_id": "held", "pid": found["pid"], "beat": found["beat"]})

    def _of(self, collection: str) -> Any:
        return self._db[f"tasks_{collection}"]

    def close(self) -> None:
        """See Store."""
        client, self._client = self._client, None
        if client is not None:
            from pymongo.errors import PyMongoError

            with contextlib.suppress(PyMongoError):  # the server is gone, and there is nobody left to tell
                if self._held:
                    self._of("held").delete_one({"_id": "held", "pid": os.getpid()})
            self._held = False
            client.close()

    # --- writing

    def _try(self, do: Callable[[], Answer]) -> Answer:
        from pymongo import errors

        try:
            return do()
        except (errors.ConnectionFailure, errors.ExecutionTimeout, errors.WTimeoutError) as e:
            raise StoreError(f"the MongoDB server can't be reached: {_short(e)}", passing=True) from None
        except (errors.PyMongoError, errors.InvalidOperation) as e:
            raise StoreError(f"MongoDB refused it: {_short(e)}") from None

    def commit(self, change: Change) -> None:
        """See Store."""
        again, self._unsure = self._unsure, True
        self._try(lambda: self._write(change, again))
        self._unsure = False

    def _write(self, change: Change, again: bool) -> None:
        ids = [meta.id for meta, *_ in change.chunks]
        if again:
            for collection in ("pieces", "spans"):
                self._delete(collection, "chunk", ids)
            self._delete("chunks", "id", ids)
        for key, frames in change.functions.items():
            self._write_function("-".join(part.hex() for part in key), frames)
        for meta, _, frames, _ in change.chunks:
            for n, piece in enumerate(pieces(frames, PIECE_BYTES)):
                self._of("pieces").insert_one({"chunk": meta.id, "n": n, "data": piece})
        self._insert("spans", [{"session": s.session.hex(), "kind": meta.kind, "last": s.last - ZERO, "first": s.first - ZERO,
                                "chunk": meta.id} for meta, _, _, spans in change.chunks for s in spans])
        for session, owner in change.owners.items():
            self._set("owners", session.hex(), {**owner._asdict(), "end": owner.end - ZERO, "width": owner.width - ZERO})
        for meta, head, _, _ in change.chunks:
            for n, piece in enumerate(pieces([head], PIECE_BYTES)):
                if n:
                    self._of("pieces").insert_one({"chunk": meta.id, "n": -n, "data": piece})
        self._insert("chunks", [{**meta._asdict(), "_id": meta.id, "head": head[:PIECE_BYTES]} for meta, head, _, _ in change.chunks])
        self._write_drops(change)
        if ids:
            self._set("state", "last", {"value": ids[-1]})
        if change.floor is not None:
            self._set("state", "floor", {"value": change.floor})
            self._of("chunks").delete_many({"live": 0, "kind": HAPPENED, "id": {"$lt": change.floor}})

    def _write_drops(self, change: Change) -> None:
        self._insert("marks", [{"session": s.hex(), "seq": seq - ZERO} for s, seq in change.marks])
        for id, meta in change.metas.items():
            self._of("chunks").update_one({"id": id}, {"$set": {"live": meta.live}})
        for id in change.hollowed:
            head = self.head(id) or b""
            self._of("chunks").update_one({"id": id}, {"$set": {"live": 0, "size": len(head)}})
        gone = [*change.hollowed, *change.dropped]
        for id in gone:
            self._of("pieces").delete_many({"chunk": id, "n": {"$gte": 0}})
        self._delete("spans", "chunk", gone)
        self._delete("pieces", "chunk", change.dropped)
        self._delete("chunks", "id", change.dropped)
        for session, seq in change.unmarked:
            self._of("marks").delete_many({"session": session.hex(), "seq": seq - ZERO})
        for (session, seq), value in change.extras.items():
            self._of("extras").delete_many({"session": session.hex(), "seq": seq - ZERO})
            if value is not None:
                self._of("extras").insert_one({"session": session.hex(), "seq": seq - ZERO, "changes": value})

    def _write_function(self, key: str, frames: list[Any]) -> None:
        self._of("functions").delete_many({"key": key})
        lengths = [memoryview(frame).nbytes for frame in frames]
        for n, piece in enumerate(list(pieces(frames, PIECE_BYTES)) or [b""]):
            self._of("functions").insert_one({"key": key, "n": n, "lengths": lengths, "data": piece})

    def _insert(self, collection: str, documents: list[dict[str, Any]]) -> None:
        if documents:
            self._of(collection).insert_many(documents)

    def _delete(self, collection: str, key: str, values: list[int]) -> None:
        if values:
            self._of(collection).delete_many({key: {"$in": values}})

    def _set(self, collection: str, id: str, values: dict[str, Any]) -> None:
        self._of(collection).update_one({"_id": id}, {"$set": values}, upsert=True)

    def beat(self) -> None:
        """See Store."""
        ours = {"_id": "held", "pid": os.getpid(), "host": socket.gethostname()}
        try:
            done = self._try(lambda: self._of("held").update_one(ours, {"$set": {"beat": time.time()}}))
        except StoreError as e:
            if e.passing:
                return  # the next write says so
            raise
        if not done.matched_count:
            raise StoreError(f"the MongoDB database {self.database!r} has been taken by another controller")

    def vacuum(self) -> None:
        """See Store."""
        for collection in COLLECTIONS:
            self._try(lambda: self._db.command("compact", f"tasks_{collection}"))  # noqa: B023  # called at once

    # --- reading

    def _find(self, collection: str, query: dict[str, Any], order: str, limit: int = 0) -> list[dict[str, Any]]:
        return self._try(lambda: list(self._of(collection).find(query).sort([(order, 1)]).limit(limit)))

    def metas(self, kind: Optional[str], after: int, limit: int) -> list[Meta]:
        """See Store."""
        query: dict[str, Any] = {"id": {"$gt": after}, **({"kind": kind} if kind else {})}
        wanted = dict.fromkeys(Meta._fields, 1)
        return self._try(lambda: [_meta(doc) for doc in self._of("chunks").find(query, wanted).sort([("id", 1)]).limit(limit)])

    def totals(self) -> dict[str, tuple[int, int, int]]:
        """See Store."""
        found: dict[str, tuple[int, int, int]] = {}
        for doc in self._try(lambda: list(self._of("chunks").find({}, {"kind": 1, "live": 1, "size": 1}))):
            n, live, size = found.get(doc["kind"], (0, 0, 0))
            found[doc["kind"]] = (n + 1, live + doc["live"], size + doc["size"])
        return found

    def meta(self, chunk: int) -> Optional[Meta]:
        """See Store."""
        return next(map(_meta, self._find("chunks", {"id": chunk}, "id")), None)

    def head(self, chunk: int) -> Optional[bytes]:
        """See Store."""
        found = self._find("chunks", {"id": chunk}, "id")
        if not found:
            return None
        more = self._find("pieces", {"chunk": chunk, "n": {"$lt": 0}}, "n") if len(found[0]["head"]) == PIECE_BYTES else []
        return bytes(found[0]["head"]) + b"".join(doc["data"] for doc in reversed(more))

    def data(self, chunk: int) -> bytes:
        """See Store."""
        return b"".join(doc["data"] for doc in self._find("pieces", {"chunk": chunk, "n": {"$gte": 0}}, "n"))

    def spanning(self, session: bytes, kind: str, first: int, last: int, width: int) -> list[int]:
        """See Store."""
        query = {"session": session.hex(), "kind": kind, "first": {"$lte": last - ZERO},
                 "last": {"$gte": first - ZERO, "$lte": min(ZERO - 1, last + width - ZERO)}}
        return sorted({doc["chunk"] for doc in self._find("spans", query, "chunk")})

    def marked(self, session: bytes, first: int, last: int) -> list[int]:
        """See Store."""
        query = {"session": session.hex(), "seq": {"$gte": first - ZERO, "$lte": last - ZERO}}
        return [doc["seq"] + ZERO for doc in self._find("marks", query, "seq")]

    def extras(self, session: bytes, first: int, last: int) -> dict[int, bytes]:
        """See Store."""
        query = {"session": session.hex(), "seq": {"$gte": first - ZERO, "$lte": last - ZERO}}
        return {doc["seq"] + ZERO: bytes(doc["changes"]) for doc in self._find("extras", query, "seq")}

    def function(self, session: bytes, digest: bytes) -> Optional[list[Any]]:
        """See Store."""
        found = self._find("functions", {"key": f"{session.hex()}-{digest.hex()}"}, "n")
        data, at, frames = b"".join(doc["data"] for doc in found), 0, []
        for length in found[0]["lengths"] if found else ():
            frames.append(data[at : at + length])
            at += length
        return frames if found else None

    def stats(self) -> dict[str, Any]:
        """See Store."""
        return {"server": ", ".join(f"{host}:{port}" for host, port in sorted(self._client.nodes)), "name": self.database}


def _meta(doc: dict[str, Any]) -> Meta:
    return Meta(*[doc[field] for field in Meta._fields])


def _short(e: Exception) -> str:
    """The first words of what pymongo says, which is long."""
    text = str(e).partition(" (configured timeouts")[0].partition(", Timeout:")[0]
    return text if len(text) <= 200 else text[:197] + "..."


class MongoDB(Journal):
    """Records in a MongoDB server.

    Args:
        database, connection_args, connection_kwargs: see `MongoStore`.
        limits: see `Journal`.
    """

    def __init__(self, database: str = "", connection_args: Iterable[Any] = (), connection_kwargs: Optional[dict[str, Any]] = None,
                 **limits: Any):
        super().__init__(MongoStore(database, connection_args, connection_kwargs), **limits)
