"""The scheduler's rules, one by one. `Bench.do` also lets it check itself after every event."""

from __future__ import annotations

import json
import random
from collections import Counter

import pytest

from ipclite import queues
from ipclite import scheduler as module
from ipclite.errors import ProtocolError
from ipclite.queues import POLICIES
from ipclite.scheduler import Scheduler
from ipclite.tasks import (UNKNOWN, Abort, Accept, EngineDown, EngineUp, Fail, Finished, HostDown, Needs, Recall, Returned, Run,
                           Spec, State, Submit, Task, Tick)
from ipclite.wire import ERROR, OK, UNMET, msg_id

ME = b"session1"
SHORT, LONG = 1e-5, 10.0


class Bench:
    """A scheduler with engines 0 to n - 1, and shorthands to drive it. Tasks are named by their number."""

    def __init__(self, engines: int = 0, **options):
        self.scheduler = Scheduler(**options)
        self.now = 100.0
        self.seq = 0
        for i in range(engines):
            self.do(EngineUp(i))

    def do(self, event, after: float = 0.0):
        """Let `after` s pass, then handle an event; returns the effects."""
        self.now += after
        effects = self.scheduler.handle(event, self.now)
        self.scheduler.check()
        return effects

    def submit(self, n: int = 1, delay: float = 0.0, **spec):
        """Submit tasks that share a spec, `delay` s later; returns the effects."""
        shared = Spec(**spec)
        tasks = [Task((ME, self.seq + i), shared, b"") for i in range(n)]
        self.seq += n
        return self.do(Submit(tasks), delay)

    def held(self, engine: int) -> list[int]:
        """Numbers of the tasks that the scheduler thinks are on an engine, in order."""
        return [key[1] for key in self.scheduler.engines[engine].outstanding]

    def finish(self, engine: int, *seqs: int, status: int = OK, after: float = 0.0, took: float = SHORT):
        """An engine reports tasks (default: all that it holds) of their present attempt."""
        outstanding = self.scheduler.engines[engine].outstanding
        chosen = [(seq, outstanding[ME, seq].attempt) for seq in seqs or self.held(engine)]
        return self.report(engine, [(seq, 0.0, took, 0, 0, attempt, status) for seq, attempt in chosen], after)

    def report(self, engine: int, records, after: float = 0.0):
        return self.do(Finished(engine, ME, records), after)

    def give_back(self, engine: int, *seqs: int):
        outstanding = self.scheduler.engines[engine].outstanding
        return self.do(Returned(engine, ME, [(seq, outstanding[ME, seq].attempt) for seq in seqs]))

    def lose(self, engine: int, running=UNKNOWN, crashed: bool = True):
        running = (ME, running) if isinstance(running, int) else running
        return self.do(EngineDown(engine, f"engine {engine} was killed", running, crashed))

    def measured(self, took: float, **spec):
        """Make the run time of a function known; needs idle engines. Returns self."""
        self.submit(1, **spec)
        engine = self.scheduler.tasks[ME, self.seq - 1].engine
        self.finish(engine, took=took)
        return self


def runs(effects) -> dict[int, list[int]]:
    """What is sent: numbers by engine."""
    sent = [(e.engine_id, [t.key[1] for t in e.tasks]) for e in effects if type(e) is Run]
    assert len(dict(sent)) == len(sent), "two messages to one engine"
    return dict(sent)


def fails(effects) -> dict[int, str]:
    """What has ended without a result: class by number."""
    return {e.task.key[1]: e.ename for e in effects if type(e) is Fail}


def recalls(effects) -> dict[int, list[int]]:
    """What is asked back: numbers by engine."""
    return {e.engine_id: [key[1] for key in e.keys] for e in effects if type(e) is Recall}


def accepts(effects) -> list[Accept]:
    return [e for e in effects if type(e) is Accept]


# specs

def test_a_spec_is_read_from_json():
    raw = json.dumps({"targets": [2, 1], "retries": 3, "fn": "ab", "op": "apply", "timeout": 5, "other": [],
                      "after": {"ids": [msg_id((ME, 7))], "all": False}}).encode()
    spec = Spec.from_json(raw)
    assert (spec.targets, spec.retries, spec.fn, spec.function, spec.raw) == ((2, 1), 3, "ab", "ab", raw)
    assert (spec.after, spec.follow, spec.timeout) == (Needs(((ME, 7),), all=False), None, 5)


def test_an_empty_spec_means_any_engine_and_no_retries():
    spec = Spec.from_json(b'{"op": "pull"}')
    assert (spec.targets, spec.retries, spec.fn, spec.function, spec.timeout) == (None, 0, None, "pull", None)


@pytest.mark.parametrize("body", [
    b"{", b"[]", b"\xff", b'{"targets": []}', b'{"targets": 3}', b'{"targets": [true]}', b'{"targets": ["1"]}',
    b'{"retries": -1}', b'{"retries": 1.5}', b'{"retries": true}', b'{"retries": null}', b'{"fn": 7}', b'{"op": null}',
    b'{"run_timeout": -1}', b'{"run_timeout": "1"}', b'{"run_timeout": NaN}',
    b'{"timeout": -1}', b'{"timeout": "1"}', b'{"timeout": NaN}', b'{"timeout": Infinity}', b'{"timeout": true}',
    b'{"after": []}', b'{"after": {}}', b'{"follow": {"ids": 3}}', b'{"after": {"ids": ["nonsense"]}}',
    b'{"after": {"ids": [], "success": false}}', b'{"after": {"ids": [], "all": 1}}', b'{"after": {"ids": [null]}}',
])
def test_a_malformed_spec_is_refused(body):
    with pytest.raises(ProtocolError):
        Spec.from_json(body)


# transitions

