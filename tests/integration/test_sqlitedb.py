"""A file of task records: what kills, full disks and other people's files do to it."""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from recording import BOB, finish, name, submit
from support import eventually, need

from ipclite.errors import AlreadyRunning, ConfigError, NoRecord
from ipclite.sqlitedb import APPLICATION, SCHEMA, VERSION, SQLiteDB

ROOT = Path(__file__).resolve().parents[2]
# Submits and finishes for ever, and prints how far the records are safe; begins where the last run ended.
WRITER = textwrap.dedent("""
    import sys, time
    from pathlib import Path
    from recording import finish, submit
    from ipclite.sqlitedb import SQLiteDB

    db = SQLiteDB()
    db.open(Path(sys.argv[1]), "")
    left = [task.key[1] for task in db.unfinished()]
    print("left", *left, flush=True)
    if left:
        finish(db, left)
    seq = int(sys.argv[2])
    while True:
        submit(db, range(seq, seq + 100))
        finish(db, range(seq, seq + 90))
        seq += 100
        for item in db.collect():
            print("safe", type(item).__name__, item.seqs[0], len(item.seqs), flush=True)
        time.sleep(0.001)
""")


@pytest.fixture
def open_(tmp_path):
    """Open the file of the test's folder, after closing what was opened before."""
    opened = []

    def reopen(**options):
        while opened:
            opened.pop().close()
        db = SQLiteDB(**options)
        db.open(tmp_path, "")
        opened.append(db)
        return db

    yield reopen
    while opened:
        opened.pop().close()


def test_kill_9_at_any_moment_loses_nothing_that_was_safe(tmp_path, open_):
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    submitted, finished, seq = set(), set(), 1
    for _ in range(8):
        writer = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path), str(seq)], env=env, stdout=subprocess.PIPE, text=True)
        assert writer.stdout.readline().startswith("left")
        for _ in range(random.randrange(1, 60)):
            word, kind, first, n = writer.stdout.readline().split()
            numbers = range(int(first), int(first) + int(n))
            (submitted if kind == "Batch" else finished).update(numbers)
            seq = max(seq, numbers.stop)
        writer.send_signal(signal.SIGKILL)
        writer.communicate()
        seq += 1_000_000  # beyond what was told and may or may not be there
    db = open_()
    status = {int(r["msg_id"].split("-")[1]): r["status"] for r in db.find_records({}, ["status"])}
    assert submitted <= set(status) and all(status[n] == "ok" for n in finished)
    assert {u.key[1] for u in db.unfinished()} == {n for n, s in status.items() if s == "pending"}
    assert len(submitted) > 500 and db.get_record(name(min(finished)))["result_buffers"] == [b"value"]


def test_a_full_disk_is_said_and_what_was_safe_stays(tmp_path, open_):
    db = open_()
    submit(db, [1], payload=b"x" * 1000)
    finish(db, [1])
    assert db.get_record(name(1))["status"] == "ok"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, ((tmp_path / "tasks.db").stat().st_size + 100_000, hard))
    try:
        submit(db, [2], payload=b"y" * 1_000_000)
        eventually(lambda: db.failed)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "no records of tasks are kept any more" in db.failed and str(tmp_path) in db.failed
    assert not db.persists and not db.keeps
    submit(db, [3])
    for ask in (lambda: db.get_record(name(1)), db.get_history, lambda: db.drop_record(name(1)), db.stats):
        with pytest.raises(NoRecord, match="no records of tasks are kept any more"):
            ask()
    db = open_()
    assert db.get_history() == [name(1)] and db.get_record(name(1))["buffers"] == [b"x" * 1000]


