"""Task records in a MongoDB server: one that is down, slow, goes away and comes back; large records; clusters over it."""

from __future__ import annotations

import os
import shutil
import signal
import sys
from pathlib import Path

import pytest
from places import Service
from recording import finish, name, submit
from shell import one_sentence, run
from support import eventually, need

import ipclite as ipp
from ipclite.errors import ConfigError, NoRecord
from ipclite.mongodb import MongoDB


@pytest.fixture
def server(tmp_path):
    """A server of the test's own; stopping and killing it is fine."""
    need(shutil.which("mongod") or Path(sys.executable).with_name("nx-27017").exists(), "mongod or nx-27017")
    with Service("mongo.sh", (), ("MONGO_PORT", 1), PYTHON=sys.executable) as service:
        yield service


@pytest.fixture
def open_(server, tmp_path):
    """Open the test's database, after closing what was opened before."""
    opened = []

    def reopen(**kwargs):
        while opened:
            opened.pop().close()
        db = MongoDB("mine", [os.environ["MONGO_URI"]], {"serverSelectionTimeoutMS": 500, "socketTimeoutMS": 500, **kwargs})
        db.open(tmp_path, "")
        opened.append(db)
        return db

    yield reopen
    while opened:
        opened.pop().close()


def pid():
    return int(os.environ["MONGO_PID"])


def trouble(db):
    """What is said to who asks, if something is wrong."""
    try:
        db.get_history()
    except NoRecord as e:
        return str(e)
    return ""


def test_a_server_that_goes_away_and_comes_back_loses_nothing(server, open_, monkeypatch):
    monkeypatch.setattr("ipclite.journal.RETRY_S", 0.1)
    db = open_()
    submit(db, [1, 2])
    finish(db, [1])
    assert len(db.get_history()) == 2
    os.kill(pid(), signal.SIGKILL)
    submit(db, [3])
    finish(db, [2])
    assert "can't be reached" in eventually(lambda: trouble(db)) and db.persists and not db.failed
    server._run("start")
    eventually(lambda: not trouble(db))
    assert db.get_history() == [name(1), name(2), name(3)]
    assert [r["status"] for r in db.find_records({}, ["status"])] == ["ok", "ok", "pending"]
    db = open_()
    assert [u.key[1] for u in db.unfinished()] == [3]


def test_a_server_that_is_slow(open_, monkeypatch):
    monkeypatch.setattr("ipclite.journal.RETRY_S", 0.1)
    db = open_()
    submit(db, [1])
    assert db.get_history() == [name(1)]
    os.kill(pid(), signal.SIGSTOP)
    try:
        submit(db, [2])
        assert "can't be reached" in eventually(lambda: trouble(db)) and db.persists
    finally:
        os.kill(pid(), signal.SIGCONT)
    eventually(lambda: not trouble(db))
    assert db.get_history() == [name(1), name(2)]


def test_a_server_that_stays_away_is_given_up(open_, monkeypatch):
    monkeypatch.setattr("ipclite.journal.RETRY_S", 0.1)
    monkeypatch.setattr("ipclite.journal.PATIENCE_S", 0.5)
    db = open_()
    os.kill(pid(), signal.SIGKILL)
    submit(db, [1])
    eventually(lambda: db.failed)
    assert "no records of tasks are kept any more, as the MongoDB server can't be reached" in db.failed
    assert not db.persists and not db.keeps and trouble(db) == db.failed


def test_records_larger_than_a_document(open_):
    db = open_(socketTimeoutMS=20_000)
    large = [b"head", os.urandom(17 << 20)]
    submit(db, [1], payload=large)
    finish(db, [1], payload=large)
    submit(db, [2])
    for reopened in (False, True):
        each = open_(socketTimeoutMS=20_000) if reopened else db
        record = each.get_record(name(1))
        assert record["buffers"] == large and [bytes(piece) for piece in record["result_buffers"]] == large
        assert len(each.get_history()) == 2


@pytest.mark.parametrize("options, word", [
    ({"connection_args": ["mongodb://127.0.0.1:1/"], "connection_kwargs": {"serverSelectionTimeoutMS": 100}}, "can't be reached.*start it"),
    ({"connection_args": ["nonsense://"]}, "connection_args"),
    ({"connection_kwargs": {"colour": "red"}}, "connection_kwargs"),
    ({"database": "a b/c"}, "database"),
])
def test_what_can_not_be_used(tmp_path, options, word):
    pytest.importorskip("pymongo")
    db = MongoDB(**options)
    with pytest.raises(ConfigError, match=word) as caught:
        db.open(tmp_path, "")
    assert "\n" not in str(caught.value)
    db.close()


def test_without_pymongo(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pymongo", None)
    with pytest.raises(ConfigError, match="pip install pymongo"):
        MongoDB().open(tmp_path, "")


def test_clusters_over_it(server, ipython_dir):
    folder = ipython_dir / "profile_default"
    (folder / "security").mkdir(parents=True, mode=0o700)
    (folder / "ipcontroller_config.py").write_text(
        "c = get_config()\nc.IPController.db_class = 'ipyparallel.controller.mongodb.MongoDB'\n"
        f"c.MongoDB.database = 'mine'\nc.MongoDB.connection_args = [{os.environ['MONGO_URI']!r}]\n")
    with ipp.Cluster(n=1) as rc:
        ar = rc.load_balanced_view().map_async(abs, range(-20, 0), chunksize=1)
        assert ar.get(30) == list(range(20, 0, -1))
        assert len(rc.db_query({"status": "ok"})) == 20
        ids = rc.hub_history()
    with ipp.Cluster(n=1) as rc:
        assert rc.hub_history() == ids and rc.get_result(ids[3]).get(30) == [17]
        assert rc.resubmit(ids[0]).get(30) == [20]
        with pytest.raises(ipp.LauncherError, match="in use by another controller"):
            ipp.Cluster(n=1).start_cluster_sync()
    assert '"finished": 21' in run("db", "stats", "--json").out
    os.kill(pid(), signal.SIGKILL)
    one_sentence(run("controller", "--MongoDB.connection_kwargs={'serverSelectionTimeoutMS': 200}"), 2, "can't be reached")