def test_only_the_table_of_transitions_is_allowed():
    bench = Bench(1)
    bench.submit()
    task = bench.scheduler.tasks[ME, 0]
    with pytest.raises(RuntimeError, match="can not become WAITING"):
        bench.scheduler._move(task, State.WAITING)
    assert all(not module.TRANSITIONS[end] for end in (State.DONE, State.FAILED, State.ABORTED))


def test_the_story_of_a_task_is_told():
    bench = Bench(2)
    bench.submit(2)
    bench.lose(0)
    told = "\n".join(bench.scheduler.story((ME, 0)))
    assert "assigned, engine 0, attempt 1" in told and "engine 0 was killed" in told
    assert bench.scheduler.story((ME, 99)) == []


def test_an_ended_task_is_forgotten_and_counted():
    bench = Bench(1)
    bench.submit()
    bench.finish(0)
    assert bench.scheduler.tasks == {} and bench.scheduler.ended[State.DONE] == 1
    assert bench.scheduler.story((ME, 0))


def test_check_notices_a_lost_task():
    bench = Bench(1)
    bench.submit()
    bench.scheduler.engines[0].outstanding.clear()
    with pytest.raises(AssertionError):
        bench.scheduler.check()


# who gets what

def test_idle_engines_come_first_the_longest_idle_before_others():
    bench = Bench(3)
    assert runs(bench.submit()) == {0: [0]}
    bench.finish(0)
    assert [runs(bench.submit()) for _ in range(3)] == [{1: [1]}, {2: [2]}, {0: [3]}]


def test_a_function_never_measured_spreads_and_is_not_prefetched():
    bench = Bench(4)
    assert runs(bench.submit(10)) == {0: [0], 1: [1], 2: [2], 3: [3]}


def test_tiny_tasks_are_shared_out_evenly():
    bench = Bench(4).measured(SHORT)
    assert sorted(map(len, runs(bench.submit(8)).values())) == [2, 2, 2, 2]


def test_uneven_numbers_differ_by_one():
    bench = Bench(4).measured(SHORT)
    sizes = sorted(map(len, runs(bench.submit(10)).values()))
    assert sum(sizes) == 10 and sizes[-1] - sizes[0] <= 2 and sizes[-1] == 3


def test_with_no_idle_engine_the_one_with_the_least_work_is_next():
    bench = Bench(2).measured(SHORT, fn="short").measured(2e-3, fn="medium")
    bench.submit(1, fn="medium", targets=(0,))
    bench.submit(1, fn="short", targets=(1,))
    assert runs(bench.submit(1, fn="short")) == {1: [4]}


def test_short_tasks_are_prefetched_for_about_ten_milliseconds():
    bench = Bench(1).measured(1e-3)
    bench.submit(100)
    assert 8 <= len(bench.held(0)) <= 12
    bench.finish(0, *bench.held(0)[:5], took=1e-3)
    assert 8 <= len(bench.held(0)) <= 12


def test_an_engine_holds_a_limited_number_of_even_the_shortest_tasks():
    bench = Bench(1).measured(0.0)
    bench.submit(5000)
    assert len(bench.held(0)) == module.CAP


def test_long_tasks_travel_one_at_a_time():
    bench = Bench(2).measured(LONG)
    bench.submit(10)
    assert [len(bench.held(i)) for i in (0, 1)] == [1, 1]


def test_an_estimate_goes_up_at_once_and_down_by_degrees():
    bench = Bench(1).measured(SHORT).measured(LONG)
    bench.submit(5)
    assert len(bench.held(0)) == 1
    for _ in range(40):
        bench.finish(0, bench.held(0)[0])
        bench.submit()
    bench.submit(50)
    assert len(bench.held(0)) > 10


@pytest.mark.parametrize("nonsense", [float("nan"), float("inf"), -1.0])
def test_a_run_time_that_makes_no_sense_does_no_harm(nonsense):
    bench = Bench(1).measured(nonsense)
    bench.submit(10)
    assert len(bench.held(0)) == 10


def test_estimates_are_kept_of_a_limited_number_of_functions(monkeypatch):
    monkeypatch.setattr(module, "FUNCTIONS", 10)
    bench = Bench(1)
    for i in range(50):
        bench.measured(SHORT, fn=str(i))
    assert len(bench.scheduler._estimates) <= 11


@pytest.mark.parametrize("hwm, held", [(1, 1), (3, 3), (0, 20)])
def test_hwm_overrides_the_prefetch(hwm, held):
    bench = Bench(1, hwm=hwm).measured(LONG)
    bench.submit(20)
    assert len(bench.held(0)) == held


def test_tasks_of_any_engine_run_in_the_order_of_submission():
    bench = Bench(1).measured(SHORT)
    bench.submit(5, fn="a")
    bench.submit(5)
    order = []
    while bench.scheduler.tasks:
        order += bench.held(0)
        bench.finish(0)
    assert order == list(range(1, 11))


def test_a_pinned_engine_runs_by_age_whatever_queue_a_task_is_in():
    bench = Bench(1, hwm=0)
    bench.lose(0)
    bench.submit(2)
    bench.do(EngineUp(1))
    assert bench.held(1) == [0, 1]
    bench.scheduler.engines[1].stuck = True
    bench.scheduler._settle(bench.scheduler.engines[1])
    for spec in ({"targets": (1,)}, {}, {"targets": (1, 0)}, {"targets": (1,)}, {}):
        bench.submit(2, **spec)
    bench.finish(1)
    assert bench.held(1) == list(range(2, 12))


def test_pinned_tasks_go_where_they_must_and_do_not_hold_up_others():
    bench = Bench(2).measured(LONG)
    bench.submit(3, targets=(0,))
    assert runs(bench.submit(1)) == {1: [4]}
    assert bench.held(0) == [1]
    assert runs(bench.finish(0, took=LONG)) == {0: [2]}