@pytest.mark.skipif(os.geteuid() != 0 or sys.platform != "linux", reason="mounting takes root, and Linux's options")
def test_a_small_disk(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", disk], check=True)
    try:
        db = SQLiteDB()
        db.open(disk, "")
        submit(db, [1])
        assert db.get_history() == [name(1)]
        submit(db, [2], payload=b"y" * 3_000_000)
        eventually(lambda: db.failed)
        assert "the disk is full" in db.failed
        db.close()
        db = SQLiteDB()
        db.open(disk, "")
        assert [u.key[1] for u in db.unfinished()] == [1]
        db.close()
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        with pytest.raises(ConfigError, match="can't be (written|used)"):
            SQLiteDB().open(disk, "")
    finally:
        subprocess.run(["umount", disk], check=True)


def refused(folder, **options):
    """The sentence with which a file is refused; the file stays as it is."""
    file = folder / "tasks.db"
    before = file.read_bytes() if file.is_file() else None
    db = SQLiteDB(**options)
    with pytest.raises(ConfigError) as caught:
        db.open(folder, "")
    db.close()
    assert (file.read_bytes() if file.is_file() else None) == before
    assert [path.name for path in folder.iterdir() if path.suffix == ".lock"] == []
    assert "\n" not in str(caught.value) and str(file) in str(caught.value)
    return str(caught.value)


def test_a_file_that_is_no_database(tmp_path):
    (tmp_path / "tasks.db").write_text("Dear diary,\n" * 1000)
    assert "is not an SQLite file" in refused(tmp_path) and "move it away" in refused(tmp_path)


def test_a_directory(tmp_path):
    (tmp_path / "tasks.db").mkdir()
    assert "is a directory" in refused(tmp_path)


def fill(open_, n=3000):
    db = open_()
    for first in range(1, n, 100):
        submit(db, range(first, first + 100), payload=os.urandom(200))
        finish(db, range(first, first + 50), payload=os.urandom(200))
    assert db.get_history()
    db.close()


@pytest.mark.parametrize("share", [0.2, 0.5, 0.99])
def test_a_truncated_file(tmp_path, open_, share):
    fill(open_)
    file = tmp_path / "tasks.db"
    os.truncate(file, int(file.stat().st_size * share))
    assert "damaged" in refused(tmp_path)


def test_a_damaged_file(tmp_path, open_):
    fill(open_)
    file = tmp_path / "tasks.db"
    content = bytearray(file.read_bytes())
    for at in range(5000, len(content), 4096):
        content[at : at + 500] = os.urandom(500)
    file.write_bytes(content)
    assert "damaged" in refused(tmp_path)


@pytest.mark.parametrize("table, word", [("ipython-tasks", "of IPython Parallel"), ("bookmarks", "of another program")])
def test_other_people_s_files(tmp_path, table, word):
    with sqlite3.connect(tmp_path / "tasks.db") as db:
        db.execute(f'CREATE TABLE "{table}" (msg_id dict PRIMARY KEY, header dict)')
    db.close()
    assert word in refused(tmp_path) and "another name" in refused(tmp_path)


def test_a_file_of_a_newer_version(tmp_path, open_):
    open_().close()
    with sqlite3.connect(tmp_path / "tasks.db") as db:
        db.execute(f"PRAGMA user_version = {VERSION + 1}")
    db.close()
    assert "newer version" in refused(tmp_path)


def test_a_file_that_somebody_looks_into(tmp_path, open_):
    open_().close()
    other = sqlite3.connect(tmp_path / "tasks.db")
    other.execute("BEGIN EXCLUSIVE")
    assert "another program has it open" in refused(tmp_path)
    other.close()
    assert open_().get_history() == []


def test_a_file_of_an_older_version_is_brought_up_to_date(tmp_path, open_):
    db = open_(table="mine")
    submit(db, [1, 2, 3])
    finish(db, [2])
    db.get_history()
    db.close()
    with sqlite3.connect(tmp_path / "tasks.db") as old:  # what version 1 did not have
        old.execute('DROP INDEX "mine dead"')
        old.execute('ALTER TABLE "mine owners" DROP COLUMN reason')
        old.execute("PRAGMA user_version = 1")
    old.close()
    db = open_(table="mine")
    assert [u.key[1] for u in db.unfinished()] == [1, 3] and db.get_record(name(2))["status"] == "ok"
    db.close()
    with sqlite3.connect(tmp_path / "tasks.db") as new, sqlite3.connect(":memory:") as fresh:
        fresh.executescript(SCHEMA.replace("{}", "mine"))
        shape = "SELECT type, name FROM sqlite_master WHERE name NOT LIKE 'sqlite_%' ORDER BY name"
        assert new.execute(shape).fetchall() == fresh.execute(shape).fetchall()
        assert new.execute("PRAGMA user_version").fetchone() == (VERSION,)
        assert new.execute("PRAGMA application_id").fetchone() == (APPLICATION,)
    for connection in (new, fresh):
        connection.close()


def test_tables_are_apart(tmp_path, open_):
    submit(open_(table="one"), [1])
    db = open_(table="two")
    submit(db, [1], BOB)
    assert db.get_history() == [name(1, BOB)]
    assert open_(table="one").get_history() == [name(1)]
    assert SQLiteDB(table="one").store.where(tmp_path, "x") == tmp_path / "tasks.db"


def test_records_are_private(tmp_path, open_):
    before = os.umask(0)
    try:
        fill(open_, 200)
    finally:
        os.umask(before)
    assert [path.name for path in tmp_path.iterdir()] == ["tasks.db"]
    assert (tmp_path / "tasks.db").stat().st_mode & 0o777 == 0o600


def test_vacuum_gives_back_room(tmp_path, open_):
    db = open_()
    submit(db, [1], payload=os.urandom(2_000_000))
    finish(db, [1])
    assert db.get_history() == [name(1)]
    submit(db, [2])
    db.drop_record(name(1))
    before = db.stats()["file_bytes"]
    assert before > 2_000_000 > db.vacuum()["file_bytes"]
    assert db.get_history() == [name(2)]


NO_LOCKS = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
static int none(int command) { return command == F_SETLK || command == F_GETLK || command == F_SETLKW; }
#define WRAP(name) int name(int fd, int command, ...) { va_list args; va_start(args, command); void *arg = va_arg(args, void *); \\
    va_end(args); if (none(command)) { errno = ENOLCK; return -1; } \\
    return ((int (*)(int, int, void *))dlsym(RTLD_NEXT, #name))(fd, command, arg); }
WRAP(fcntl)
WRAP(fcntl64)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="LD_PRELOAD is Linux's")
def test_a_file_system_that_can_not_lock(tmp_path):
    compiler = shutil.which("cc") or shutil.which("gcc")
    need(compiler, "a C compiler, to make such a file system with,")
    (tmp_path / "locks.c").write_text(NO_LOCKS)
    subprocess.run([compiler, "-shared", "-fPIC", "-o", tmp_path / "locks.so", tmp_path / "locks.c", "-ldl"], check=True)
    script = textwrap.dedent("""
        import sys
        from pathlib import Path
        from recording import finish, name, submit
        from ipclite.errors import AlreadyRunning
        from ipclite.sqlitedb import SQLiteDB

        for round in range(2):
            db = SQLiteDB()
            db.open(Path(sys.argv[1]), "")
            submit(db, [round + 1])
            print(len(db.get_history()))
            try:
                SQLiteDB().open(Path(sys.argv[1]), "")
            except AlreadyRunning as e:
                print(e)
            db.close()
    """)
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]), "LD_PRELOAD": str(tmp_path / "locks.so")}
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    lines = done.stdout.splitlines()
    assert (lines[0], lines[2]) == ("1", "2") and "in use by another controller" in lines[1], done.stderr


