"""Task records: the query language against plain Python, what is kept and for how long, what is said of the rest."""

from __future__ import annotations

import re
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from recording import ALICE, NOW, Clock, finish, judge, name, queries, records, submit

from ipclite import options, wire
from ipclite.db import Function, NoDB, compile_query
from ipclite.dictdb import BLOCK, SESSIONS_KEPT, DictDB
from ipclite.errors import ConfigError, NoRecord, RecordExpired
from ipclite.mongodb import MongoDB
from ipclite.owndb import OwnDB
from ipclite.queries import open_db
from ipclite.sqlitedb import SQLiteDB, SQLiteStore



class Own(DictDB):
    """A database of a user's, which keeps our contract."""


class Half:
    """One that does not."""

    def submitted(self, batch):
        """Tasks have come."""


class Broken:
    def __init__(self):
        raise ZeroDivisionError("division by zero")


class Theirs:
    """A database of a user's as IPython Parallel asks for it."""

    def __init__(self):
        self.records = {}

    def add_record(self, msg_id, rec):
        self.records[msg_id] = rec

    def update_record(self, msg_id, rec):
        self.records[msg_id].update(rec)

    def get_record(self, msg_id):
        return self.records[msg_id]

    def find_records(self, check, keys=None):
        found = [r for r in self.records.values() if all(r.get(k) == v for k, v in check.items())]
        return [{k: r.get(k) for k in keys} for r in found] if keys else found

    def get_history(self):
        return list(self.records)

    def drop_record(self, msg_id):
        del self.records[msg_id]

    def drop_matching_records(self, check):
        for record in self.find_records(check):
            del self.records[record["msg_id"]]


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def db(clock):
    return DictDB(clock=clock)


# --- the query language


@settings(max_examples=1500, deadline=None)
@given(queries, records)
def test_queries_mean_what_plain_python_says(query, record):
    assert compile_query(query)(record.__getitem__) is judge(record, query)


@settings(max_examples=300, deadline=None)
@given(queries)
def test_queries_survive_the_wire(query):
    assert wire.decode_query(wire.encode_query(wire.QUERY, {"query": query}))["query"] == query


def test_two_conditions_on_one_key_and_on_two():
    matches = compile_query({"attempt": {"$gt": 1, "$lt": 4}, "label": "x"})
    assert [matches({"attempt": n, "label": "x"}.get) for n in (None, 1, 2, 3, 4)] == [False, False, True, True, False]
    assert not matches({"attempt": 2, "label": "y"}.get)
    assert not matches({"attempt": 9, "label": "x"}.get)


def test_dates_as_text_with_and_without_zone():
    noon = datetime(2030, 1, 1, 12, tzinfo=timezone.utc)
    get = {"completed": noon}.get
    for text in (
        "2030-01-01T12:00:00+00:00",
        "2030-01-01T12:00:00Z",
        "2030-01-01T13:00:00+01:00",
        noon.astimezone().replace(tzinfo=None).isoformat(),
    ):
        assert compile_query({"completed": text})(get)
        assert compile_query({"completed": {"$in": [text]}})(get)
        assert not compile_query({"completed": {"$lt": text}})(get)
    assert compile_query({"completed": {"$gt": "2030-01-01"}})(get)
    assert compile_query({"completed": {"$gt": noon.replace(tzinfo=None) - timedelta(days=2)}})(get)
    assert not compile_query({"completed": {"$gt": "2030-01-01"}})({"completed": None}.get)


