"""What the controller knows of tasks: status, history, records, results for others, resubmission, purging."""

from __future__ import annotations

import os
import threading
from datetime import datetime, timedelta, timezone

import numpy as np
import pytest
import tasks
from support import eventually

import ipclite as ipp

NOBODY = "00" * 8 + "-1"


@pytest.fixture(scope="module", params=["DictDB", "SQLiteDB"])
def rc(request, cluster_of):
    """The client of a cluster of two engines that keeps its records here or there, for all tests that end nothing."""
    return cluster_of(2, controller_args=[f"--IPController.db_class={request.param}"])


@pytest.fixture
def other(rc):
    """A second client of the shared cluster."""
    with rc.cluster.connect_client_sync() as client:
        client.wait_for_engines(2, timeout=10)
        yield client


@pytest.fixture
def flag(tmp_path):
    """A file that does not exist yet: `tasks.hold` waits for it."""
    yield tmp_path / "go"
    (tmp_path / "go").touch()  # also when the test failed


# --- history, results and metadata of this client


def test_history_holds_every_task_in_order(start):
    rc = start(2)
    view = rc.load_balanced_view()
    assert len(rc.history) == 0 and list(rc.history) == [] and repr(rc.history) == "<History: 0 tasks>"
    first, second, each = (
        view.apply_async(abs, -1),
        view.map_async(abs, [-1, -2], chunksize=1),
        rc[:].apply_async(os.getpid),
    )
    ids = first.msg_ids + second.msg_ids + each.msg_ids
    assert list(rc.history) == ids == rc.history[:] == view.history[0:5]
    assert rc.history[-1] == ids[-1] and rc.history[1:3] == second.msg_ids and ids[2] in rc.history
    assert NOBODY not in rc.history and "nonsense" not in rc.history and 3 not in rc.history
    rc.wait()
    assert rc.hub_history() == ids
    with pytest.raises(IndexError, match="holds 5"):
        rc.history[5]


def test_results_and_metadata_are_those_of_living_futures(rc, balanced):
    ar = balanced.apply_async(divmod, 7, 2)
    bad = balanced.apply_async(divmod, 7, 0)
    ar.wait(30), bad.wait(30)
    assert rc.results[ar.msg_ids[0]] == (3, 1)
    assert isinstance(rc.results[bad.msg_ids[0]], ZeroDivisionError)
    assert rc.metadata[ar.msg_ids[0]]["status"] == "ok" and balanced.metadata[bad.msg_ids[0]]["status"] == "error"
    assert ar.msg_ids[0] in balanced.results
    gone = ar.msg_ids[0]
    del ar
    assert gone not in rc.results and gone in rc.history
    with pytest.raises(KeyError, match="get_result"):
        rc.results[gone]
    assert rc.get_result(gone).get(30) == (3, 1)


def test_pending_tasks_have_no_result_yet(rc, balanced, flag):
    ar = balanced.apply_async(tasks.hold, flag)
    assert ar.msg_ids[0] not in rc.results and rc.outstanding == balanced.outstanding == set(ar.msg_ids)
    flag.touch()
    ar.get(30)
    assert not rc.outstanding and ar.msg_ids[0] in rc.results


# --- get_result


def test_get_result_names_tasks_in_many_ways(rc, balanced):
    one, two = balanced.apply_async(abs, -1), balanced.apply_async(abs, -2)
    rc.wait()
    assert rc.get_result().get(30) == 2
    assert rc.get_result(-2).get(30) == 1
    assert rc.get_result(one.msg_ids[0], block=True).get() == 1
    assert rc.get_result(two).get(30) == 2
    assert rc.get_result([one, -1, one.msg_ids[0]]).get(30) == [1, 2, 1]
    assert balanced.get_result([-2, -1]).get(30) == [1, 2]
    assert rc.get_result([]).get(1) == []
    again = rc.get_result(one.msg_ids)
    assert isinstance(again, ipp.AsyncHubResult) and again.owner and again.msg_ids == one.msg_ids
    for key in ("engine_id", "engine_uuid", "started", "completed", "status", "attempt"):
        assert again.metadata[0][key] == one.metadata[key]


