"""Every database keeps the same contract: one suite over all of them, and what those that last say after a restart."""

from __future__ import annotations

import json
import os
import select
import shutil
import sys
import threading
import time
import uuid
from datetime import timedelta
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from places import Service
from recording import ALICE, BOB, NOW, SPEC, Clock, finish, judge, name, queries, submit
from support import eventually, need

from ipclite import wire
from ipclite.db import BUFFERS, KEYS, Function
from ipclite.dictdb import DictDB
from ipclite.errors import AlreadyRunning, NoRecord, RecordExpired
from ipclite.mongodb import MongoDB
from ipclite.records import FIELDS, OUTPUT_MAX
from ipclite.sqlitedb import SQLiteDB

LASTING = ["sqlite", "mongo"]


class Shelf:
    """Where a test has its database. Calling it opens it, after closing what it opened before."""

    def __init__(self, kind: str, folder: Path, uri: str):
        self.kind, self.folder, self.uri = kind, folder, uri
        self.clock, self.name, self.now = Clock(), "t" + uuid.uuid4().hex[:12], None

    def make(self, **options):
        if self.kind == "dict":
            return DictDB(clock=self.clock, **options)
        if self.kind == "sqlite":
            return SQLiteDB(filename=self.name + ".db", clock=self.clock, **options)
        return MongoDB(self.name, [self.uri], clock=self.clock, **options)

    def __call__(self, cluster_id: str = "", **options):
        self.close()
        db = self.make(**options)
        db.open(self.folder, cluster_id)
        self.now = db
        return db

    def close(self):
        if self.now is not None:
            self.now.close()
            self.now = None


@pytest.fixture(scope="module")
def mongo():
    """The address of a server; "" if this machine has none."""
    if not (shutil.which("mongod") or Path(sys.executable).with_name("nx-27017").exists()):
        yield ""
        return
    with Service("mongo.sh", (), ("MONGO_PORT", 1), PYTHON=sys.executable):
        yield os.environ["MONGO_URI"]


def shelf_of(kind, folder, uri):
    need(kind != "mongo" or uri, "mongod or nx-27017")
    return Shelf(kind, folder, uri)


@pytest.fixture(params=["dict", *LASTING])
def shelf(request, tmp_path, mongo):
    shelf = shelf_of(request.param, tmp_path, mongo)
    yield shelf
    shelf.close()


@pytest.fixture(params=LASTING)
def lasting(request, tmp_path, mongo):
    shelf = shelf_of(request.param, tmp_path, mongo)
    yield shelf
    shelf.close()


@pytest.fixture
def db(shelf):
    return shelf()


# --- records


def test_a_record_from_submission_to_result(db):
    submit(db, [1], function=Function([b"function", memoryview(b"more")]))
    waiting = db.get_record(name(1))
    assert set(waiting) == set(KEYS) == set(FIELDS)
    assert (waiting["status"], waiting["engine_id"], waiting["attempt"], waiting["completed"]) == (
        "pending",
        None,
        None,
        None,
    )
    assert (waiting["label"], waiting["op"], waiting["queue"], waiting["client_uuid"]) == (
        "blue",
        "apply",
        "task",
        ALICE.hex(),
    )
    assert waiting["submitted"].timestamp() == NOW and waiting["submitted"].utcoffset() == timedelta(0)
    db._place = {(ALICE, 1): (3, "uuid3", 2)}.get
    assigned = db.get_record(name(1))
    assert (assigned["engine_id"], assigned["engine_uuid"], assigned["attempt"], assigned["status"]) == (
        3,
        "uuid3",
        2,
        "pending",
    )
    finish(db, [1], attempt=2)
    done = db.get_record(name(1))
    assert (done["status"], done["engine_id"], done["engine_uuid"], done["attempt"]) == ("ok", 3, "uuid3", 2)
    assert [done[k].timestamp() for k in ("started", "completed", "received")] == [NOW + 1, NOW + 1.5, NOW + 2]
    assert (done["buffers"], done["result_buffers"], done["function"]) == (
        [b"args"],
        [b"value"],
        [b"function", b"more"],
    )
    assert done["header"]["msg_type"] == "apply_request" and done["metadata"]["fn"] == "ab" * 16