@pytest.mark.parametrize(
    "query, word",
    [
        ("completed", "a query is a dict"),
        (None, "a query is a dict"),
        ([], "a query is a dict"),
        ({"colour": 1}, "no key 'colour'"),
        ({3: 1}, "no key 3"),
        ({"label": {"$regex": "a"}}, r"unknown operator '\$regex'"),
        ({"label": {"$in": ["a"], "b": 1}}, "mixes operators and values"),
        ({"label": {"$in": "abc"}}, r"\$in takes a list"),
        ({"label": {"$nin": None}}, r"\$nin takes a list"),
        ({"label": {"$all": 3}}, r"\$all takes a list"),
        ({"attempt": {"$gt": None}}, r"\$gt takes a number"),
        ({"attempt": {"$lte": [1]}}, r"\$lte takes a number"),
        ({"attempt": {"$lt": True}}, r"\$lt takes a number"),
        ({"label": {"$glob": 3}}, r"\$glob takes a text"),
        ({"attempt": {"$mod": 3}}, r"\$mod takes"),
        ({"attempt": {"$mod": [0, 1]}}, r"\$mod takes"),
        ({"attempt": {"$mod": [1, 2, 3]}}, r"\$mod takes"),
        ({"attempt": {"$mod": ["2", 1]}}, r"\$mod takes"),
        ({"label": {"$exists": 1}}, r"\$exists takes True or False"),
        ({"completed": "yesterday"}, "is not a date"),
        ({"completed": {"$gt": 17}}, "compared with dates"),
        ({"started": {"$in": "2030-01-01"}}, r"\$in takes a list"),
        ({"label": {"$eq": 1, "$" + "x" * 500: 1}}, "unknown operator"),
    ],
)
def test_what_is_no_query_is_said_in_one_sentence(query, word, db):
    for ask in (compile_query, db.find_records, db.drop_matching_records):
        with pytest.raises(ValueError, match=word) as caught:
            ask(query)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("keys", [["colour"], "label", b"label", 3, ["label", None], [["label"]]])
def test_keys_that_there_are_not(db, keys):
    with pytest.raises(ValueError, match="no key|keys are"):
        db.find_records({}, keys)


# --- retention


def test_the_oldest_finished_go_first(clock):
    db = DictDB(record_limit=100, clock=clock)
    submit(db, range(1, 301))
    for first in range(201, 300, 10):
        finish(db, range(first, first + 10))
    assert db.count == 100
    finish(db, range(1, 11))
    assert db.count == 100 and len(db.get_history()) == 290
    with pytest.raises(RecordExpired, match=r"expired.*c\.DictDB\.record_limit is 100") as caught:
        db.get_record(name(205))
    assert not str(caught.value).startswith("'") and isinstance(caught.value, KeyError)
    assert db.get_record(name(5))["status"] == "ok" and db.get_record(name(100))["status"] == "pending"
    with pytest.raises(NoRecord, match="knows of no task") as caught:
        db.get_record(name(301))
    assert type(caught.value) is NoRecord


def test_a_message_with_more_results_than_the_limit_keeps_the_newest(clock):
    db = DictDB(record_limit=50, clock=clock)
    submit(db, range(1, 301))
    finish(db, range(1, 201))
    assert db.get_history() == [name(n) for n in range(151, 301)] and db.count == 50
    finish(db, range(201, 301))
    assert db.get_history() == [name(n) for n in range(251, 301)] and db.count == 50
    with pytest.raises(RecordExpired, match="record_limit is 50"):
        db.get_record(name(250))


def test_bytes_count_for_arguments_results_and_functions(clock):
    db = DictDB(size_limit=1_000_000, clock=clock)
    for seq in range(1, 50):
        submit(db, [seq], payload=b"x" * 60_000)
        finish(db, [seq], payload=b"y" * 40_000)
    assert db.size < 1_000_000 and 5 < db.count < 10
    with pytest.raises(RecordExpired, match=r"size_limit is 1000000 bytes"):
        db.get_record(name(1))
    heavy = Function([b"f" * 600_000])
    for seq in range(50, 60):
        submit(db, [seq], function=heavy)
        finish(db, [seq])
    assert db.count == 10 + 3, "a function that many tasks share counts once"