def test_several_targets_share_and_leave_other_engines_alone():
    bench = Bench(4).measured(SHORT)
    assert {e: len(t) for e, t in runs(bench.submit(8, targets=(1, 3))).items()} == {1: 4, 3: 4}


def test_a_target_that_does_not_exist_fails():
    bench = Bench(2)
    effects = bench.submit(2, targets=(7,))
    assert fails(effects) == {0: "EngineError", 1: "EngineError"}
    assert effects[0].message.startswith("engine 7 is not registered;")
    effects = bench.submit(1, targets=(7, 8))
    assert fails(effects) == {2: "EngineError"} and effects[0].message.startswith("none of the engines 7, 8 is registered;")
    assert runs(bench.submit(1, targets=(7, 1))) == {1: [3]}


def test_a_task_that_is_submitted_again_while_it_lives_is_not_run_twice():
    bench = Bench(2)
    bench.submit(1)
    bench.seq = 0
    assert bench.submit(1) == []


def test_a_new_engine_takes_what_waits():
    bench = Bench(1).measured(LONG)
    bench.submit(3)
    assert runs(bench.do(EngineUp(5))) == {5: [2]}


def test_an_engine_is_registered_once():
    bench = Bench(1)
    with pytest.raises(ValueError, match="engine 0 is up already"):
        bench.do(EngineUp(0))


# results

def test_all_results_count_or_the_positions_that_do():
    bench = Bench(1).measured(SHORT)
    bench.submit(3)
    good = [(seq, 0.0, SHORT, 0, 0, 1, OK) for seq in (1, 2)]
    assert accepts(bench.report(0, good)) == [Accept(0, ME, None)]
    again = [*good, (3, 0.0, SHORT, 0, 0, 1, OK), (99, 0.0, SHORT, 0, 0, 1, OK)]
    assert accepts(bench.report(0, again)) == [Accept(0, ME, [2])]
    assert bench.report(0, again) == []


def test_results_of_an_engine_that_is_gone_are_void():
    bench = Bench(2)
    bench.submit(1)
    bench.lose(0)
    assert bench.report(0, [(0, 0.0, SHORT, 0, 0, 1, OK)]) == []
    assert bench.held(1) == [0]


def test_results_of_an_old_attempt_are_void():
    bench = Bench(2)
    bench.submit(1)
    bench.lose(0)
    assert bench.report(1, [(0, 0.0, SHORT, 0, 0, 1, OK)]) == []
    assert accepts(bench.report(1, [(0, 0.0, SHORT, 0, 0, 2, OK)])) == [Accept(1, ME, None)]


def test_a_task_that_raised_is_not_retried_unless_told():
    bench = Bench(2)
    bench.submit(1)
    assert accepts(bench.finish(0, status=ERROR)) == [Accept(0, ME, None)]


def test_a_task_that_raised_is_retried_on_another_engine_and_its_last_error_counts():
    bench = Bench(2)
    bench.submit(1, retries=1)
    effects = bench.finish(0, status=ERROR)
    assert accepts(effects) == [] and runs(effects) == {1: [0]}
    assert accepts(bench.finish(1, status=ERROR)) == [Accept(1, ME, None)]


def test_when_every_engine_has_failed_a_task_it_may_try_them_again():
    bench = Bench(2)
    bench.submit(1, retries=3)
    where = []
    for engine in (0, 1, 0, 1):
        where.append(bench.scheduler.tasks[ME, 0].engine)
        bench.finish(where[-1], status=ERROR)
        assert engine is not None
    assert where[:2] == [0, 1] and len(where) == 4 and bench.scheduler.tasks == {}


def test_a_retried_task_waits_for_an_engine_that_has_not_failed_it():
    bench = Bench(2).measured(LONG)
    bench.submit(2, retries=1)
    failed, other = bench.held(1)[0], bench.held(0)[0]
    assert runs(bench.finish(1, status=ERROR)) == {}
    assert runs(bench.finish(0, other, took=LONG)) == {0: [failed]}


def test_a_retried_task_comes_before_younger_ones():
    bench = Bench(1, hwm=1)
    bench.submit(3, retries=1)
    assert runs(bench.finish(0, status=ERROR)) == {0: [0]}


# take back

def stuck_engine(**options) -> Bench:
    """Engine 0 runs task 2 and holds 3 to 5; engine 1 is idle, and all were thought to be short."""
    bench = Bench(2, **options).measured(SHORT).measured(SHORT)
    bench.submit(4, targets=(0, 1))
    bench.finish(1)
    while len(bench.held(0)) < 4:
        bench.submit(2)
        bench.finish(1)
    return bench


def test_an_idle_engine_gets_what_a_stuck_one_has_not_started():
    bench = stuck_engine()
    assert recalls(bench.do(Tick(), 0.010)) == {}
    first, *others = bench.held(0)
    assert bench.scheduler.next_deadline() is not None
    assert recalls(bench.do(Tick(), 0.015)) == {0: others}
    assert bench.held(0) == [first, *others], "they stay until they are given back"
    assert recalls(bench.do(Tick(), 1.0)) == {}, "once is enough"
    assert runs(bench.give_back(0, *others)) == {1: others}
    assert bench.scheduler.tasks[ME, others[0]].attempt == 2


def test_nothing_is_sent_behind_a_task_that_takes_long():
    bench = stuck_engine()
    bench.do(Tick(), 0.030)
    bench.give_back(0, *bench.held(0)[1:])
    bench.submit(2000)
    assert len(bench.held(0)) == 1


def test_an_engine_that_gets_on_again_is_fed_again():
    bench = stuck_engine()
    bench.do(Tick(), 0.030)
    first, *others = bench.held(0)
    bench.finish(0, first)
    bench.submit(100)
    assert len(bench.held(0)) > len(others)