def test_failures(db):
    submit(db, [1, 2])
    finish(db, [1], status=wire.ERROR, payload=wire.encode_error({"ename": "ValueError", "evalue": "no"}, b"pickle"))
    finish(db, [2], engine=wire.NO_ENGINE, status=wire.ERROR, payload=b"garbage")
    one, two = db.find_records({"status": "error"})
    assert (one["ename"], one["evalue"], one["error"], one["engine_id"]) == ("ValueError", "no", "ValueError: no", 3)
    assert (two["ename"], two["engine_id"], two["engine_uuid"]) == ("ProtocolError", None, None)


def test_large_payloads_stay_in_pieces(db):
    large = [b"head", memoryview(b"x" * 50_000), memoryview(b"y" * 60_000)]
    submit(db, [1], payload=large)
    finish(db, [1], payload=large)
    record = db.get_record(name(1))
    for key in ("buffers", "result_buffers"):
        assert b"".join(record[key]) == b"".join(large) and len(record[key]) == 3


def test_keys_and_order(db):
    submit(db, [2], BOB)
    submit(db, range(1, 600))
    submit(db, [1], BOB)
    finish(db, [7, 300, 301, 5])
    assert [r["msg_id"] for r in db.find_records({"completed": {"$ne": None}})] == [name(n) for n in (5, 7, 300, 301)]
    assert db.get_history() == [name(2, BOB), *map(name, range(1, 600)), name(1, BOB)]
    assert db.find_records({"msg_id": name(3)}, ["queue", "queue"]) == [{"msg_id": name(3), "queue": "task"}]
    assert not set(db.find_records({})[0]) & set(BUFFERS)
    assert db.find_records({"msg_id": {"$in": [name(3)]}}, ["buffers"]) == [{"msg_id": name(3), "buffers": [b"args"]}]


def test_a_call_to_several_engines_has_a_record_for_each(db):
    submit(db, range(5, 9), spec=json.dumps({"op": "apply", "targets": [4, 6]}).encode(), fan=2)
    assert [r["targets"] for r in db.find_records({})] == [[4], [6], [4], [6]]
    assert [r["queue"] for r in db.find_records({})] == ["mux"] * 4
    assert [r["buffers"] for r in db.find_records({}, ["buffers"])] == [[b"args"]] * 4


def test_tasks_that_come_twice_are_left_as_they_are(db):
    submit(db, [1, 2, 3])
    finish(db, [2])
    submit(db, range(1, 6), payload=b"other")
    assert len(db.find_records({"status": "ok"})) == 1
    assert [r["buffers"] for r in db.find_records({}, ["buffers"])] == [[b"args"]] * 3 + [[b"other"]] * 2
    assert db.get_record(name(2))["status"] == "ok"


def test_what_engines_say_of_unknown_tasks_does_not_matter(db):
    submit(db, [1])
    db.assigned(BOB, 1, "u", [(1, 1, b"")])
    db.assigned(ALICE, 1, "u", [(999_999, 1, b""), (2, 1, b"")])
    finish(db, [2, 3, 2**63])
    finish(db, [1], BOB)
    db.output(BOB, [[1, "stdout", "x"]])
    assert db.get_history() == [name(1)] and db.get_record(name(1))["status"] == "pending"


