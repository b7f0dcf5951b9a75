"""What the tests of databases share: tasks to put on record, and what queries mean in plain Python."""

from __future__ import annotations

import json
import math
from datetime import datetime, timedelta, timezone
from fnmatch import fnmatchcase

from hypothesis import strategies as st

from ipclite import wire
from ipclite.db import OPERATORS, Batch, Section

ALICE, BOB = b"alicesid", b"bobs_sid"
SPEC = json.dumps({"op": "apply", "fn": "ab" * 16, "targets": None, "label": "blue"}).encode()
NOW = 1_900_000_000.0


class Clock:
    now = NOW

    def __call__(self):
        return self.now


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