def test_a_stuck_engine_that_gave_everything_back_is_not_stuck_any_more():
    bench = stuck_engine()
    bench.do(Tick(), 0.030)
    bench.submit(3000)
    bench.give_back(0, *bench.held(0))
    assert len(bench.held(0)) > 5 and not bench.scheduler.engines[0].stuck


def test_a_recalled_task_may_finish_instead():
    bench = stuck_engine()
    held = bench.held(0)
    bench.do(Tick(), 0.030)
    assert accepts(bench.finish(0, *held)) == [Accept(0, ME, None)]
    assert bench.scheduler.tasks == {}


def test_nothing_is_recalled_while_an_engine_makes_progress_or_none_is_idle():
    bench = stuck_engine()
    bench.finish(0, bench.held(0)[0], after=0.015)
    assert recalls(bench.do(Tick(), 0.015)) == {}
    bench.submit(1, targets=(1,))
    assert recalls(bench.do(Tick(), 1.0)) == {}


def test_tasks_that_the_idle_engine_may_not_run_stay():
    bench = Bench(2).measured(SHORT)
    bench.submit(5, targets=(0,))
    assert recalls(bench.do(Tick(), 1.0)) == {}
    assert bench.scheduler.next_deadline() is None, "nothing to wait for"


def test_with_a_limit_of_its_own_half_is_taken_back():
    bench = Bench(1, hwm=0).measured(LONG)
    bench.submit(9)
    bench.do(EngineUp(1))
    assert recalls(bench.do(Tick(), 0.030)) == {0: [6, 7, 8, 9]}


def test_an_engine_with_much_work_shares_it_though_it_makes_progress():
    bench = Bench(1, hwm=0).measured(LONG)
    bench.submit(9)
    bench.do(EngineUp(1))
    bench.finish(0, 1, took=LONG, after=0.015)
    assert recalls(bench.do(Tick(), 0.010)) == {0: [6, 7, 8, 9]}


def test_an_engine_may_give_back_tasks_unasked():
    bench = Bench(2).measured(SHORT)
    bench.submit(4)
    mine = bench.held(0)
    bench.give_back(0, *mine)
    assert set(mine) <= set(bench.held(0) + bench.held(1)) and len(bench.scheduler.tasks) == 4


def test_what_was_given_back_of_an_old_attempt_is_ignored():
    bench = Bench(1)
    bench.submit(1)
    assert bench.do(Returned(0, ME, [(0, 7), (5, 1)])) == [] and bench.held(0) == [0]
    assert bench.do(Returned(9, ME, [(0, 1)])) == []


# engines that go

def test_tasks_of_a_lost_engine_go_elsewhere_in_their_old_order():
    bench = Bench(1, hwm=0)
    bench.submit(3)
    bench.do(EngineUp(1))
    assert runs(bench.lose(0)) == {1: [0, 1, 2]}
    assert [bench.scheduler.tasks[ME, i].crashes for i in range(3)] == [1, 0, 0]


def test_the_task_that_was_running_is_the_suspect():
    bench = Bench(2, hwm=0)
    bench.submit(6, targets=(0, 1))
    mine = bench.held(0)
    bench.lose(0, running=mine[1])
    assert [bench.scheduler.tasks[ME, i].crashes for i in mine] == [0, 1, 0]
    assert "may have run" in "".join(bench.scheduler.story((ME, mine[0])))
    assert "not started" in "".join(bench.scheduler.story((ME, mine[2])))


@pytest.mark.parametrize("running, crashed", [(None, True), (UNKNOWN, False), (77, True)])
def test_nobody_is_suspected_without_reason(running, crashed):
    bench = Bench(2)
    bench.submit(1)
    bench.lose(0, running, crashed)
    assert bench.scheduler.tasks[ME, 0].crashes == 0


@pytest.mark.parametrize("limit", [0, 1, 3])
def test_a_task_that_kills_engines_is_given_up(limit):
    bench = Bench(limit + 3, crash_limit=limit)
    bench.submit(1)
    for _ in range(limit):
        assert fails(bench.lose(bench.scheduler.tasks[ME, 0].engine, running=0)) == {}
    effects = bench.lose(bench.scheduler.tasks[ME, 0].engine, running=0)
    assert fails(effects) == {0: "EngineError"} and "was killed" in effects[0].message


def chunk(bench: Bench, op: str = "map") -> Task:
    """A task of a bench, that came as JSON."""
    task = Task((ME, 0), Spec.from_json(json.dumps({"op": op, "fn": "ab"}).encode()), b"")
    bench.do(Submit([task]))
    return task


def ends_at(bench: Bench, task: Task, item: int):
    """The engine of a task is killed by one of its items."""
    return bench.do(EngineDown(task.engine, f"engine {task.engine} was killed", task.key, True, None, item + 1))


def test_an_item_of_a_chunk_that_kills_engines_is_left_out_and_the_others_run_again():
    bench = Bench(6)
    task = chunk(bench)
    assert not fails(ends_at(bench, task, 5))
    assert "skip" not in json.loads(task.spec.raw)
    for item in (5, 7):  # the first is given up after its second engine, the other gets two of its own
        assert not fails(ends_at(bench, task, item))
        if item == 7:
            assert not fails(ends_at(bench, task, item))
    body = json.loads(task.spec.raw)
    assert list(body["skip"]) == ["5", "7"] and all("ended 2 engines" in why for why in body["skip"].values())
    assert (body["op"], task.spec.fn, task.spec.function, task.crashes) == ("map", "ab", "ab", 0)
    bench.finish(task.engine)