def test_while_it_runs_the_owner_gets_its_own_future(rc, balanced, flag):
    ar = balanced.apply_async(tasks.hold, flag, 5)
    assert rc.get_result(ar.msg_ids[0]) is rc.get_result(ar) is ar
    listed = rc.get_result(ar.msg_ids)
    copy = rc.get_result(ar.msg_ids[0], owner=False)
    assert copy is not ar and not copy.done()
    flag.touch()
    assert (copy.get(30), ar.get(30), listed.get(30)) == (5, 5, [5])
    assert rc.get_result(ar.msg_ids).get(30) == [5]  # as before it had ended


def test_results_of_maps_executions_and_failures(rc, balanced, each):
    chunks = balanced.map_async(lambda x: 10 // x, [1, 2, 0, 5], chunksize=2, return_exceptions=True)
    code = each.execute("print('hello')\n6 * 7", silent=False)
    rc.wait([chunks, code], 30)
    assert rc.get_result(chunks.msg_ids[0]).get(30) == [10, 5]
    with pytest.raises(ZeroDivisionError):
        rc.get_result(chunks.msg_ids[1]).get(30)
    reply = rc.get_result(code.msg_ids[0]).get(30)
    assert "42" in repr(reply) and rc.get_result(code.msg_ids[0]).metadata["stdout"] == "hello\n"


def test_another_client_gets_what_has_ended(rc, balanced, other):
    big = np.arange(300_000)
    ar = balanced.apply_async(lambda a: (a, "text"), big)
    ar.wait(30)
    theirs = other.get_result(ar.msg_ids[0])
    array, text = theirs.get(30)
    assert np.array_equal(array, big) and text == "text"
    assert not theirs.owner and theirs.sent and theirs.metadata["engine_id"] == ar.metadata["engine_id"]
    assert ar.msg_ids[0] not in other.history


def test_another_client_waits_for_what_still_runs(rc, balanced, other, flag):
    ar = balanced.apply_async(tasks.hold, flag, "late")
    theirs, twice = other.get_result(ar.msg_ids[0]), other.get_result(ar.msg_ids)
    assert not theirs.done() and theirs.metadata["status"] == "pending"
    with pytest.raises(TimeoutError):
        theirs.get(0.01)
    flag.touch()
    assert theirs.get(30) == "late" and twice.get(30) == ["late"] and ar.get(30) == "late"


def test_another_client_sees_output_as_it_comes(rc, balanced, other, flag):
    def work(flag):
        print("before")
        tasks.hold(flag)
        print("after")
        return os.getpid()

    ar = balanced.apply_async(work, flag)
    eventually(lambda: "before" in ar.stdout, what="output of the task")
    theirs = other.get_result(ar.msg_ids[0])
    assert theirs.stdout == "before\n"
    flag.touch()
    assert theirs.get(30) == ar.get(30)
    assert theirs.stdout == ar.stdout == "before\nafter\n"


def test_another_client_learns_of_an_abort_and_can_not_abort(rc, balanced, other, flag):
    running = rc[:].apply_async(tasks.hold, flag)
    waiting = rc[0].apply_async(abs, -1)
    theirs = other.get_result(waiting.msg_ids[0])
    other.abort(theirs)
    theirs.abort()
    assert other.queue_status()[0]["queue"] >= 1
    waiting.abort()
    with pytest.raises(ipp.TaskAborted):
        theirs.get(30)
    flag.touch()
    running.get(30)


def test_a_closed_client_s_tasks_are_there_for_others(rc, flag):
    with rc.cluster.connect_client_sync() as gone:
        gone.wait_for_engines(1, timeout=10)
        view = gone.load_balanced_view()
        done, late = view.apply_async(pow, 2, 10), view.apply_async(tasks.hold, flag, "late")
        done.wait(30)
        ids = done.msg_ids + late.msg_ids
    waiting = rc.get_result(ids)
    flag.touch()
    assert waiting.get(30) == [1024, "late"]
    assert rc.get_result(ids[1]).get(30) == "late"


def test_a_watcher_that_leaves_is_forgotten(rc, balanced, flag):
    ar = balanced.apply_async(tasks.hold, flag, 1)
    with rc.cluster.connect_client_sync() as watcher:
        theirs = watcher.get_result(ar.msg_ids[0])
    with pytest.raises(ipp.ControllerLost):
        theirs.get(1)
    flag.touch()
    assert ar.get(30) == 1


def test_many_threads_ask_at_once(rc, other):
    view = rc.load_balanced_view()
    ars = [view.apply_async(abs, -i) for i in range(200)]
    found: list[int] = []

    def ask(part):
        found.extend(other.get_result([ar.msg_ids[0] for ar in part]).get(30))

    threads = [threading.Thread(target=ask, args=(ars[i::4],)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert sorted(found) == list(range(200))


# --- status and records


def test_result_status(rc, balanced, flag):
    done, bad, late = (
        balanced.apply_async(abs, -3),
        balanced.apply_async(divmod, 1, 0),
        balanced.apply_async(tasks.hold, flag),
    )
    done.wait(30), bad.wait(30)
    ids = done.msg_ids + bad.msg_ids + late.msg_ids
    status = rc.result_status(ids)
    assert (status["pending"], sorted(status["completed"])) == (late.msg_ids, sorted(ids[:2])) and len(status) == 2
    values = balanced.result_status([done, bad], status_only=False)
    assert values[ids[0]] == 3 and isinstance(values[ids[1]], ZeroDivisionError)
    flag.touch()
    late.get(30)
    assert rc.result_status(-1) == {"pending": [], "completed": late.msg_ids}


def test_queue_status_in_numbers_and_ids(start, flag):
    rc = start(2)
    running = rc[:].apply_async(tasks.hold, flag)
    behind = rc[1].apply_async(abs, -1)
    anywhere = rc.load_balanced_view().apply_async(abs, -2)
    eventually(lambda: rc.queue_status()["unassigned"] == 1, what="all tasks at the controller")
    verbose = rc.queue_status(verbose=True)
    assert verbose[0]["queue"] == running.msg_ids[:1]
    assert sorted(verbose[1]["queue"]) == sorted([running.msg_ids[1], *behind.msg_ids])
    assert verbose["unassigned"] == anywhere.msg_ids and verbose[0]["completed"] == []
    flag.touch()
    rc.wait(timeout=30)
    verbose = rc.queue_status(verbose=True)
    assert {e: {k: len(v) for k, v in verbose[e].items()} for e in (0, 1)} == {e: rc.queue_status()[e] for e in (0, 1)}
    assert behind.msg_ids[0] in verbose[1]["completed"] and set(rc[1].queue_status(verbose=True)) == {1, "unassigned"}


def test_db_query(rc, balanced, flag):
    before = datetime.now(timezone.utc)
    with balanced.temp_flags(label="mine"):
        done = balanced.map_async(abs, range(-4, 0), chunksize=1)
        bad = balanced.apply_async(divmod, 1, 0)
        late = balanced.apply_async(tasks.hold, flag)
    rc.wait([done, bad], 30)
    mine = {"label": "mine", "client_uuid": rc.session.hex()}
    assert [r["msg_id"] for r in rc.db_query(mine)] == done.msg_ids + bad.msg_ids + late.msg_ids
    assert rc.db_query({**mine, "completed": None}, keys=["status"]) == [
        {"msg_id": late.msg_ids[0], "status": "pending"}
    ]
    assert [r["msg_id"] for r in rc.db_query({**mine, "ename": {"$glob": "Zero*"}})] == bad.msg_ids
    finished = rc.db_query(
        {**mine, "op": "map", "submitted": {"$gte": before}, "completed": {"$gt": before.isoformat()}},
        ("submitted", "started", "completed", "received", "engine_uuid"),
    )
    assert len(finished) == 4
    for record in finished:
        assert before <= record["submitted"] <= record["received"] <= datetime.now(timezone.utc)
        assert record["started"] <= record["completed"] and record["engine_uuid"] in {
            rc._engine_uuid(i) for i in rc.ids
        }
    assert rc.db_query({**mine, "submitted": {"$lt": before - timedelta(seconds=1)}}) == []
    assert len(rc.db_query({**mine, "msg_id": {"$in": done.msg_ids}})) == 4
    where = eventually(
        lambda: (
            rc.db_query({"msg_id": late.msg_ids[0]}, ["engine_id", "attempt"])[0]["engine_id"] is not None
            and rc.db_query({"msg_id": late.msg_ids[0]}, ["engine_id", "attempt"])[0]
        )
    )
    assert where["engine_id"] in rc.ids and where["attempt"] == 1
    flag.touch()
    late.get(30)


def test_records_carry_buffers_and_targets(rc):
    big = os.urandom(200_000)
    ar = rc[[1, 0]].apply_async(len, big)
    ar.get(30)
    records = rc.db_query(
        {"msg_id": {"$in": ar.msg_ids}}, ["buffers", "result_buffers", "function", "targets", "queue", "fn"]
    )
    assert [r["targets"] for r in records] == [[1], [0]] and {r["queue"] for r in records} == {"mux"}
    assert any(big in bytes(piece) for piece in records[0]["buffers"])
    assert records[0]["result_buffers"] and records[0]["function"] and len(records[0]["fn"]) == 32


def test_failures_without_an_engine_are_on_record(rc, balanced, flag):
    running = rc[:].apply_async(tasks.hold, flag)
    ar = balanced.apply_async(abs, -1)
    ar.abort()
    with pytest.raises(ipp.TaskAborted):
        ar.get(30)
    (record,) = rc.db_query({"msg_id": ar.msg_ids[0]})
    assert (record["ename"], record["engine_id"], record["status"]) == ("TaskAborted", None, "error")
    again = rc.resubmit(ar.msg_ids)
    flag.touch()
    assert again.get(30) == [1]
    running.get(30)


# --- resubmit


def test_resubmit_under_new_ids(rc, balanced, tmp_path):
    count = tmp_path / "count"

    def note(path, x):
        with open(path, "a") as f:
            f.write("x")
        return x

    ar = balanced.map_async(note, [str(count)] * 3, [1, 2, 3], chunksize=1)
    ar.get(30)
    again = rc.resubmit(ar.msg_ids, metadata={"label": "again"})
    assert again.get(30) == [[1], [2], [3]] and count.read_text() == "x" * 6
    assert not set(again.msg_ids) & set(ar.msg_ids) and list(rc.history)[-3:] == again.msg_ids
    assert {m["label"] for m in again.metadata} == {"again"}
    assert [r["resubmitted"] for r in rc.db_query({"msg_id": {"$in": ar.msg_ids}}, ["resubmitted"])] == again.msg_ids
    assert rc.resubmit(again.msg_ids[0], block=True).done()
    assert rc.resubmit().get(30) == [1]
    assert rc.resubmit([]).get(1) == []


def test_resubmit_of_a_client_that_has_left(rc):
    with rc.cluster.connect_client_sync() as gone:
        gone.wait_for_engines(2, timeout=10)
        factor = 7
        ar = gone.load_balanced_view().apply_async(lambda x: factor * x, 6)
        one = gone[1].apply_async(lambda: os.getpid())
        assert ar.get(30) == 42
        pid = one.get(30)
        ids = [ar.msg_ids[0], one.msg_ids[0]]
    eventually(lambda: rc.db_query({"msg_id": {"$in": ids}, "status": "ok"}))
    again = rc.resubmit(ids)
    assert again.get(30) == [42, pid] and again.owner
    third = rc.resubmit(again.msg_ids[0])
    assert third.get(30) == 42


def test_resubmit_when_the_engine_is_gone(start):
    rc = start(2)
    ar = rc[1].apply_async(os.getpid)
    pid = ar.get(30)
    rc.shutdown(1)
    eventually(lambda: rc.ids == [0], what="engine 1 to leave")
    assert rc.resubmit(ar.msg_ids[0]).get(30) != pid


def test_what_can_not_be_resubmitted(rc, balanced, flag):
    ar = balanced.apply_async(tasks.hold, flag)
    with pytest.raises(RuntimeError, match="has not ended"):
        rc.resubmit(ar)
    with pytest.raises(ipp.NoRecord):
        rc.resubmit(NOBODY)
    with pytest.raises(ValueError, match="label"):
        rc.resubmit(ar, metadata={"targets": [1]})
    flag.touch()
    ar.get(30)
    assert not rc.outstanding


# --- purging


def test_purging_locally_frees_and_says_so(rc, balanced):
    ar, keep = balanced.apply_async(abs, -1), balanced.apply_async(abs, -2)
    rc.wait([ar, keep], 30)
    rc.purge_local_results(ar)
    assert ar.msg_ids[0] not in rc.results and rc.results[keep.msg_ids[0]] == 2
    for _ in range(2):
        with pytest.raises(ipp.RecordExpired, match="was purged"):
            ar.get()
    assert ar.done() and rc.get_result(ar.msg_ids[0]).get(30) == 1
    rc.purge_local_results(targets=rc.ids)
    with pytest.raises(ipp.RecordExpired):
        keep.get()


def test_purging_in_the_controller(rc, balanced, other):
    ar, keep = balanced.apply_async(abs, -1), balanced.apply_async(abs, -2)
    rc.wait([ar, keep], 30)
    rc.purge_hub_results(ar.msg_ids)
    assert ar.get() == 1 and ar.msg_ids[0] not in rc.hub_history() and keep.msg_ids[0] in rc.hub_history()
    assert rc.get_result(ar.msg_ids[0]).get(30) == 1, "what is left here is used"
    with pytest.raises(ipp.RecordExpired, match="was purged"):
        other.get_result(ar.msg_ids[0])
    rc.purge_hub_results(ar)  # it is gone, as asked
    rc.purge_hub_results(targets=rc.ids)
    assert keep.msg_ids[0] not in rc.hub_history()


def test_purging_results(rc, balanced):
    ar = balanced.map_async(abs, range(-3, 0), chunksize=1)
    ar.get(30)
    balanced.purge_results(ar)
    for ask in (ar.get, lambda: rc.get_result(ar.msg_ids), lambda: rc.resubmit(ar.msg_ids)):
        with pytest.raises(ipp.RecordExpired):
            ask()


def test_purging_everything(rc, balanced, flag):
    ar = balanced.apply_async(abs, -1)
    ar.get(30)
    late = balanced.apply_async(tasks.hold, flag)
    for purge in (
        rc.purge_everything,
        lambda: rc.purge_results("all"),
        lambda: rc.purge_hub_results(late),
        lambda: rc.purge_local_results([late]),
        lambda: rc.purge_local_results("all"),
    ):
        with pytest.raises(RuntimeError, match="not ended"):
            purge()
    assert ar.get() == 1 and ar.msg_ids[0] in rc.hub_history()
    flag.touch()
    late.get(30)
    rc.purge_everything()
    assert len(rc.history) == 0 and rc.hub_history() == [] and len(rc.results) == 0
    new = balanced.apply_async(abs, -5)
    assert list(rc.history) == new.msg_ids and rc.get_result(0).get(30) == 5


def test_another_client_s_unfinished_tasks_are_not_purged(rc, balanced, other, flag):
    ar = balanced.apply_async(tasks.hold, flag, 1)
    assert ar.msg_ids
    eventually(lambda: other.hub_history()[-1:] == ar.msg_ids, what="the task at the controller")
    with pytest.raises(RuntimeError, match="not ended"):
        other.purge_hub_results(ar.msg_ids[0])
    other.purge_hub_results("all")
    assert other.hub_history() == ar.msg_ids
    flag.touch()
    assert ar.get(30) == 1 and other.get_result(ar.msg_ids[0]).get(30) == 1


# --- bad input


@pytest.mark.parametrize(
    "ids, kind",
    [
        ("nonsense", ValueError),
        ("", ValueError),
        (NOBODY + "x", ValueError),
        (NOBODY, ipp.NoRecord),
        ([NOBODY], KeyError),
        (10**9, IndexError),
        (-(10**9), IndexError),
        (1.5, TypeError),
        (True, TypeError),
        ({"a": 1}, TypeError),
        ([None], TypeError),
        (b"abc", TypeError),
    ],
)
def test_tasks_that_there_are_not(rc, ids, kind):
    for ask in (rc.get_result, rc.result_status, rc.resubmit, rc.purge_hub_results, rc.purge_local_results):
        if ask == rc.purge_local_results and kind in (ipp.NoRecord, KeyError):
            ask(ids)  # nothing of it is here
            continue
        with pytest.raises(kind) as caught:
            ask(ids)
        assert "\n" not in str(caught.value)
    assert rc.load_balanced_view().apply_sync(abs, -1) == 1


@pytest.mark.parametrize(
    "query, keys, word",
    [
        ({"colour": 1}, None, "no key 'colour'"),
        ({"label": {"$like": "a"}}, None, "unknown operator"),
        ("all", None, "a query is a dict"),
        ({}, ["colour"], "no key 'colour'"),
        ({}, "msg_id", "keys are a list"),
        ({"started": 3}, None, "compared with dates"),
        ({"attempt": {"$gt": None}}, None, r"\$gt takes"),
    ],
)
def test_what_is_no_query(rc, query, keys, word):
    with pytest.raises(ValueError, match=word):
        rc.db_query(query, keys)
    with pytest.raises(TypeError, match="part of a query"):
        rc.db_query({"label": object()})


def test_what_is_to_be_purged_must_be_said(rc):
    for purge in (rc.purge_results, rc.purge_hub_results, rc.purge_local_results):
        with pytest.raises(ValueError, match="say what to purge"):
            purge()
    with pytest.raises(IndexError):
        rc.purge_hub_results(targets=[17])


def test_malformed_queries_from_a_foreign_client_change_nothing(rc, balanced):
    for what, arguments in [
        ("fetch", {}),
        ("fetch", {"ids": 3}),
        ("fetch", {"ids": [3]}),
        ("tasks", {"ids": [[]]}),
        ("resubmit", {"ids": [], "first": -1}),
        ("resubmit", {"ids": ["x"], "first": 1}),
        ("purge", {}),
        ("purge", {"ids": [], "targets": 3}),
        ("queue_status", {}),
        ("queue_status", {"targets": [[]]}),
        ("db_query", {}),
        ("history", {"id": 5}),
        ("nonsense", {}),
    ]:
        arguments.pop("id", None)
        if what == "history":
            assert isinstance(rc._query(what), list)
            continue
        with pytest.raises(ValueError):
            rc._query(what, **arguments)
    assert balanced.apply_sync(abs, -1) == 1


# --- what is kept


def test_records_expire_and_say_which_limit_to_raise(start):
    rc = start(1, controller_args=["--DictDB.record_limit=50"])
    view = rc.load_balanced_view()
    ids = [view.apply_async(abs, -i).msg_ids[0] for i in range(200)]
    rc.wait()
    assert len(rc.hub_history()) <= 50 and ids[-1] in rc.hub_history()
    assert rc.get_result(ids[-1]).get(30) == 199
    with pytest.raises(ipp.RecordExpired, match=r"c\.DictDB\.record_limit is 50"):
        rc.get_result(ids[0])
    with pytest.raises(ipp.RecordExpired, match="can be raised"):
        rc.resubmit(ids[0])


def test_large_results_do_not_pile_up(start):
    rc = start(1, controller_args=[f"--DictDB.size_limit={5 * 2**20}"])
    view = rc.load_balanced_view()
    ars = [view.apply_async(bytes, 2**20) for _ in range(20)]
    assert all(len(ar.get(30)) == 2**20 for ar in ars)
    assert 1 <= len(rc.hub_history()) <= 5
    with pytest.raises(ipp.RecordExpired, match="size_limit"):
        with rc.cluster.connect_client_sync() as other:
            other.get_result(ars[0].msg_ids)


def test_without_a_database(start, flag):
    rc = start(1, controller_args=["--nodb"])
    view = rc.load_balanced_view()
    done, late = view.apply_async(abs, -1), view.apply_async(tasks.hold, flag, 2)
    assert done.get(30) == 1 and rc.get_result(done.msg_ids).get(30) == [1]
    with rc.cluster.connect_client_sync() as other:
        waiting = other.get_result(late.msg_ids[0])
        for ask in (
            other.hub_history,
            lambda: other.db_query({}),
            lambda: other.get_result(done.msg_ids),
            lambda: other.resubmit(done.msg_ids),
        ):
            with pytest.raises(ipp.NoRecord, match="--dictdb"):
                ask()
        flag.touch()
        assert waiting.get(30) == late.get(30) == 2
    assert rc.queue_status(verbose=True)[0] == {"queue": [], "completed": [], "tasks": []}
    rc.purge_everything()


def test_queries_after_the_end(start):
    rc = start(1)
    ar = rc.load_balanced_view().apply_async(abs, -1)
    ar.get(30)
    rc.close()
    for ask in (rc.hub_history, lambda: rc.db_query({}), lambda: rc.resubmit(ar), lambda: rc.get_result(NOBODY)):
        with pytest.raises(ipp.ControllerLost):
            ask()
    assert rc.get_result(ar).get(1) == 1, "what is left here is used"