def test_a_result_larger_than_the_limit_is_not_kept_and_nothing_else_breaks(clock):
    db = DictDB(size_limit=10_000, clock=clock)
    submit(db, [1, 2])
    finish(db, [1], payload=b"y" * 100_000)
    with pytest.raises(RecordExpired, match="size_limit"):
        db.get_record(name(1))
    finish(db, [2])
    assert db.get_record(name(2))["status"] == "ok"


def test_age(clock):
    db = DictDB(record_age=60, clock=clock)
    submit(db, [1, 2, 3])
    finish(db, [1], received=NOW)
    clock.now = NOW + 50
    finish(db, [2], received=NOW + 50)
    assert db.count == 2
    clock.now = NOW + 61
    assert db.get_history() == [name(2), name(3)]
    clock.now = NOW + 1000
    with pytest.raises(RecordExpired, match=r"record_age is 60 s"):
        db.get_record(name(2))
    assert db.get_record(name(3))["status"] == "pending"


def test_no_limits(clock):
    db = DictDB(0, 0, 0, clock=clock)
    submit(db, range(1, 20_001))
    finish(db, range(1, 20_001))
    assert len(db.get_history()) == 20_000


def test_sessions_are_not_kept_for_ever(db):
    db.record_limit = 10
    for i in range(3 * SESSIONS_KEPT):
        session = i.to_bytes(8, "big")
        submit(db, [1], session)
        finish(db, [1], session)
    assert len(db._sessions) <= SESSIONS_KEPT
    assert len(db.get_history()) == 10


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_books_are_balanced_whatever_happens(data):
    db = DictDB(
        record_limit=data.draw(st.sampled_from([5, 300, 0])), size_limit=data.draw(st.sampled_from([20_000, 0]))
    )
    state: dict[int, str] = {}
    for _ in range(data.draw(st.integers(1, 25))):
        action = data.draw(st.sampled_from(["submit", "finish", "drop", "match", "print"]))
        numbers = data.draw(
            st.lists(st.integers(1, 3 * BLOCK), min_size=1, max_size=20, unique=True)
            | st.integers(1, 2 * BLOCK).map(lambda a: list(range(a, a + BLOCK)))
        )
        if action == "submit":
            submit(db, numbers)
            for n in numbers:
                state.setdefault(n, "pending")
        elif action == "finish":
            mine = [n for n in numbers if state.get(n) == "pending"]
            if mine:
                finish(db, mine)
                state.update(dict.fromkeys(mine, "ok"))
        elif action == "print":
            db.output(ALICE, [[n, "stdout", "hello"] for n in numbers])
        elif action == "match":
            db.drop_matching_records({"msg_id": {"$in": [name(n) for n in numbers]}, "status": "ok"})
            state = {n: s for n, s in state.items() if n not in numbers or s != "ok"}
        else:
            for n in numbers[:3]:
                if n in state:
                    try:
                        db.drop_record(name(n))
                    except RecordExpired:
                        pass
                    del state[n]
        kept = {r["msg_id"]: r["status"] for r in db.find_records({}, ["status"])}
        assert all(state[int(m.split("-")[1])] == s for m, s in kept.items())
        assert {name(n) for n, s in state.items() if s == "pending"} <= set(kept), (
            "unfinished tasks are always on record"
        )
        state = {n: s for n, s in state.items() if name(n) in kept}
        assert db.count == sum(s == "ok" for s in kept.values()) == sum(section.left for section in db._done)
        assert not db.record_limit or db.count <= db.record_limit
        assert all(
            b.live == BLOCK - b.origins.count(None) > 0 for s in db._sessions.values() for b in s.blocks.values()
        )
        assert db._extra.keys() <= {(ALICE, n) for n in state}
    for n in list(state):
        db.drop_record(name(n))
    assert (db.count, db.get_history(), len(db._done)) == (0, [], 0)
    assert abs(db.size) < 1e-6 and not db._extra and not any(s.blocks for s in db._sessions.values())


