"""What is kept until it is safe, and what the scheduler makes of engines that come back."""

from __future__ import annotations

import json

import pytest

from ipclite import wire
from ipclite.engine import Unsaved as EngineUnsaved
from ipclite.errors import ProtocolError
from ipclite.peers import MAIL_MAX, Mail
from ipclite.restore import Ledger, Restore, Roster
from ipclite.scheduler import Scheduler
from ipclite.tasks import (LOST_RESULT, UNKNOWN, Away, EngineDown, EngineUp, Fail, Finished, Hold, Release, Run, Settled, Spec,
                           Submit, Task, Void)
from ipclite.unsaved import Unsaved
from ipclite.wire import OK

SESSION = b"session1"


def key(i):
    return SESSION, i


def tasks_of(effects, kind=Run):
    return [task.key[1] for e in effects if type(e) is kind for task in (e.tasks if kind is not Fail else [e.task])]


def results(*seqs):
    return [wire.Result(seq, 0.0, 0.001, 1, OK, b"x") for seq in seqs]


def test_ranges():
    for numbers in ([], [1], [1, 2, 3], [0, 2, 3, 9]):
        assert [n for run in wire.decode_ranges(json.loads(json.dumps(wire.encode_ranges(numbers)))) for n in run] == numbers
    for bad in (5, [[1]], [[2, 1]], [["a", "b"]], [[3, 4], [1, 2]], [[-1, 2]], [[0, 1 << 65]], None, {"a": 1}):
        with pytest.raises(ProtocolError):
            wire.decode_ranges(bad)


