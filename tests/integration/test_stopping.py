"""Taking work back: aborting, interrupting, limiting the time that a task may run, restarting engines."""

from __future__ import annotations

import os
import signal
import time

import pytest
import tasks
from support import eventually

import ipclite as ipp


def started(path):
    return eventually(lambda: path.exists() and path.read_text().split(), what="the task runs")


def stubborn(report):
    """Never ends, and takes no notice of an interrupt."""
    with open(report, "a") as f:
        f.write(f"{os.getpid()}\n")
    while True:
        try:
            time.sleep(60)
        except KeyboardInterrupt:
            pass


def test_an_abort_takes_back_what_waits_anywhere_and_leaves_what_runs(start, tmp_path):
    rc = start(2)
    view = rc.load_balanced_view()
    flag = tmp_path / "flag"
    running = [view.apply_async(tasks.report_and_hold, tmp_path / str(i), flag, i) for i in range(2)]
    for i in range(2):
        started(tmp_path / str(i))
    queued = [view.apply_async(os.getpid) for _ in range(200)]
    pinned = rc[0].apply_async(os.getpid)
    view.abort([*queued, pinned])
    for ar in [*queued, pinned]:
        with pytest.raises(ipp.TaskAborted):
            ar.get(10)
    flag.touch()
    assert [ar.get(10) for ar in running] == [0, 1]


def test_an_abort_of_the_tasks_of_some_engines(start, tmp_path):
    rc = start(2)
    flag = tmp_path / "flag"
    running = [rc[i].apply_async(tasks.report_and_hold, tmp_path / str(i), flag, i) for i in range(2)]
    for i in range(2):
        started(tmp_path / str(i))
    queued = [rc[i].apply_async(os.getpid) for i in range(2)]
    rc.abort(targets=0, block=True)
    with pytest.raises(ipp.TaskAborted):
        queued[0].get(10)
    third = rc[1].apply_async(abs, -1)
    rc[1].abort(-1)  # the last task of the history
    with pytest.raises(ipp.TaskAborted):
        third.get(10)
    rc.abort(queued, targets=[0])
    flag.touch()
    assert [ar.get(10) for ar in running] == [0, 1]
    assert type(queued[1].get(10)) is int


def test_an_abort_of_what_has_ended_or_is_unknown_does_nothing(start):
    rc = start(1)
    ar = rc[0].apply_async(os.getpid)
    pid = ar.get(10)
    rc.abort(ar)
    rc.abort([ar.msg_ids[0], "0011223344556677-99"])
    assert ar.get() == pid and rc[0].apply_sync(os.getpid) == pid


def test_an_interrupt_ends_what_runs_and_keeps_the_engine(start, tmp_path):
    rc = start(1)
    rc[0]["kept"] = 1
    ar = rc[0].apply_async(tasks.report_and_hold, tmp_path / "report", tmp_path / "never")
    started(tmp_path / "report")
    rc.abort(ar, interrupt=True)
    with pytest.raises(ipp.RemoteError, match="KeyboardInterrupt"):
        ar.get(10)
    assert rc[0]["kept"] == 1


def test_a_task_that_ignores_the_interrupt_takes_its_engine_down_and_a_new_one_comes(start, tmp_path):
    rc = start(2)
    ar = rc.load_balanced_view().apply_async(stubborn, tmp_path / "report")
    (old,) = started(tmp_path / "report")
    rc.abort(ar, interrupt=True)
    with pytest.raises(ipp.TaskAborted, match="SIGKILL"):
        ar.get(15)
    rc.wait_for_engines(2, timeout=15)
    assert rc.ids == [0, 1] and int(old) not in rc[:].apply_sync(os.getpid)


def test_an_interrupt_reaches_no_other_task(start, tmp_path):
    rc = start(1)
    flag = tmp_path / "flag"
    first = rc[0].apply_async(tasks.report_and_hold, tmp_path / "report", flag, "first")
    second = rc[0].apply_async(tasks.hold, None, "second")
    started(tmp_path / "report")
    rc.abort(second, interrupt=True)
    with pytest.raises(ipp.TaskAborted):
        second.get(10)
    flag.touch()
    assert first.get(10) == "first"


@pytest.mark.parametrize("holds_the_gil", [False, True])
def test_a_task_that_runs_too_long_fails_alone(start, tmp_path, holds_the_gil):
    rc = start(1)
    view = rc.load_balanced_view()
    view.run_timeout = 0.5
    slow = view.apply_async(*((tasks.long_match, 30) if holds_the_gil else (tasks.hold, tmp_path / "never")))
    with pytest.raises(ipp.TaskTimeout, match="run_timeout"):
        slow.get(20)
    rc.wait_for_engines(1, timeout=15)
    assert view.apply_sync(tasks.hold, None, 5) == 5


def test_a_crash_is_not_blamed_on_an_earlier_task_that_ran_too_long(start, tmp_path):
    rc = start(1)
    view = rc.load_balanced_view()
    view.run_timeout = 0.5
    with pytest.raises(ipp.TaskTimeout):
        view.apply_sync(tasks.hold, tmp_path / "never")
    with pytest.raises(ipp.EngineError, match="exited with code 3"):
        rc[0].apply_sync(os._exit, 3)


def test_a_signal_goes_by_number_or_name(start, tmp_path):
    rc = start(1)
    for i, sig in enumerate((signal.SIGINT, "SIGINT", "int", 2)):
        report = tmp_path / str(i)
        ar = rc[0].apply_async(tasks.report_and_hold, report, tmp_path / "never")
        started(report)
        rc.send_signal(sig)
        with pytest.raises(ipp.RemoteError, match="KeyboardInterrupt"):
            ar.get(10)
    with pytest.raises(ValueError, match="no signal"):
        rc.send_signal("SIGNONE")


def test_an_idle_engine_ignores_an_interrupt(start):
    rc = start(1)
    pid = rc[0].apply_sync(os.getpid)
    rc.send_signal("INT")
    assert rc[0].apply_sync(os.getpid) == pid


def test_engines_restart_in_place(start):
    rc = start(2)
    rc[:]["x"] = 1
    before = rc[:].apply_sync(os.getpid)
    rc.shutdown([1], restart=True, block=True)
    after = rc[:].apply_sync(os.getpid)
    assert rc.ids == [0, 1] and after[0] == before[0] and after[1] != before[1]
    assert rc[0]["x"] == 1
    with pytest.raises(NameError):
        rc[1]["x"]


def test_engines_shut_down_one_by_one(start):
    rc = start(2)
    rc.shutdown(0)
    eventually(lambda: rc.ids == [1], what="engine 0 is gone")
    assert isinstance(rc[1].apply_sync(os.getpid), int)