def test_output_is_kept_up_to_a_limit(db):
    submit(db, [1, 2])
    db.output(
        ALICE, [[1, "stdout", "a"], [1, "stderr", "e"], [9, "stdout", "z"], [1, "stdout", "b"], [1, "data", "ignored"]]
    )
    db.output(ALICE, [[1, "stdout", "x" * OUTPUT_MAX], [1, "stdout", "y" * 10]])
    record = db.get_record(name(1))
    assert record["stdout"].startswith("abx") and record["stderr"] == "e"
    assert len(record["stdout"]) == OUTPUT_MAX - 1
    finish(db, [1, 2])
    db.drop_record(name(1))
    db.drop_record(name(2))
    assert db.get_history() == []


def test_changes(db):
    submit(db, [1])
    db.update_record(name(1), {"resubmitted": "somewhere"})
    assert db.get_record(name(1))["resubmitted"] == "somewhere"
    assert db.find_records({"resubmitted": {"$glob": "some*"}}, []) == [{"msg_id": name(1)}]
    with pytest.raises(ValueError, match="no key 'colour'"):
        db.update_record(name(1), {"colour": "red"})
    with pytest.raises(NoRecord):
        db.update_record(name(2), {"label": "x"})


# --- queries


def populate(db):
    """Some tasks of every kind."""
    submit(db, range(1, 40), function=Function([b"code"]))
    submit(db, [41, 43, 45], spec=json.dumps({"op": "apply", "targets": [1], "label": "a"}).encode(), when=NOW + 100)
    submit(db, [42, 44, 46], spec=json.dumps({"op": "map", "fn": "cd" * 16, "label": "ab"}).encode())
    submit(db, range(1, 9), BOB, spec=json.dumps({"op": "apply", "targets": [4, 6]}).encode(), fan=2)
    finish(db, [3, 2, 1], engine=0)
    finish(db, range(5, 20), attempt=2, received=NOW + 1000)
    finish(db, [41, 42], status=wire.ERROR, payload=wire.encode_error({"ename": "ValueError", "evalue": "a"}))
    finish(db, [2, 3], BOB, engine=wire.NO_ENGINE, status=wire.ERROR, payload=b"garbage")
    db.output(ALICE, [[4, "stdout", "a*"], [20, "stderr", "[a]"]])
    db.update_record(name(5), {"resubmitted": name(9), "label": "a"})


def test_queries_find_what_plain_python_finds(shelf):
    db = shelf()
    populate(db)
    everything = db.find_records({}, list(KEYS))
    assert len(everything) == 53
    stats, pending = db.stats(), sum(record["status"] == "pending" for record in everything)
    assert (stats["finished"], stats["unfinished"], stats["clients"]) == (53 - pending, pending, 2) and stats["bytes"] > 0

    @settings(max_examples=40 if shelf.kind == "mongo" else 150, deadline=None)
    @given(queries)
    def ask(query):
        expected = [r["msg_id"] for r in everything if judge(r, query)]
        assert [r["msg_id"] for r in db.find_records(query, [])] == expected

    ask()


def test_all_databases_say_the_same(lasting):
    db, plain = lasting(), DictDB(clock=lasting.clock)
    for each in (db, plain):
        populate(each)
    for query in ({}, {"completed": None}, {"status": "pending"}, {"client_uuid": BOB.hex()}, {"msg_id": name(5)},
                  {"msg_id": {"$in": [name(7), name(3), "nonsense"]}}, {"received": {"$exists": False}}, {"label": None}):
        assert db.find_records(query, list(KEYS)) == plain.find_records(query, list(KEYS)), query
    assert db.get_history() == plain.get_history()
    assert db.get_record(name(41)) == plain.get_record(name(41))
    before = db.find_records({}, list(KEYS))
    assert lasting().find_records({}, list(KEYS)) == before


@pytest.mark.parametrize("query, keys", [
    ({"label": "'; DROP TABLE tasks; --"}, None), ({"msg_id": "x' OR '1'='1"}, None), ({"client_uuid": {"$ne": "\\0'\""}}, None),
    ({"label": {"$in": ["$where", {"$gt": ""}]}}, None),
])
def test_what_looks_like_code_is_a_value(db, query, keys):
    populate(db)
    everything = db.find_records({}, list(KEYS))
    assert [r["msg_id"] for r in db.find_records(query, keys)] == [r["msg_id"] for r in everything if judge(r, query)]
    assert len(db.get_history()) == 53


