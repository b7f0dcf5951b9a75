"""Task records in a file: a journal over SQLite, of the standard library.

    <profile>/tasks.db ◄── one connection, which has the file to itself ──► <profile>/tasks.db.lock says whose it is

Tables, each with the name that was chosen before it: chunks, their data in pieces, spans, owners (of sessions), functions,
marks, extras, and what holds for all of it (`state`). Numbers of tasks reach to 2**64 and SQLite's to 2**63, so they are
kept less 2**63.

Rules that hold here: nothing needs shared memory, or locks that the file system can be trusted with; a file that we did not
write, can't read whole, or that another controller has is left as it is, with a sentence; a file of an older version is
brought up to date in one transaction.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import sqlite3
from pathlib import Path
from typing import Any, Callable, Iterable, Optional, TypeVar
from urllib.parse import quote

from . import files
from .chunks import HAPPENED, Change, Meta, Owner, State, StoreError, pieces
from .errors import AlreadyRunning, ConfigError
from .journal import Journal

APPLICATION = 0x49504354  # marks our files
VERSION = 2
FILE = "tasks.db"
TABLE = "ipython-tasks"
TABLE_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_-]{0,63}\Z")
PIECE_BYTES = 256 << 20  # SQLite takes no more than 10**9 at once
CHECKED_BYTES = 256 << 20  # a larger file is not read from end to end before it is used
ZERO = 1 << 63
BUSY_S = 1.0

# The tables; {} stands for the name that was chosen.
SCHEMA = """
CREATE TABLE "{}" (id INTEGER PRIMARY KEY, kind TEXT, live INTEGER, size INTEGER, time REAL, head BLOB);
CREATE INDEX "{} kinds" ON "{}" (kind, id);
CREATE INDEX "{} dead" ON "{}" (id) WHERE live = 0;
CREATE TABLE "{} pieces" (chunk INTEGER, n INTEGER, data BLOB, PRIMARY KEY (chunk, n));
CREATE TABLE "{} spans" (session BLOB, kind TEXT, last INTEGER, first INTEGER, chunk INTEGER,
                         PRIMARY KEY (session, kind, last, chunk)) WITHOUT ROWID;
CREATE INDEX "{} chunks" ON "{} spans" (chunk);
CREATE TABLE "{} owners" (session BLOB PRIMARY KEY, cluster TEXT, end INTEGER, width INTEGER, reason TEXT) WITHOUT ROWID;
CREATE TABLE "{} functions" (session BLOB, digest BLOB, lengths TEXT, data BLOB, PRIMARY KEY (session, digest));
CREATE TABLE "{} marks" (session BLOB, seq INTEGER, PRIMARY KEY (session, seq)) WITHOUT ROWID;
CREATE TABLE "{} extras" (session BLOB, seq INTEGER, changes BLOB, PRIMARY KEY (session, seq)) WITHOUT ROWID;
CREATE TABLE "{} state" (name TEXT PRIMARY KEY, value INTEGER) WITHOUT ROWID;
"""

# Schema version -> what makes the next one of it.
MIGRATIONS = {
    1: """