@pytest.mark.parametrize("head", [b"", b"{", b"[[1, 2]]", b'[["b", "zz", [], []]]'])
def test_a_file_with_records_that_are_none(tmp_path, open_, head):
    db = open_()
    submit(db, [1, 2])
    db.get_history()
    db.close()
    with sqlite3.connect(tmp_path / "tasks.db") as damaged:
        damaged.execute('UPDATE "ipython-tasks" SET head = ?', [head])
    damaged.close()
    with pytest.raises(ConfigError, match="the records in SQLiteDB can't be used"):
        open_()
    assert [path.name for path in tmp_path.iterdir()] == ["tasks.db"], "nothing holds it"


def test_damage_that_is_found_later_fails_the_question_alone(tmp_path, open_):
    db = open_()
    submit(db, range(1, 20), payload=b"x" * 100)
    finish(db, range(1, 20))
    db.get_history()
    submit(db, range(21, 30))
    finish(db, range(21, 30))
    db.get_history()
    db.close()
    with sqlite3.connect(tmp_path / "tasks.db") as damaged:
        damaged.execute('UPDATE "ipython-tasks pieces" SET data = ? WHERE chunk = 1', [b"\0" * 50])
    damaged.close()
    db = open_()
    with pytest.raises(NoRecord, match="damaged"):
        db.get_record(name(5))
    assert db.get_record(name(25))["buffers"] == [b"args"]
    submit(db, [40])
    assert db.persists and db.get_record(name(40))["status"] == "pending"


def test_a_lock_of_a_dead_controller_does_not_count(tmp_path, open_):
    lock = tmp_path / "tasks.db.lock"
    for holder in ({"host": socket.gethostname(), "pid": 2**22 + 1, "pid_start": "1"}, {"host": "elsewhere", "pid": 1, "pid_start": "1"}):
        lock.write_text(json.dumps(holder))
        if holder["host"] == "elsewhere":
            with pytest.raises(AlreadyRunning, match="pid 1 on elsewhere"):
                open_()
        os.utime(lock, (0, 0))  # that one has said nothing for long
        assert open_().get_history() == []
        assert json.loads(lock.read_text())["pid"] == os.getpid()


def test_a_file_that_is_taken_away_is_given_up(tmp_path, open_, monkeypatch):
    monkeypatch.setattr("ipclite.journal.BEAT_S", 0.05)
    db = open_()
    (tmp_path / "tasks.db.lock").write_text(json.dumps({"host": "elsewhere", "pid": 1, "pid_start": "1"}))
    eventually(lambda: db.failed)
    assert "has been taken by another controller" in db.failed