def test_purged_is_not_expired(db):
    submit(db, [1, 2])
    finish(db, [1, 2])
    assert db.drop_matching_records({"status": "ok"}) == 2
    with pytest.raises(RecordExpired, match=r"was purged$"):
        db.get_record(name(1))
    assert db.size == 0


@given(st.lists(st.integers(0, 40), min_size=1, unique=True), st.integers(1, 9))
def test_slots_cover_the_numbers_in_their_order(seqs, size):
    places = wire.slots(seqs, size)
    assert [number * size + i for number, a, b in places for i in range(a, b)] == seqs
    assert all(0 <= a < b <= size for _, a, b in places)


# --- names and choices


@pytest.mark.parametrize(
    "text",
    [
        "",
        "abc",
        "-1",
        "00-1",
        ALICE.hex(),
        f"{ALICE.hex()}-",
        f"{ALICE.hex()}--1",
        f"{ALICE.hex()}-1.5",
        f"{ALICE.hex()}-01",
        f"{ALICE.hex()} -1",
        f"{ALICE.hex()}-{2**64}",
        "x" * 16 + "-1",
        None,
        3,
        [1],
        b"abc",
        name(1).upper() + " ",
    ],
)
@pytest.mark.parametrize("store", [DictDB(), NoDB()])
def test_ids_that_are_none(store, text):
    for ask in (store.get_record, store.drop_record):
        with pytest.raises(ValueError, match="is not a message id"):
            ask(text)


OPTIONS = {option.name: option.default for option in options.OPTIONS}


@pytest.mark.parametrize(
    "given, kind",
    [
        ("DictDB", DictDB),
        ("dictdb", DictDB),
        ("ipyparallel.controller.dictdb.DictDB", DictDB),
        (f"{DictDB.__module__}.DictDB", DictDB),
        ("IPython.parallel.controller.dictdb.DictDB", DictDB),
        ("NoDB", NoDB),
        ("nodb", NoDB),
        ("ipyparallel.controller.dictdb.NoDB", NoDB),
        ("SQLiteDB", SQLiteDB),
        ("ipyparallel.controller.sqlitedb.SQLiteDB", SQLiteDB),
        (f"{SQLiteDB.__module__}.SQLiteDB", SQLiteDB),
        ("mongodb", MongoDB),
        ("ipyparallel.controller.mongodb.MongoDB", MongoDB),
        (f"{__name__}.Own", Own),
        (Own, Own),
        (f"{__name__}.Theirs", OwnDB),
        (Theirs, OwnDB),
    ],
)
def test_names_of_databases(given, kind):
    limits = {"record_limit": 7, "size_limit": 8, "record_age": 9.0}
    chosen = {f"{name}.{key}": value for name in ("DictDB", "SQLiteDB", "MongoDB") for key, value in limits.items()}
    store = open_db(given, {**OPTIONS, **chosen}, lambda key: None)
    assert type(store) is kind
    if kind in (DictDB, SQLiteDB, MongoDB):
        assert {key: getattr(store, key) for key in limits} == limits


@pytest.mark.parametrize(
    "given, word",
    [
        ("Oracle", "neither one of DictDB, NoDB, SQLiteDB, MongoDB nor the dotted path of a class"),
        ("ipyparallel.controller.oracle.OracleDB", "neither one of"),
        ("", "neither one of"),
        ("my.own.DictDB", "can't be imported: ModuleNotFoundError: No module named 'my'"),
        (f"{__name__}.Nothing", "can't be imported: AttributeError"),
        (f"{__name__}.Broken", "can't be made: ZeroDivisionError"),
        (f"{__name__}.Clock", "lacks add_record, update_record, get_record"),
        (f"{__name__}.Half", "lacks keeps, persists"),
    ],
)
def test_databases_that_there_are_not(given, word):
    with pytest.raises(ConfigError, match=re.escape(word)) as caught:
        open_db(given, OPTIONS, lambda key: None)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("table", ["a b", 'a"; DROP TABLE x; --', "1a", "sqlite_master", "a.b", "a" * 65, "é", "a\n"])