@pytest.mark.parametrize("op, item", [("apply", 3), ("map", -1)])
def test_what_has_no_items_is_given_up_as_a_whole(op, item):
    bench = Bench(4)
    task = chunk(bench, op)
    assert not fails(ends_at(bench, task, item))
    assert fails(ends_at(bench, task, item)) == {0: "EngineError"}


@pytest.mark.parametrize("replaced", [True, False])
def test_tasks_wait_for_the_engine_that_replaces_the_last_one(replaced):
    bench = Bench(1)
    bench.submit(1)
    effects = bench.do(EngineDown(0, "engine 0 was killed", (ME, 0), True, replaced=replaced))
    assert fails(effects) == ({} if replaced else {0: "EngineError"})
    assert runs(bench.do(EngineUp(0))) == ({0: [0]} if replaced else {})
    if replaced:  # and it is the suspect none the less
        assert fails(bench.do(EngineDown(0, "engine 0 was killed", (ME, 0), True, replaced=True))) == {0: "EngineError"}


def test_an_item_that_was_left_out_already_is_not_blamed_for_ever():
    bench = Bench(5)
    task = chunk(bench)
    for _ in range(3):
        assert not fails(ends_at(bench, task, 1))
    assert fails(ends_at(bench, task, 1)) == {0: "EngineError"}


def test_pinned_tasks_end_with_their_engine():
    bench = Bench(2).measured(LONG)
    bench.submit(3, targets=(0,))
    assert fails(bench.lose(0)) == dict.fromkeys((1, 2, 3), "EngineError")


def test_tasks_with_several_targets_end_with_the_last_of_them():
    bench = Bench(3).measured(LONG)
    bench.submit(4, targets=(0, 1))
    assert fails(bench.lose(0)) == {}
    assert fails(bench.lose(1, None)) == dict.fromkeys((1, 2, 3, 4), "EngineError")


def test_tasks_on_the_last_engine_end_with_it_and_those_in_the_queue_wait():
    bench = Bench(1)
    bench.submit(3)
    assert fails(bench.lose(0)) == {0: "EngineError"}
    assert bench.scheduler.next_deadline() == bench.now + 30
    assert runs(bench.do(EngineUp(1), 29)) == {1: [1]}
    assert bench.scheduler.next_deadline() is None


def test_the_wait_for_an_engine_begins_when_the_last_one_goes():
    bench = Bench(1)
    bench.submit(2)
    bench.do(Tick(), 100.0)
    bench.lose(0)
    assert bench.scheduler.next_deadline() == bench.now + 30 and len(bench.scheduler.tasks) == 1


def test_a_retry_in_the_queue_waits_for_an_engine_too():
    bench = Bench(2).measured(LONG)
    bench.submit(2, retries=1)
    failed = bench.held(1)[0]
    bench.finish(1, status=ERROR)
    bench.lose(1)
    assert failed not in fails(bench.lose(0))
    assert runs(bench.do(EngineUp(2))) == {2: [failed]}


def test_tasks_without_any_engine_wait_for_a_while():
    bench = Bench(no_engine_s=5.0)
    bench.submit(2)
    bench.submit(1, delay=2.0)
    assert fails(bench.do(Tick(), 2.9)) == {}
    assert bench.scheduler.next_deadline() == 105.0
    assert fails(bench.do(Tick(), 0.2)) == {0: "NoEnginesRegistered", 1: "NoEnginesRegistered"}
    assert fails(bench.do(Tick(), 2.0)) == {2: "NoEnginesRegistered"}
    assert bench.scheduler.next_deadline() is None


def test_a_retry_forgets_an_exclusion_when_the_other_engines_go():
    bench = Bench(2).measured(LONG)
    bench.submit(2, retries=1)
    failed = bench.held(1)[0]
    bench.finish(1, status=ERROR)
    assert runs(bench.lose(0)) == {1: [failed]} or failed in bench.held(1)


def test_the_end_of_an_unknown_engine_is_ignored():
    assert Bench(1).lose(5) == []


# abort

def test_a_queued_task_is_aborted_at_once():
    bench = Bench(1)
    bench.submit(3)
    assert fails(bench.do(Abort(ME, [2, 77]))) == {2: "TaskAborted"}
    assert fails(bench.do(Abort(ME, [2]))) == {}
    assert runs(bench.finish(0, took=LONG)) == {0: [1]}
    assert runs(bench.finish(0, took=LONG)) == {}


def test_a_task_on_an_engine_is_asked_back_and_then_aborted():
    bench = Bench(1).measured(SHORT)
    bench.submit(3)
    effects = bench.do(Abort(ME, [2, 3]))
    assert recalls(effects) == {0: [2, 3]} and fails(effects) == {}
    assert recalls(bench.do(Abort(ME, [2, 3]))) == {}
    assert fails(bench.give_back(0, 3)) == {3: "TaskAborted"}
    assert accepts(bench.finish(0, 1, 2)) == [Accept(0, ME, None)], "it had started"


def test_an_aborted_task_is_neither_retried_nor_moved():
    bench = Bench(2)
    bench.submit(2, retries=5)
    bench.do(Abort(ME, [0, 1]))
    assert accepts(bench.finish(0, status=ERROR)) == [Accept(0, ME, None)]
    assert fails(bench.lose(1)) == {1: "TaskAborted"}


def test_aborting_what_was_recalled_for_another_engine():
    bench = stuck_engine()
    _, second, *_ = bench.held(0)
    bench.do(Tick(), 0.030)
    assert bench.do(Abort(ME, [second])) == []
    assert fails(bench.give_back(0, second)) == {second: "TaskAborted"}


# dependencies

def needs(*seqs: int, **flags) -> Needs:
    return Needs(tuple((ME, seq) for seq in seqs), **flags)