@pytest.mark.parametrize("query, keys", [
    ({"$where": "sleep(1000)"}, None), ({"label": {"$regex": "a"}}, None), ({"label; --": 1}, None), ("1=1", None),
    ({}, ['label" FROM tasks; --']), ({}, "label"), ({"attempt": {"$gt": "a", "$lt": [1]}}, None), ({"submitted": 5}, None),
])
def test_what_is_no_query_changes_nothing(db, query, keys):
    populate(db)
    for ask in (lambda: db.find_records(query, keys), lambda: db.drop_matching_records(query if keys is None else keys)):
        with pytest.raises(ValueError) as caught:
            ask()
        assert "\n" not in str(caught.value)
    assert len(db.get_history()) == 53


def test_purged_is_not_expired(db):
    submit(db, [1, 2, 3])
    finish(db, [1, 2, 3])
    assert db.drop_matching_records({"msg_id": {"$in": [name(1), name(2)]}}) == 2
    with pytest.raises(RecordExpired, match=r"was purged$"):
        db.get_record(name(1))
    with pytest.raises(NoRecord, match="knows of no task"):
        db.get_record(name(4))
    assert db.get_history() == [name(3)]


# --- retention


def test_the_oldest_finished_go_first(shelf):
    db = shelf(record_limit=100)
    submit(db, range(1, 301))
    for first in range(201, 300, 10):
        finish(db, range(first, first + 10))
    finish(db, range(1, 11))
    assert len(db.get_history()) == 290
    with pytest.raises(RecordExpired, match=r"record_limit is 100"):
        db.get_record(name(205))
    assert db.get_record(name(5))["status"] == "ok" and db.get_record(name(100))["status"] == "pending"


def test_size(shelf):
    db = shelf(size_limit=100_000)
    for seq in range(1, 31):
        submit(db, [seq], payload=b"x" * 5000)
        db.find_records({"msg_id": name(seq)})  # a commit for each
    for seq in range(1, 29):
        finish(db, [seq], payload=b"y" * 5000)
        db.find_records({"msg_id": name(seq)})
    kept = db.get_history()
    assert kept[-2:] == [name(29), name(30)] and 3 < len(kept) < 20
    with pytest.raises(RecordExpired, match="size_limit is 100000"):
        db.get_record(name(1))


def test_age(shelf):
    db = shelf(record_age=60)
    submit(db, [1, 2, 3])
    finish(db, [1], received=NOW)
    assert len(db.get_history()) == 3
    shelf.clock.now += 100
    finish(db, [2], received=NOW + 100)
    db.get_history()
    eventually(lambda: db.get_history() == [name(2), name(3)])
    with pytest.raises(RecordExpired, match="record_age is 60 s"):
        db.get_record(name(1))


# --- what lasts


def safe(db):
    """Wait until something is safe, and give it."""
    assert select.select([db.wake_fd], [], [], 20)[0]
    return db.collect()


def test_what_is_written_is_said_to_be_safe(lasting):
    db = lasting()
    assert db.persists and db.waits and db.keeps and not db.failed
    submit(db, [1, 2])
    finish(db, [1])
    found = []
    while len(found) < 2:
        found += safe(db)
    assert [list(item.seqs) for item in found] == [[1, 2], [1]] and db.collect() == []