ALTER TABLE "{} owners" ADD COLUMN reason TEXT DEFAULT '';
CREATE INDEX "{} dead" ON "{}" (id) WHERE live = 0;
""",
}

Answer = TypeVar("Answer")


def _statements(script: str, table: str) -> list[str]:
    return [part.replace("{}", table) for part in script.split(";") if part.strip()]


def _signed(number: int) -> int:
    return number - ZERO


class SQLiteStore:
    """See `chunks.Store`.

    Args:
        filename, location: the file, by default `tasks.db` in the profile directory, `tasks-<cluster id>.db` if the cluster
            has an id; it is the same for all clusters of a profile if a table or file was chosen.
        table: of the tasks.
        create: whether to make the file and table if they are not there.

    Raises:
        ConfigError: the table's name is none.
    """

    name = "SQLiteDB"

    def __init__(self, filename: str = "", location: str = "", table: str = "", create: bool = True):
        if table and not TABLE_NAME.match(table) or table.lower().startswith("sqlite"):
            raise ConfigError(f"c.SQLiteDB.table is {table[:100]!r}, which is no name for a table: that is at most 64 letters, digits, "
                              "_ and -, the first a letter, and not sqlite.")
        self._filename, self._location, self.table, self._create = filename, location, table or TABLE, create
        self._shared = bool(table)
        self.path = Path()
        self._lock: Optional[Path] = None
        self._db: Any = None

    # --- opening

    def where(self, profile_dir: Path, cluster_id: str) -> Path:
        """The file of a cluster."""
        own = cluster_id and not self._shared
        name = self._filename or (f"tasks-{cluster_id}.db" if own else FILE)
        return Path(os.path.abspath(os.path.join(profile_dir, os.path.expanduser(self._location), os.path.expanduser(name))))

    def open(self, profile_dir: Path, cluster_id: str) -> State:
        """See Store."""
        self.path = self.where(profile_dir, cluster_id)
        if self.path.is_dir():
            raise ConfigError(f"{self.path} is a directory; give c.SQLiteDB.filename the name of a file.")
        lock = self.path.with_name(self.path.name + ".lock")
        holder = files.take_hold(lock)
        if holder:
            raise AlreadyRunning(f"{self.path} is in use by another controller ({holder}); stop that one, or give this one a file of "
                                 "its own with --SQLiteDB.filename=NAME.")
        self._lock = lock
        try:
            return self._open()
        except sqlite3.Error as e:
            raise ConfigError(f"{self.path} can't be used: {_why(e)}; restore it from a copy, or move it away to begin a new "
                              "one.") from None
        except OSError as e:
            raise ConfigError(f"{self.path} can't be used: {e.strerror}; give c.SQLiteDB.filename another name.") from None
        finally:
            if self._db is None:
                self.close()

    def _open(self) -> State:
        os.close(os.open(self.path, os.O_RDWR | (os.O_CREAT if self._create else 0), 0o600))
        db = self._connect("" if _can_lock(self._lock) else "&nolock=1")  # our own lock needs no such help
        try:
            self._prepare(db)
            (last,) = db.execute(f'SELECT coalesce(max(id), 0) FROM "{self.table}"').fetchone()
            state = dict(db.execute(f'SELECT name, value FROM "{self.table} state"'))
            owners = {session: Owner(cluster, end + ZERO, width + ZERO, reason or "") for session, cluster, end, width, reason in
                      db.execute(f'SELECT session, cluster, "end", width, reason FROM "{self.table} owners"')}
        except BaseException:
            db.close()
            raise
        self._db = db
        return State(max(last, state.get("last", 0)) + 1, state.get("floor", 0), owners)

    def _connect(self, how: str) -> sqlite3.Connection:
        """A connection that has the file to itself, and a transaction open."""
        uri = f"file:{quote(str(self.path))}?mode=rw{how}"
        db = sqlite3.connect(uri, uri=True, timeout=BUSY_S, isolation_level=None, check_same_thread=False)
        try:
            db.execute("PRAGMA locking_mode = EXCLUSIVE")
            db.execute("PRAGMA synchronous = FULL")
            db.execute("PRAGMA journal_mode = TRUNCATE").fetchall()  # a WAL needs shared memory
            db.execute("BEGIN EXCLUSIVE")
            db.execute("SELECT count(*) FROM sqlite_master").fetchall()
        except BaseException:
            db.close()
            raise
        return db

    def _prepare(self, db: sqlite3.Connection) -> None:
        """Check that the file is ours and whole; make the tables, or bring them up to date."""
        (application,), (version,) = db.execute("PRAGMA application_id").fetchone(), db.execute("PRAGMA user_version").fetchone()
        tables = {name for (name,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        if tables and application != APPLICATION:
            whose = "of IPython Parallel" if TABLE in tables else "of another program"
            raise ConfigError(f"{self.path} is {whose}; give c.SQLiteDB.filename another name.")
        if version > VERSION:
            raise ConfigError(f"{self.path} was written by a newer version ({version}, ours is {VERSION}); use that one, or give "
                              "c.SQLiteDB.filename another name.")
        if self.path.stat().st_size <= CHECKED_BYTES:
            (found,) = db.execute("PRAGMA quick_check(1)").fetchone()
            if found != "ok":
                raise sqlite3.DatabaseError(f"it is damaged ({' '.join(found.split())})")
        if self.table not in tables and not self._create:
            there = ", ".join(name[:-len(" spans")] for name in sorted(tables) if name.endswith(" spans"))
            raise ConfigError(f"{self.path} has no table {self.table!r}; it has {there or 'none'}.")
        if not tables:
            db.execute(f"PRAGMA application_id = {APPLICATION}")
        for old in range(version or VERSION, VERSION):
            for table in [name[:-len(" spans")] for name in tables if name.endswith(" spans")]:
                for statement in _statements(MIGRATIONS[old], table):
                    db.execute(statement)
        if version != VERSION:
            db.execute(f"PRAGMA user_version = {VERSION}")
        if self.table not in tables:
            for statement in _statements(SCHEMA, self.table):
                db.execute(statement)
        else:  # what was killed may have left data of a chunk that is not there
            db.execute(f'DELETE FROM "{self.table} functions" WHERE session NOT IN (SELECT session FROM "{self.table} spans")')
        db.execute("COMMIT")

    def close(self) -> None:
        """See Store."""
        if self._db is not None:
            with contextlib.suppress(sqlite3.Error):
                self._db.execute("PRAGMA journal_mode = DELETE")  # leaves no empty file behind
            self._db.close()
            self._db = None
        if self._lock is not None:
            if files.keep_hold(self._lock):  # else it is another's by now
                self._lock.unlink(missing_ok=True)
            self._lock = None

    # --- writing

    def _try(self, do: Callable[[], Answer]) -> Answer:
        try:
            return do()
        except sqlite3.Error as e:
            raise StoreError(f"{self.path} can't be used: {_why(e)}") from None

    def commit(self, change: Change) -> None:
        """See Store."""
        def do() -> None:
            db = self._db
            db.execute("BEGIN IMMEDIATE")
            try:
                self._write(change)
                db.execute("COMMIT")
            except BaseException:
                if db.in_transaction:
                    db.execute("ROLLBACK")
                raise
        self._try(do)

    def _many(self, statement: str, rows: Iterable[tuple[Any, ...]]) -> None:
        self._db.executemany(statement.replace("{}", self.table), rows)

    def _write(self, change: Change) -> None:
        for meta, head, frames, spans in change.chunks:
            self._many('INSERT INTO "{}" VALUES (?, ?, ?, ?, ?, ?)', [(*meta, head)])
            self._many('INSERT INTO "{} pieces" VALUES (?, ?, ?)',
                       [(meta.id, n, piece) for n, piece in enumerate(pieces(frames, PIECE_BYTES))])
            self._many('INSERT INTO "{} spans" VALUES (?, ?, ?, ?, ?)',
                       [(s.session, meta.kind, _signed(s.last), _signed(s.first), meta.id) for s in spans])
        self._many('INSERT OR REPLACE INTO "{} functions" VALUES (?, ?, ?, ?)',
                   [(*key, ",".join(str(memoryview(f).nbytes) for f in frames), b"".join(frames))
                    for key, frames in change.functions.items()])
        self._many('INSERT OR REPLACE INTO "{} owners" (session, cluster, "end", width, reason) VALUES (?, ?, ?, ?, ?)',
                   [(session, o.cluster, _signed(o.end), _signed(o.width), o.reason) for session, o in change.owners.items()])
        self._many('UPDATE "{}" SET live = ? WHERE id = ?', [(meta.live, id) for id, meta in change.metas.items()])
        gone = [(id,) for id in (*change.hollowed, *change.dropped)]
        self._many('DELETE FROM "{} pieces" WHERE chunk = ?', gone)
        self._many('DELETE FROM "{} spans" WHERE chunk = ?', gone)
        self._many('UPDATE "{}" SET live = 0, size = length(head) WHERE id = ?', [(id,) for id in change.hollowed])
        self._many('DELETE FROM "{}" WHERE id = ?', [(id,) for id in change.dropped])
        self._many('INSERT OR IGNORE INTO "{} marks" VALUES (?, ?)', [(s, _signed(seq)) for s, seq in change.marks])
        self._many('DELETE FROM "{} marks" WHERE session = ? AND seq = ?', [(s, _signed(seq)) for s, seq in change.unmarked])
        self._many('DELETE FROM "{} extras" WHERE session = ? AND seq = ?', [(s, _signed(q)) for (s, q) in change.extras])
        self._many('INSERT INTO "{} extras" VALUES (?, ?, ?)',
                   [(s, _signed(q), value) for (s, q), value in change.extras.items() if value is not None])
        if change.chunks:
            self._many('INSERT OR REPLACE INTO "{} state" VALUES (?, ?)', [("last", change.chunks[-1][0].id)])
        if change.floor is not None:
            self._many('INSERT OR REPLACE INTO "{} state" VALUES (?, ?)', [("floor", change.floor)])
            self._many('DELETE FROM "{}" WHERE live = 0 AND id < ? AND kind = ?', [(change.floor, HAPPENED)])

    def beat(self) -> None:
        """See Store."""
        if self._lock is not None and not files.keep_hold(self._lock):
            raise StoreError(f"{self.path} has been taken by another controller")

    def vacuum(self) -> None:
        """See Store."""
        self._try(lambda: self._db.execute("VACUUM"))

    # --- reading

    def _ask(self, statement: str, *values: Any) -> list[tuple[Any, ...]]:
        return self._try(lambda: list(self._db.execute(statement.replace("{}", self.table), values)))

    def metas(self, kind: Optional[str], after: int, limit: int) -> list[Meta]:
        """See Store."""
        of, values = ("kind = ? AND", [kind]) if kind else ("", [])
        return [Meta(*row) for row in self._ask(f'SELECT id, kind, live, size, time FROM "{{}}" WHERE {of} id > ? ORDER BY id LIMIT ?',
                                                *values, after, limit)]

    def totals(self) -> dict[str, tuple[int, int, int]]:
        """See Store."""
        return {kind: (n, live, size) for kind, n, live, size in
                self._ask('SELECT kind, count(*), sum(live), sum(size) FROM "{}" GROUP BY kind')}

    def meta(self, chunk: int) -> Optional[Meta]:
        """See Store."""
        return next((Meta(*row) for row in self._ask('SELECT id, kind, live, size, time FROM "{}" WHERE id = ?', chunk)), None)

    def head(self, chunk: int) -> Optional[bytes]:
        """See Store."""
        return next((head for (head,) in self._ask('SELECT head FROM "{}" WHERE id = ?', chunk)), None)

    def data(self, chunk: int) -> bytes:
        """See Store."""
        found = self._ask('SELECT data FROM "{} pieces" WHERE chunk = ? ORDER BY n', chunk)
        return found[0][0] if len(found) == 1 else b"".join([piece for (piece,) in found])

    def spanning(self, session: bytes, kind: str, first: int, last: int, width: int) -> list[int]:
        """See Store."""
        end = min(ZERO - 1, _signed(last + width))
        found = self._ask('SELECT chunk FROM "{} spans" WHERE session = ? AND kind = ? AND last BETWEEN ? AND ? AND first <= ?',
                          session, kind, _signed(first), end, _signed(last))
        return sorted(chunk for (chunk,) in found)

    def marked(self, session: bytes, first: int, last: int) -> list[int]:
        """See Store."""
        found = self._ask('SELECT seq FROM "{} marks" WHERE session = ? AND seq BETWEEN ? AND ?', session, _signed(first), _signed(last))
        return [seq + ZERO for (seq,) in found]

    def extras(self, session: bytes, first: int, last: int) -> dict[int, bytes]:
        """See Store."""
        return {seq + ZERO: changes for seq, changes in
                self._ask('SELECT seq, changes FROM "{} extras" WHERE session = ? AND seq BETWEEN ? AND ?',
                          session, _signed(first), _signed(last))}

    def function(self, session: bytes, digest: bytes) -> Optional[list[Any]]:
        """See Store."""
        for lengths, data in self._ask('SELECT lengths, data FROM "{} functions" WHERE session = ? AND digest = ?', session, digest):
            frames, at = [], 0
            for length in map(int, lengths.split(",")):
                frames.append(data[at : at + length])
                at += length
            return frames
        return None

    def stats(self) -> dict[str, Any]:
        """See Store."""
        return {"file": str(self.path), "table": self.table, "file_bytes": self.path.stat().st_size}


class SQLiteDB(Journal):
    """Records in a file.

    Args:
        filename, location, table, create: see `SQLiteStore`.
        limits: see `Journal`.
    """

    def __init__(self, filename: str = "", location: str = "", table: str = "", create: bool = True, **limits: Any):
        super().__init__(SQLiteStore(filename, location, table, create), **limits)


def _can_lock(path: Optional[Path]) -> bool:
    """Does the file system of a file, which nobody else locks, know what a lock is?"""
    with open(path or os.devnull, "rb+") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
    return True


def _why(e: sqlite3.Error) -> str:
    """What SQLite says, in words that tell what to do."""
    text = str(e)
    for part, words in [("full", "the disk is full"), ("readonly", "it is read-only"), ("not a database", "it is not an SQLite file"),
                        ("malformed", "it is damaged"), ("locked", "another program has it open"),
                        ("unable to open", "it can't be opened")]:
        if part in text:
            return f"{words} (SQLite: {text})"
    return text if text.startswith("it is damaged") else f"SQLite: {text}"