def test_after_waits_for_all_and_then_keeps_its_place():
    bench = Bench(1, hwm=1)
    bench.submit(4)
    shared = Spec(after=needs(0, 1))
    assert runs(bench.do(Submit([Task((ME, 50), shared, b"")]))) == {}
    bench.finish(0)
    assert runs(bench.finish(0)) == {0: [2]}
    for seq in (2, 3):
        bench.finish(0, seq)
    assert bench.held(0) == [50]


def depend(bench: Bench, seq: int = 50, **spec):
    return bench.do(Submit([Task((ME, seq), Spec(**spec), b"")]))


def test_after_what_has_ended_already():
    bench = Bench(1).measured(SHORT)
    assert runs(depend(bench, after=needs(0))) == {0: [50]}
    assert fails(depend(bench, 51, after=needs(0, success=False, failure=True))) == {51: "ImpossibleDependency"}


@pytest.mark.parametrize("flags, status, end", [
    ({}, OK, "runs"), ({}, ERROR, "ImpossibleDependency"),
    ({"success": False, "failure": True}, ERROR, "runs"),
    ({"success": False, "failure": True}, OK, "ImpossibleDependency"),
    ({"failure": True}, ERROR, "runs"), ({"failure": True}, OK, "runs"),
])
def test_success_and_failure(flags, status, end):
    bench = Bench(1)
    bench.submit(1)
    depend(bench, after=needs(0, **flags))
    effects = bench.finish(0, status=status)
    assert (runs(effects), fails(effects)) == (({0: [50]}, {}) if end == "runs" else ({}, {50: end}))


def test_any_of_several_is_enough_until_none_is_left():
    bench = Bench(3)
    bench.submit(3)
    depend(bench, after=needs(0, 1, 2, all=False))
    depend(bench, 51, after=needs(0, 1, all=False, success=False, failure=True))
    assert fails(bench.finish(0)) == {}
    assert bench.scheduler.tasks[ME, 50].state is State.ASSIGNED
    assert fails(bench.finish(1)) == {51: "ImpossibleDependency"}


def test_a_task_that_is_run_once_more_is_waited_for():
    bench = Bench(1).measured(SHORT)
    bench.seq = 0
    bench.submit(1)
    assert runs(depend(bench, after=needs(0))) == {}
    assert runs(bench.finish(0)) == {0: [50]}


def test_an_empty_dependency_is_met():
    assert runs(depend(Bench(1), after=needs(), follow=needs(all=False))) == {0: [50]}


def test_an_unknown_or_own_id_is_invalid():
    bench = Bench(1)
    effects = depend(bench, after=needs(77))
    assert fails(effects) == {50: "InvalidDependency"} and msg_id((ME, 77)) in effects[0].message
    assert fails(depend(bench, 51, after=needs(51))) == {51: "InvalidDependency"}
    bench.submit(1)
    assert fails(depend(bench, 52, after=needs(0), follow=needs(0, 78))) == {52: "InvalidDependency"}


def test_how_tasks_ended_is_remembered_of_a_limited_number(monkeypatch):
    monkeypatch.setattr(queues, "OUTCOMES", 10)
    monkeypatch.setattr(queues, "OUTCOME_BLOCK", 4)
    monkeypatch.setattr(queues, "BLOCK_COST", 0)
    bench = Bench(1)
    for _ in range(50):
        bench.measured(SHORT)
    assert fails(depend(bench, 100, after=needs(40, 49))) == {}
    assert fails(depend(bench, 101, after=needs(20))) == {101: "InvalidDependency"}
    known = [block for blocks in (bench.scheduler._outcomes.new, bench.scheduler._outcomes.old)
             for book in blocks.values() for block in book.values()]
    assert 10 <= sum(len(block) - block.count(0) for block in known) <= 21


def test_a_task_that_ends_without_a_result_has_failed():
    bench = Bench(1)
    bench.submit(2)
    depend(bench, after=needs(1))
    depend(bench, 51, after=needs(1, success=False, failure=True))
    assert fails(bench.do(Abort(ME, [1]))) == {1: "TaskAborted", 50: "ImpossibleDependency"}
    assert runs(bench.finish(0, took=SHORT)) == {0: [51]}


@pytest.mark.parametrize("fate", ["success", "failure"])
def test_a_chain_of_ten_thousand(fate):
    n = 10_000
    scheduler = Scheduler()
    scheduler.handle(EngineUp(0), 0.0)
    tasks = [Task((ME, i), Spec(after=needs(i - 1) if i else None), b"") for i in range(n)]
    effects = scheduler.handle(Submit(tasks), 0.0)
    ended = 0
    for i in range(n if fate == "success" else 1):
        assert runs(effects) == {0: [i]}
        effects = scheduler.handle(Finished(0, ME, [(i, 0.0, 0.0, 0, 0, 1, OK if fate == "success" else ERROR)]), 0.0)
        ended += 1 + len(fails(effects))
    assert ended == n and scheduler.tasks == {} == scheduler._dependents
    scheduler.check()


def test_tasks_of_a_section_wait_together():
    bench = Bench(2).measured(SHORT)
    bench.submit(1, targets=(0,))
    shared = Spec(after=needs(1))
    bench.do(Submit([Task((ME, 50 + i), shared, b"") for i in range(1000)]))
    assert len(bench.scheduler._dependents[ME, 1]) == 1
    bench.do(Abort(ME, [50]))
    bench.finish(0)
    assert len(bench.held(0)) + len(bench.held(1)) == 999


def test_the_last_waiting_task_aborted_leaves_nothing():
    bench = Bench(1)
    bench.submit(1)
    depend(bench, after=needs(0))
    assert fails(bench.do(Abort(ME, [50]))) == {50: "TaskAborted"}
    assert bench.scheduler._dependents == {}


