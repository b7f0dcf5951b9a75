"""Task records: the query language against plain Python, what is kept and for how long, what is said of the rest."""

from __future__ import annotations

import json
import math
import re
from datetime import datetime, timedelta, timezone
from fnmatch import fnmatchcase

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ipclite import wire
from ipclite.db import BUFFERS, KEYS, OPERATORS, Batch, Function, NoDB, Section, compile_query
from ipclite.dictdb import BLOCK, FIELDS, OUTPUT_MAX, SESSIONS_KEPT, DictDB
from ipclite.errors import ConfigError, NoRecord, RecordExpired
from ipclite.queries import open_db

ALICE, BOB = b"alicesid", b"bobs_sid"
SPEC = json.dumps({"op": "apply", "fn": "ab" * 16, "targets": None, "label": "blue"}).encode()
NOW = 1_900_000_000.0


class Clock:
    now = NOW

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def db(clock):
    return DictDB(clock=clock)


def submit(db, seqs, session=ALICE, spec=SPEC, payload=b"args", function=None, when=NOW, fan=1):
    """Tell the database of tasks in either way: in one piece if there are several that fit."""
    seqs = list(seqs)
    frames = wire.encode_tasks(spec, session, [(seq, fan, payload) for seq in seqs[::fan]])
    if len(seqs) > 1 and len(frames) == 1:
        db.submitted(Batch(session, spec, seqs, None, when, function, fan, frames[0]))
    else:
        db.submitted(Batch(session, spec, seqs, [payload] * len(seqs), when, function, fan))


def finish(db, seqs, session=ALICE, engine=3, status=wire.OK, payload=b"value", received=NOW + 2, attempt=1):
    results = [wire.Result(seq, NOW + 1, 0.5, attempt, status, payload) for seq in seqs]
    frames = wire.encode_results(session, engine, results)
    db.finished(Section(session, engine, f"uuid{engine}", received, list(seqs), frames))


def name(seq, session=ALICE):
    return wire.msg_id((session, seq))


# --- the query language


ORDERS = {
    "$lt": lambda a, b: a < b,
    "$lte": lambda a, b: a <= b,
    "$le": lambda a, b: a <= b,
    "$gt": lambda a, b: a > b,
    "$gte": lambda a, b: a >= b,
}


def kind(value):
    return (
        "number"
        if type(value) in (int, float)
        else "date"
        if isinstance(value, datetime)
        else "text"
        if isinstance(value, str)
        else None
    )


def judge(record, query):
    """What a query means, in plain words."""
    for key, wanted in query.items():
        value = record[key]
        if not (isinstance(wanted, dict) and any(k.startswith("$") for k in wanted)):
            wanted = {"$eq": wanted}
        for operator, operand in wanted.items():
            if operator in ORDERS:
                holds = kind(value) is not None and kind(value) == kind(operand) and ORDERS[operator](value, operand)
            elif operator in ("$eq", "$ne"):
                holds = (value == operand) == (operator == "$eq")
            elif operator in ("$in", "$nin"):
                holds = any(value == o for o in operand) == (operator == "$in")
            elif operator == "$glob":
                holds = kind(value) == "text" and fnmatchcase(value, operand)
            elif operator == "$all":
                held = value if isinstance(value, list) else [value]
                holds = operand != [] and all(any(h == o for h in held) for o in operand)
            elif operator == "$mod":
                holds = kind(value) == "number" and value % operand[0] == operand[1]
            else:
                holds = (value is not None) == operand
            if not holds:
                return False
    return True


dates = st.integers(-3, 3).map(lambda n: datetime(2030, 1, 1, tzinfo=timezone.utc) + timedelta(hours=n))
words = st.sampled_from(["", "a", "ab", "b", "a*", "A", "[a]"])
numbers = st.integers(-3, 3) | st.sampled_from([0.5, -1.0, 1e300, math.inf])
scalars = st.none() | numbers | words
values = scalars | st.lists(scalars, max_size=3)
records = st.fixed_dictionaries(
    {"engine_id": values, "label": values, "attempt": values, "completed": st.none() | dates}
)
divisors = st.tuples(st.integers(-3, 3).filter(bool), st.integers(-3, 3)).map(list)


def conditions(plain, ordered):
    """Every operator with an operand that suits it."""
    several = st.lists(plain, max_size=3)
    operands = {
        "$eq": plain,
        "$ne": plain,
        "$in": several,
        "$nin": several,
        "$all": several,
        "$glob": words,
        "$mod": divisors,
        "$exists": st.booleans(),
        **dict.fromkeys(ORDERS, ordered),
    }
    assert set(operands) == set(OPERATORS)
    return st.one_of(
        plain,
        *[operand.map(lambda o, op=op: {op: o}) for op, operand in operands.items()],
        st.fixed_dictionaries({}, optional=operands).filter(bool),
    )


ordinary = conditions(values, numbers | words)
when = conditions(st.none() | dates, dates).filter(lambda c: not isinstance(c, dict) or not set(c) & {"$glob", "$mod"})
queries = st.fixed_dictionaries(
    {}, optional={"engine_id": ordinary, "label": ordinary, "attempt": ordinary, "completed": when}
)


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
    assert record["buffers"] == large and [bytes(p) for p in record["result_buffers"]] == [bytes(p) for p in large]


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
    assert db.count == 1
    assert [r["buffers"] for r in db.find_records({}, ["buffers"])] == [[b"args"]] * 3 + [[b"other"]] * 2
    assert db.get_record(name(2))["status"] == "ok"


def test_what_engines_say_of_unknown_tasks_does_not_matter(db):
    submit(db, [1])
    db.assigned(BOB, 1, "u", [(1, 1, b"")])
    db.assigned(ALICE, 1, "u", [(999_999, 1, b""), (2, 1, b"")])
    finish(db, [2, 3, 2**63])
    finish(db, [1], BOB)
    db.output(BOB, [[1, "stdout", "x"]])
    assert (db.count, db.size, db.get_history()) == (0, 0, [name(1)])


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
    assert db.size == 0


def test_changes(db):
    submit(db, [1])
    db.update_record(name(1), {"resubmitted": "somewhere"})
    assert db.get_record(name(1))["resubmitted"] == "somewhere"
    assert db.find_records({"resubmitted": {"$glob": "some*"}}, []) == [{"msg_id": name(1)}]
    with pytest.raises(ValueError, match="no key 'colour'"):
        db.update_record(name(1), {"colour": "red"})
    with pytest.raises(NoRecord):
        db.update_record(name(2), {"label": "x"})


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


OPTIONS = {"DictDB.record_limit": 7, "DictDB.size_limit": 8, "DictDB.record_age": 9.0}


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
    ],
)
def test_names_of_databases(given, kind):
    store = open_db(given, OPTIONS, lambda key: None)
    assert type(store) is kind
    if kind is DictDB:
        assert (store.record_limit, store.size_limit, store.record_age) == (7, 8, 9.0)


@pytest.mark.parametrize(
    "given, word",
    [
        ("SQLiteDB", "has no SQLiteDB: choose DictDB"),
        ("ipyparallel.controller.mongodb.MongoDB", "has no MongoDB"),
        ("Oracle", "only DictDB and NoDB"),
        ("my.own.DictDB", "only DictDB"),
        ("", "only DictDB"),
    ],
)
def test_databases_that_there_are_not(given, word):
    with pytest.raises(ConfigError, match=re.escape(word)):
        open_db(given, OPTIONS, lambda key: None)


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