def test_unfinished_tasks_come_back_in_order_with_all_they_need(lasting):
    db = lasting()
    large = [b"head", memoryview(b"x" * 50_000)]
    submit(db, [1, 2, 3], function=Function([b"code", b"more"]))
    submit(db, [9], BOB, payload=large, spec=b'{"op": "push", "coalesce": true}')
    submit(db, range(5, 9), spec=json.dumps({"op": "apply", "targets": [4, 6]}).encode(), fan=2)
    db.assigned(ALICE, 0, "e0", [(1, 1, b""), (2, 1, b"")])
    db.assigned(ALICE, 1, "e1", [(2, 2, b"")])
    finish(db, [1, 6])
    db = lasting()
    left = list(db.unfinished())
    assert [u.key for u in left] == [(ALICE, 2), (ALICE, 3), (BOB, 9), (ALICE, 5), (ALICE, 7), (ALICE, 8)]
    assert (left[0].attempt, left[0].engine_uuid, left[1].attempt, left[1].engine_uuid) == (2, "e1", 0, "")
    assert left[0].spec == SPEC and left[0].payload == b"args" and left[2].payload == large
    specs = [{"op": "push", "coalesce": True}, *[{"op": "apply", "targets": [t]} for t in (4, 4, 6)]]
    assert [json.loads(u.spec) for u in left[2:]] == specs
    assert db.function(ALICE, left[0].digest).frames == [b"code", b"more"] and db.function(BOB, left[0].digest) is None
    finish(db, [2], attempt=2)
    submit(db, [3], payload=b"again")  # it is on record
    submit(db, [10])
    db = lasting()
    assert [u.key[1] for u in db.unfinished()] == [3, 9, 5, 7, 8, 10]
    assert [u.payload for u in db.unfinished()][0] == b"args"


def test_finished_tasks_that_come_again_are_not_run_again(lasting):
    db = lasting()
    submit(db, range(1, 6))
    finish(db, [2, 4])
    db = lasting()
    submit(db, range(1, 8), payload=b"again")
    db = lasting()
    assert [u.key[1] for u in db.unfinished()] == [1, 3, 5, 6, 7]
    assert db.get_record(name(2))["status"] == "ok"


def test_tasks_of_other_clusters_are_left_to_them(lasting):
    db = lasting("a")
    submit(db, [1])
    db = lasting("b")
    submit(db, [1], BOB)
    assert list(db.unfinished()) == [] and len(db.get_history()) == 2
    db = lasting("a")
    assert [u.key for u in db.unfinished()] == [(ALICE, 1)]


def test_numbers_of_any_size(lasting):
    db = lasting()
    seqs = [1, 2**31, 2**53 + 1, 2**63 - 1, 2**63, 2**64 - 1]
    submit(db, seqs)
    finish(db, seqs[:3])
    for look in ("at once", "after a restart"):
        db = db if look == "at once" else lasting()
        assert db.get_history() == [name(seq) for seq in seqs]
        assert db.get_record(name(2**53 + 1))["status"] == "ok"
        assert [u["msg_id"] for u in db.find_records({"completed": None})] == [name(seq) for seq in seqs[3:]]


def test_dropped_is_dropped_after_a_restart_too(lasting):
    db = lasting(record_limit=20)
    submit(db, range(1, 101))
    for first in range(1, 81, 10):
        finish(db, range(first, first + 10))
        db.get_history()
    db.drop_record(name(75))
    db.drop_record(name(90))  # unfinished, and not wanted any more
    before = db.get_history()
    assert 17 <= len(before) - 19 <= 20
    db = lasting(record_limit=20)
    assert db.get_history() == before
    assert [u.key[1] for u in db.unfinished()] == [n for n in range(81, 101) if n != 90]
    for seq, why in ((75, "purged|expired"), (90, "purged|expired"), (1, "record_limit is 20")):
        with pytest.raises(RecordExpired, match=why):
            db.get_record(name(seq))