def test_mail_is_kept_until_it_is_confirmed():
    mail = Mail()
    for text in (b"a", b"b", b"c"):
        mail.add([wire.RESULTS, text])
    mail.confirm(1)
    assert [m[1] for m in mail] == [b"b", b"c"] and mail.before == 1 and mail.number == 3
    mail.confirm(99)
    assert not list(mail) and mail.size == 0 and mail.before == 3
    for _ in range(3):
        mail.add([bytes(MAIL_MAX // 2)])
    assert len(list(mail)) == 2 and mail.size <= MAIL_MAX


def test_a_ledger_tells_whom_to_tell():
    ledger, one, two, items = Ledger(), object(), object(), [object() for _ in range(5)]
    for item, peer, number in zip(items, (one, two, None, one, two), (5, 1, 0, 9, 2)):
        ledger.note(item, peer, number)
    assert ledger.safe([]) == ledger.safe([object()]) == {}
    assert ledger.safe(items[:3]) == {one: 5, two: 1}
    assert ledger.safe([items[4]]) == {one: 9, two: 2}, "those before it are safe, too"


def test_a_roster_is_read_as_it_was_written(tmp_path):
    roster = Roster(tmp_path / "peers")
    assert roster.read() == ({}, set())
    engine = {"id": 3, "uuid": "u", "agent": "a", "host": "h", "pid": 1}
    roster.write([engine], [SESSION])
    assert Roster(tmp_path / "peers").read() == ({"u": engine}, {SESSION})
    for garbage in ("", "[]", '{"engines": 5}', '{"engines": [{"uuid": 1}], "clients": []}', '{"engines": [], "clients": ["xy"]}'):
        (tmp_path / "peers").write_text(garbage)
        assert roster.read() == ({}, set())


def test_a_former_run_waits_for_who_was_there():
    restore = Restore({"a": {}, "b": {}}, {SESSION}, 10.0)
    restore.placed(key(1), "a")
    restore.placed(key(2), "a")
    assert restore.engine_back("a", [key(2)]) == [key(1)] and not restore.over(1.0)
    restore.clients.clear()
    assert not restore.over(1.0) and restore.over(10.0)
    restore.engine_back("b", [])
    assert restore.over(1.0)


def test_a_client_sends_again_what_is_unknown():
    kept = Unsaved()
    spec, fan = b'{"op":"a","targets":null}', b'{"op":"b","targets":[4,5,6]}'
    kept.add(3, [wire.TASKS, *wire.encode_tasks(spec, SESSION, [(1, 1, b"p1"), (2, 1, b"p2")])])
    kept.add(7, [wire.TASKS, *wire.encode_tasks(spec, SESSION, [(3, 1, b"p3")]), *wire.encode_tasks(fan, SESSION, [(4, 3, b"pf")])])
    assert kept.numbers() == {1, 2, 3, 4, 5, 6}
    again = list(kept.again(SESSION, [2, 3, 5]))
    assert [sent for _, sent in again] == [[2], [3, 5]]
    told = [(json.loads(s)["targets"], t) for m, _ in again for s, _, ts in wire.decode_tasks(m) for t in ts]
    assert told == [(None, (2, 1, b"p2")), (None, (3, 1, b"p3")), ([5], (5, 1, b"pf"))]
    ((message, sent),) = kept.again(SESSION, [4, 5, 6])
    assert sent == [4, 5, 6] and [t for _, _, ts in wire.decode_tasks(message) for t in ts] == [(4, 3, b"pf")]
    kept.saved(3)
    assert kept.numbers() == {3, 4, 5, 6} and not list(kept.again(SESSION, [1, 2])) and not list(kept.again(SESSION, []))


def test_an_engine_keeps_results_until_they_are_safe():
    kept = EngineUnsaved()
    for seq in (1, 2, 3):
        mine = results(seq)
        kept.add(SESSION, mine, wire.encode_results(SESSION, 0, mine), False)
    kept.saved(1)
    large = bytearray(100_000)
    mine = [wire.Result(4, 0.0, 0.0, 1, OK, [b"", large])]
    kept.add(SESSION, mine, wire.encode_results(SESSION, 0, mine), False)
    assert [(r.seq, r.payload is None) for _, r in kept.take()] == [(2, False), (3, False), (4, True)]
    kept.add(SESSION, mine, wire.encode_results(SESSION, 0, mine), True)
    large[0] = 1
    ((_, result),) = kept.take()
    assert result.payload[1] == bytes(100_000), "user code may change what it returned"
    assert not kept.take()


def two_engines(spec=None, n=4):
    """A scheduler with two engines, and n tasks on them: {engine: [tasks]}"""
    scheduler = Scheduler(hwm=0)
    for engine in (0, 1):
        scheduler.handle(EngineUp(engine), 0.0)
    effects = scheduler.handle(Submit([Task(key(i), spec or Spec(), b"p") for i in range(n)]), 0.0)
    return scheduler, {e.engine_id: [t.key[1] for t in e.tasks] for e in effects if type(e) is Run}


def test_an_engine_that_comes_back_keeps_what_it_holds():
    scheduler, on = two_engines()
    assert scheduler.handle(Away([(0, "away")]), 1.0) == []
    scheduler.check()
    assert scheduler.handle(Submit([Task(key(9), Spec((0,)), b"p")]), 1.0) == [], "what is bound to it waits for it"
    first, second = on[0]
    effects = scheduler.handle(EngineUp(0, holds=[(key(first), 1, 0), (key(77), 1, 0)]), 2.0)
    scheduler.check()
    assert [e.ids for e in effects if type(e) is Void] == [[(key(77), 1)]]
    again = {t.key[1]: t.attempt for e in effects if type(e) is Run for t in e.tasks}
    assert again == {second: 2, 9: 1}, "what never arrived is sent again"
    assert scheduler.handle(Finished(0, SESSION, [(first, 0.0, 0.1, 0, 0, 1, OK)]), 3.0)


@pytest.mark.parametrize("once", [False, True])
def test_others_get_the_work_of_an_engine_that_stays_away(once):
    scheduler, on = two_engines(Spec(once=once))
    effects = scheduler.handle(Away([(0, "engine 0 is away")], True), 1.0)
    scheduler.check()
    assert sorted(tasks_of(effects)) == ([] if once else sorted(on[0]))
    effects = scheduler.handle(EngineDown(0, "engine 0 is gone", UNKNOWN, False), 2.0)
    assert sorted(tasks_of(effects, Fail)) == (sorted(on[0]) if once else [])
    assert all("retries=0" in e.message for e in effects if type(e) is Fail)


def test_what_has_surely_not_been_started_is_run_elsewhere_with_retries_0():
    scheduler, on = two_engines(Spec(once=True), 6)
    first, second, third = on[0]
    effects = scheduler.handle(EngineDown(0, "engine 0 is gone: crashed", key(second), True), 1.0)
    assert sorted(tasks_of(effects, Fail)) == [first, second] and tasks_of(effects) == [third]


def test_a_lost_result():
    for once in (False, True):
        scheduler, on = two_engines(Spec(once=once))
        scheduler.handle(Away([(0, "away")]), 1.0)
        effects = scheduler.handle(EngineUp(0, holds=[(key(i), 1, LOST_RESULT) for i in on[0]]), 2.0)
        assert sorted(tasks_of(effects, Fail if once else Run)) == sorted(on[0])
        scheduler.check()


def test_a_former_run_is_carried_on():
    scheduler = Scheduler()
    scheduler.handle(Hold(), 0.0)
    tasks = {i: Task(key(i), Spec(once=i == 4), b"p") for i in range(1, 7)}
    for i in (2, 3, 4):
        tasks[i].attempt = 1
    assert scheduler.handle(Submit(list(tasks.values())), 0.0) == []
    effects = scheduler.handle(EngineUp(0, holds=[(key(2), 1, 0), (key(50), 3, 0), (key(51), 1, 0)]), 1.0)
    scheduler.check()
    assert effects == [], "what it holds it keeps; of what nobody knows yet somebody may tell"
    scheduler.handle(Submit([Task(key(50), Spec(), b"p")]), 1.0)
    scheduler.check()
    assert scheduler.tasks[key(50)].engine == 0 and scheduler.tasks[key(50)].attempt == 3
    effects = scheduler.handle(Release(frozenset([key(5)])), 2.0)
    scheduler.check()
    assert [e.ids for e in effects if type(e) is Void] == [[(key(51), 1)]]
    assert tasks_of(effects, Settled) == [5] and tasks_of(effects, Fail) == [4]
    scheduler.handle(Finished(0, SESSION, [(2, 0.0, 1e-5, 0, 0, 1, OK), (50, 0.0, 1e-5, 0, 0, 3, OK)]), 3.0)
    assert {i: scheduler.tasks[key(i)].attempt for i in (1, 3, 6)} == {1: 1, 3: 2, 6: 1}


def test_an_attempt_of_1_is_surely_the_first():
    scheduler = Scheduler()
    scheduler.handle(Hold(), 0.0)
    scheduler.handle(Submit([Task(key(1), Spec(), b"p")]), 0.0)
    scheduler.handle(EngineUp(0), 0.0)
    effects = scheduler.handle(Release(doubtful=True), 1.0)
    assert [t.attempt for e in effects if type(e) is Run for t in e.tasks] == [2]