def test_follow_runs_where_the_other_ran():
    bench = Bench(3).measured(SHORT).measured(SHORT)
    for seq, where in ((50, 0), (51, 1), (52, 0)):
        assert runs(depend(bench, seq, follow=needs(where))) == {where: [seq]}


def test_follow_several():
    bench = Bench(3).measured(SHORT).measured(SHORT)
    assert fails(depend(bench, 50, follow=needs(0, 1))) == {50: "ImpossibleDependency"}
    assert set(runs(depend(bench, 51, follow=needs(0, 1, all=False)))) < {0, 1}
    assert fails(depend(bench, 52, follow=needs(0), targets=(1, 2))) == {52: "ImpossibleDependency"}
    bench.lose(0, None)
    assert fails(depend(bench, 53, follow=needs(0))) == {53: "ImpossibleDependency"}


def test_a_dependency_released_after_its_target_went():
    bench = Bench(2)
    bench.submit(1)
    depend(bench, after=needs(0), targets=(1,))
    bench.lose(1)
    assert fails(bench.finish(0)) == {50: "EngineError"}


# refusals

def test_a_refused_task_tries_the_other_engines_without_using_up_retries():
    bench = Bench(3)
    bench.submit(1, retries=1)
    tried = []
    for _ in range(2):
        tried.append(bench.scheduler.tasks[ME, 0].engine)
        assert accepts(bench.finish(tried[-1], status=UNMET)) == []
    last = bench.scheduler.tasks[ME, 0].engine
    assert {*tried, last} == {0, 1, 2} and bench.scheduler.tasks[ME, 0].failures == 0
    assert fails(bench.finish(last, status=UNMET)) == {0: "ImpossibleDependency"}


def test_a_task_refused_by_some_and_failed_by_others_is_retried_where_it_failed():
    bench = Bench(2)
    bench.submit(1, retries=2)
    bench.finish(0, status=UNMET)
    assert runs(bench.finish(1, status=ERROR)) == {1: [0]}
    assert accepts(bench.finish(1)) == [Accept(1, ME, None)]


def test_a_refused_task_waits_for_an_engine_that_has_not_been_asked():
    bench = Bench(2).measured(LONG)
    bench.submit(1, targets=(0,))
    bench.submit(1)
    bench.finish(1, status=UNMET)
    assert runs(bench.do(EngineUp(2))) == {2: [2]}
    bench.lose(0, None)
    assert fails(bench.finish(2, status=UNMET)) == {2: "ImpossibleDependency"}


def test_a_refused_task_whose_last_hope_goes():
    bench = Bench(2).measured(LONG)
    bench.submit(1, targets=(0,))
    bench.submit(1)
    bench.finish(1, status=UNMET)
    assert fails(bench.lose(0)) == {1: "EngineError", 2: "ImpossibleDependency"}


def test_an_aborted_task_that_is_refused_has_not_run():
    bench = Bench(2)
    bench.submit(1)
    bench.do(Abort(ME, [0]))
    assert fails(bench.finish(0, status=UNMET)) == {0: "TaskAborted"}


# timeouts

def test_a_task_that_waits_too_long_times_out():
    bench = Bench(1).measured(LONG)
    bench.submit(2, timeout=5.0)
    assert bench.scheduler.next_deadline() == bench.now + 5
    assert fails(bench.do(Tick(), 4.9)) == {}
    assert fails(bench.do(Tick(), 0.2)) == {2: "TaskTimeout"}
    assert accepts(bench.finish(0)), "the other was running"


def test_a_dependency_that_takes_too_long_times_out():
    bench = Bench(1)
    bench.submit(1)
    depend(bench, after=needs(0), timeout=1.0)
    depend(bench, 51, after=needs(50, failure=True))
    effects = bench.do(Tick(), 1.0)
    assert fails(effects) == {50: "DependencyTimeout"} and bench.scheduler._dependents == {}
    assert runs(bench.finish(0)) == {0: [51]}


def test_a_timeout_of_zero_means_now_or_never():
    bench = Bench(1)
    effects = bench.submit(2, timeout=0)
    assert runs(effects) == {0: [0]} and fails(effects) == {1: "TaskTimeout"}


def test_a_timeout_ends_with_the_first_assignment():
    bench = Bench(2, hwm=1)
    bench.submit(1, targets=(0,))
    bench.submit(1, targets=(0,), timeout=0.9)
    bench.submit(1, timeout=1.0)
    bench.lose(1)
    assert bench.scheduler.tasks[ME, 2].state is State.READY
    assert fails(bench.do(Tick(), 2.0)) == {1: "TaskTimeout"}
    assert runs(bench.finish(0)) == {0: [2]}


def test_timeouts_of_ended_tasks_are_not_kept():
    bench = Bench(2).measured(LONG)
    bench.submit(1, targets=(0,))
    bench.submit(1, targets=(0,), timeout=60.0)
    for _ in range(500):
        bench.submit(1, timeout=3600.0)
        bench.finish(1, took=LONG)
    assert len(bench.scheduler._timeouts) <= 80 and bench.scheduler.next_deadline() == bench.now + 60


def test_the_ranking_of_engines_does_not_grow_with_use():
    bench = Bench(2)
    for _ in range(500):
        bench.submit(1, targets=(1,))
        bench.finish(1)
    assert len(bench.scheduler._heap) <= 80


# policies

@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_runs_everything_and_uses_every_engine(policy):
    bench = Bench(4, policy=policy, rng=random.Random(1))
    bench.submit(100)
    used = Counter()
    while bench.scheduler.tasks:
        engine = max(bench.scheduler.engines.values(), key=lambda e: len(e.outstanding)).id
        used[engine] += len(bench.held(engine))
        bench.finish(engine)
    assert sum(used.values()) == 100 and set(used) == {0, 1, 2, 3}