def test_books_are_balanced_whatever_happens(lasting):
    @settings(max_examples=3 if lasting.kind == "mongo" else 15, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.data())
    def play(data):
        lasting.name = "t" + uuid.uuid4().hex[:12]
        limit = data.draw(st.sampled_from([0, 5, 300]))
        db = lasting(record_limit=limit)
        state: dict[int, str] = {}
        for _ in range(data.draw(st.integers(1, 12))):
            action = data.draw(st.sampled_from(["submit", "submit", "finish", "drop", "match", "print", "reopen"]))
            numbers = data.draw(st.lists(st.integers(1, 9000), min_size=1, max_size=20, unique=True)
                                | st.integers(1, 8000).map(lambda a: list(range(a, a + 256))))
            if action == "submit":
                numbers = [n for n in numbers if n not in state]
                state.update(dict.fromkeys(numbers, "pending"))
                if numbers:
                    submit(db, numbers)
            elif action == "finish":
                mine = [n for n in numbers if state.get(n) == "pending"]
                if mine:
                    finish(db, mine)
                    state.update(dict.fromkeys(mine, "ok"))
            elif action == "print":
                db.output(ALICE, [[n, "stdout", "hello"] for n in numbers])
            elif action == "match":
                db.drop_matching_records({"msg_id": {"$in": [name(n) for n in numbers]}, "status": "ok"})
                state.update({n: "gone" for n in numbers if state.get(n) == "ok"})
            elif action == "reopen":
                db = lasting(record_limit=limit)
            else:
                for n in numbers[:3]:
                    try:
                        db.drop_record(name(n))
                    except NoRecord:
                        assert state.get(n) != "pending"
                    else:
                        state[n] = "gone"
            kept = {int(r["msg_id"].split("-")[1]): r["status"] for r in db.find_records({}, ["status"])}
            assert all(state[n] == s for n, s in kept.items())
            assert {n for n, s in state.items() if s == "pending"} <= set(kept), "unfinished tasks are always on record"
            state.update({n: "gone" for n, s in state.items() if s == "ok" and n not in kept})
            stats = db.stats()
            assert stats["finished"] == sum(s == "ok" for s in kept.values()) and (not limit or stats["finished"] <= limit)
            assert stats["unfinished"] == sum(s == "pending" for s in kept.values())
            if action == "reopen":
                assert {u.key[1] for u in db.unfinished()} == {n for n, s in kept.items() if s == "pending"}
        for n in [n for n, s in state.items() if s in ("ok", "pending")]:
            db.drop_record(name(n))
        assert db.get_history() == [] and list(lasting().unfinished()) == []
        assert lasting.now.stats()["bytes"] == 0, "what nobody can ask for any more takes no room"

    play()


def test_only_one_has_it(lasting):
    lasting()
    other = lasting.make()
    with pytest.raises(AlreadyRunning, match=f"in use by another controller .pid {os.getpid()} on "):
        other.open(lasting.folder, "")
    other.close()
    lasting.close()
    other.open(lasting.folder, "")
    other.close()


def test_the_controller_does_not_wait_for_the_store(lasting, monkeypatch):
    db = lasting()
    commit, gate = db.store.commit, threading.Event()
    monkeypatch.setattr(db.store, "commit", lambda change: (gate.wait(20), commit(change)))
    before = time.monotonic()
    for seq in range(1, 200):
        submit(db, [seq])
    assert time.monotonic() - before < 10, "nobody has opened the gate"
    gate.set()
    assert len(db.get_history()) == 199


def test_a_store_that_is_too_slow_is_given_up(lasting, monkeypatch):
    monkeypatch.setattr("ipclite.journal.QUEUE_BYTES", 10_000)
    monkeypatch.setattr("ipclite.journal.STALL_S", 0.1)
    db = lasting()
    gate = threading.Event()
    monkeypatch.setattr(db.store, "commit", lambda change: gate.wait(20))
    for seq in range(1, 10):
        submit(db, [seq], payload=b"x" * 5000)
    assert "nothing could be written" in db.failed and not db.persists and not db.keeps
    with pytest.raises(NoRecord, match="no records of tasks are kept any more"):
        db.get_record(name(1))
    gate.set()