def test_names_that_no_table_may_have(table):
    with pytest.raises(ConfigError, match=r"c\.SQLiteDB\.table is .*no name for a table"):
        open_db("SQLiteDB", {**OPTIONS, "SQLiteDB.table": table}, lambda key: None)


@pytest.mark.parametrize(
    "chosen, cluster_id, file",
    [
        ({}, "", "tasks.db"),
        ({}, "a", "tasks-a.db"),
        ({"table": "tasks"}, "a", "tasks.db"),
        ({"filename": "mine.db"}, "a", "mine.db"),
        ({"location": "security"}, "", "security/tasks.db"),
        ({"location": "/elsewhere", "filename": "x"}, "", "/elsewhere/x"),
    ],
)
def test_files_of_clusters(chosen, cluster_id, file):
    assert SQLiteStore(**chosen).where(Path("/profile"), cluster_id) == Path("/profile", file)


def test_a_database_of_the_user_s_is_told_and_asked():
    theirs = Theirs()
    db = OwnDB(theirs, lambda key: None)
    submit(db, [1], function=Function([b"code"]))
    submit(db, [2, 3, 4])
    submit(db, [5], payload=[b"head", b"x" * 50_000])
    assert theirs.records[name(1)]["status"] == "pending" and theirs.records[name(3)]["buffers"] == [b"args"]
    assert theirs.records[name(5)]["buffers"] == [b"head", b"x" * 50_000] and theirs.records[name(1)]["function"] == [b"code"]
    db.assigned(ALICE, 7, "uuid7", [(2, 1, b"")])
    db.output(ALICE, [[2, "stdout", "a"], [2, "stdout", "b"], [2, "data", "x"]])
    assert [theirs.records[name(2)][key] for key in ("engine_id", "attempt", "stdout")] == [7, 1, "ab"]
    finish(db, [2, 3])
    assert db.get_record(name(2))["result_buffers"] == [b"value"] and db.get_record(name(3))["status"] == "ok"
    assert db.find_records({"status": "ok"}, ["engine_id"]) == [{"msg_id": name(n), "engine_id": 3} for n in (2, 3)]
    assert db.get_history() == [name(n) for n in range(1, 6)]
    db.update_record(name(1), {"resubmitted": name(5)})
    assert theirs.records[name(1)]["resubmitted"] == name(5)
    db.drop_record(name(1))
    assert db.drop_matching_records({"status": "ok"}) == 2 and db.get_history() == [name(4), name(5)]
    for ask in (lambda: db.get_record(name(1)), lambda: db.drop_record(name(9))):
        with pytest.raises(NoRecord, match="Theirs does not know it: KeyError"):
            ask()
    with pytest.raises(ValueError, match="no key 'colour'"):
        db.find_records({"colour": 1})
    db.close()


def test_a_database_of_the_user_s_that_fails_is_told_nothing_more():
    theirs = Theirs()
    db = OwnDB(theirs, lambda key: None)
    finish(db, [1])
    assert db.failed == "no records of tasks are kept any more, as Theirs.update_record failed: KeyError: " + repr(name(1))
    submit(db, [2])
    assert not db.keeps and theirs.records == {}
    with pytest.raises(NoRecord, match="no records of tasks are kept any more"):
        db.get_history()


def test_no_db_says_so():
    store = NoDB()
    submit(store, [1])
    finish(store, [1])
    for ask in (
        lambda: store.get_record(name(1)),
        lambda: store.find_records({}),
        store.get_history,
        lambda: store.update_record(name(1), {}),
    ):
        with pytest.raises(NoRecord, match="--dictdb"):
            ask()
    assert store.drop_matching_records({}) == 0
    store.drop_record(name(1))
    with pytest.raises(ValueError):
        store.find_records({"colour": 1})