def one_by_one(policy: str, n: int = 400) -> Counter:
    """Where tasks go that come one at a time while engine 0 has much work."""
    bench = Bench(4, policy=policy, rng=random.Random(2), hwm=0).measured(1.0)
    bench.submit(20, targets=(0,))
    where = Counter()
    for _ in range(n):
        ((engine, (seq,)),) = runs(bench.submit(1)).items()
        where[engine] += 1
        bench.finish(engine, seq, took=1.0)
    return where


def test_leastload_avoids_the_busy_engine():
    assert one_by_one("leastload")[0] == 0


@pytest.mark.parametrize("policy", ["lru", "pure"])
def test_turns_are_taken_whatever_the_load(policy):
    assert set(one_by_one(policy).values()) == {100}


def test_lru_is_about_being_given_tasks_not_about_finishing_them():
    bench = Bench(3, policy="lru", hwm=0)
    bench.submit(3)
    for engine in (2, 1, 0):
        bench.finish(engine)
    assert [runs(bench.submit(1)) for _ in range(3)] == [{0: [3]}, {1: [4]}, {2: [5]}]


def test_plainrandom_does_not_look_at_the_load():
    assert 80 < one_by_one("plainrandom")[0] < 120


def test_twobin_and_weighted_mostly_avoid_the_busy_engine():
    assert one_by_one("twobin")[0] == 0, "the less loaded of two is never the busiest"
    assert one_by_one("weighted")[0] < 20


def test_a_policy_draws_from_what_it_is_given():
    assert one_by_one("plainrandom") == one_by_one("plainrandom")


def test_an_unknown_policy_is_named():
    with pytest.raises(ValueError, match="no policy 'best'; choose one of leastload"):
        Scheduler(policy="best")


# queries

def test_queue_status():
    bench = Bench(2).measured(LONG)
    bench.submit(2, targets=(0,))
    bench.submit(3)
    assert bench.scheduler.queue_status([0, 1, 7]) == {
        0: {"queue": 2, "tasks": 0, "completed": 1}, 1: {"queue": 0, "tasks": 1, "completed": 0}, "unassigned": 2}


def test_numbers_of_attempts_start_again_before_they_outgrow_their_two_bytes():
    bench = Bench(1)
    bench.submit(1, retries=100_000)
    task = bench.scheduler.tasks[ME, 0]
    task.attempt = 0xFFFF
    bench.finish(0, status=ERROR)
    assert task.attempt == 1
    bench.finish(0)
    assert not bench.scheduler.tasks


def test_a_lost_host_takes_no_task_down_with_it():
    bench = Bench(3, hwm=2)
    bench.submit(6)
    effects = bench.do(HostDown([EngineDown(0, "host gone", UNKNOWN, False), EngineDown(1, "host gone", UNKNOWN, False)]))
    assert not fails(effects) and set(runs(effects)) <= {2}
    assert not fails(bench.do(HostDown([EngineDown(2, "host gone", UNKNOWN, False)])))
    bench.do(EngineUp(3))
    assert bench.scheduler.engines[3].outstanding


def test_tasks_pinned_to_a_lost_host_fail_once():
    bench = Bench(2)
    bench.submit(1, targets=(0, 1))
    effects = bench.do(HostDown([EngineDown(i, "host gone", UNKNOWN, False) for i in (0, 1)]))
    assert list(fails(effects).values()) == ["EngineError"]


def timed(until: float, drain_s: float = 1.0, engine: int = 0, **options) -> Bench:
    """A bench on which "f" takes 10 s and "g" 1 s, and an engine that leaves `until` s from now."""
    bench = Bench(1, **options)
    for fn, took in (("f", 10.0), ("g", 1.0)):
        bench.submit(1, fn=fn)
        bench.finish(0, took=took)
    bench.do(EngineDown(0, "it went", None, False))
    bench.do(EngineUp(1, bench.now + until, drain_s))
    return bench


def test_an_engine_takes_only_what_it_can_finish_before_it_leaves():
    bench = timed(5.0)
    long, short = bench.seq, bench.seq + 1
    assert not runs(bench.submit(1, fn="f"))
    assert runs(bench.submit(1, fn="g")) == {1: [short]}
    assert runs(bench.do(EngineUp(2))) == {2: [long]}


def test_an_engine_that_leaves_later_takes_what_takes_too_long_for_another():
    bench = timed(5.0)
    bench.do(EngineUp(2, bench.now + 50.0, 1.0))
    assert runs(bench.submit(2, fn="f")) == {2: [2]}
    assert runs(bench.finish(2, took=10.0)) == {2: [3]}


def test_a_function_that_nobody_has_measured_is_thought_to_take_the_drain_time():
    assert not runs(timed(5.0, drain_s=6.0).submit(1, fn="h"))
    assert runs(timed(5.0, drain_s=4.0).submit(1, fn="h")) == {1: [2]}


def test_an_engine_that_is_about_to_leave_takes_what_only_it_may_run():
    assert runs(timed(5.0).submit(1, fn="f", targets=(1,))) == {1: [2]}


def test_what_takes_too_long_for_all_can_be_aborted_and_waits_for_others_when_they_leave():
    bench = timed(5.0)
    bench.submit(3, fn="f")
    assert [e.ename for e in bench.do(Abort(ME, [2]))] == ["TaskAborted"]
    assert not bench.do(EngineDown(1, "it left", None, False), 5.0)
    assert runs(bench.do(EngineUp(2), 20.0)) == {2: [3]}
    assert runs(bench.finish(2, took=10.0)) == {2: [4]}


def test_what_takes_too_long_for_all_obeys_its_timeout():
    bench = timed(50.0)
    bench.do(Tick(), 45.0)
    bench.submit(1, fn="f", timeout=1.0)
    assert [e.ename for e in bench.do(Tick(), 1.5)] == ["TaskTimeout"]
