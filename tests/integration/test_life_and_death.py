"""Engines, agents, controllers and clients that end, freeze, fork or are killed, and what the others make of it.

Where a test shall show that something is noticed at once, the controller's heartbeats are set so slow that they can not
be what notices it.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
import tasks
from support import cluster_files, eventually, is_running, our_processes

import ipclite as ipp

ROOT = Path(__file__).resolve().parents[2]
SLOW_PING = ["--ping=60000"]
QUICK_PING = ["--ping=500"]  # an agent that misses three is gone: after 1.5 s
NOTICED_S = 10
NEVER = ["/never"] * 3  # files that tasks wait for in vain


def lines_of(path):
    return path.read_text().split() if path.exists() else []


def pid_in(report):
    return int(eventually(lambda: lines_of(report), what="the task runs")[-1])


def gone(*pids):
    return not any(psutil.pid_exists(pid) and is_running(psutil.Process(pid)) for pid in pids)


def family(rc):
    """(pids of the engines, pid of the agent) of a cluster with one agent"""
    pairs = rc[:].apply_sync(tasks.family)
    return [engine for engine, _ in pairs], pairs[0][1]


def controller_pid(rc):
    return rc.cluster.controller.process.pid


def signal_all(pids, signum):
    for pid in pids:
        os.kill(pid, signum)


# --- engines that end


def test_a_killed_engine_is_gone_at_once(start):
    rc = start(controller_args=SLOW_PING)
    pids = dict(zip(rc.ids, rc[:].apply_sync(os.getpid)))
    os.kill(pids[0], signal.SIGKILL)
    eventually(lambda: rc.ids == [1], NOTICED_S)
    assert rc[:].apply_sync(os.getpid) == [pids[1]]
    with pytest.raises(IndexError):
        rc[0]


def test_the_task_of_a_killed_engine_is_tried_again_elsewhere(start, tmp_path):
    rc = start(controller_args=SLOW_PING)
    report, flag = tmp_path / "report", tmp_path / "flag"
    ar = rc.load_balanced_view().apply_async(tasks.report_and_hold, report, flag, "value")
    victim = pid_in(report)
    os.kill(victim, signal.SIGKILL)
    second = int(eventually(lambda: lines_of(report)[1:], what="the second attempt")[0])
    assert second != victim
    flag.touch()
    assert ar.get(30) == "value"
    assert ar.metadata["attempt"] == 2
    assert ar.metadata["engine_id"] in rc.ids


def test_a_task_survives_the_engine_that_it_killed(start, tmp_path):
    ar = start().load_balanced_view().apply_async(tasks.die_at_first, tmp_path / "mark")
    assert ar.get(30) > 0
    assert ar.metadata["attempt"] == 2


def test_a_task_that_kills_engines_does_not_kill_the_cluster(start):
    rc = start(4)
    view = rc.load_balanced_view()
    with pytest.raises(ipp.EngineError, match="SIGKILL"):
        view.apply_async(tasks.die).get(30)
    assert len(rc.ids) == 2
    assert view.map_sync(abs, range(-100, 0)) == list(range(100, 0, -1))


def test_a_task_of_a_direct_view_fails_with_its_engine(start, tmp_path):
    rc = start(controller_args=SLOW_PING)
    report = tmp_path / "report"
    ar = rc[0].apply_async(tasks.report_and_hold, report, tmp_path / "never")
    behind = rc[0].apply_async(os.getpid)
    os.kill(pid_in(report), signal.SIGKILL)
    for each in (ar, behind):
        with pytest.raises(ipp.EngineError, match=r"engine 0 .*SIGKILL"):
            each.get(NOTICED_S)
    assert rc[1].apply_sync(os.getpid) > 0


def test_a_lost_engine_fails_only_its_part_of_a_call(start):
    rc = start()
    view = rc[:]
    view.scatter("deadly", [True, False], flatten=True, block=True)
    ar = view.execute("import os\nif deadly: os.kill(os.getpid(), 9)")
    with pytest.raises(ipp.EngineError):
        ar.get(30)
    lost, done = ar.get(30, return_exceptions=True)
    assert isinstance(lost, ipp.EngineError)
    assert done.metadata["status"] == "ok"


def test_tasks_queued_on_a_killed_engine_run_elsewhere_and_once(start, tmp_path):
    rc = start(controller_args=SLOW_PING)
    view = rc.load_balanced_view()
    view.map_sync(tasks.hold, [None] * 200, chunksize=1)  # so that many are prefetched
    report, flag, ran = tmp_path / "report", tmp_path / "flag", tmp_path / "ran"
    ran.mkdir()

    def note(i):
        fd = os.open(os.path.join(ran, str(i)), os.O_CREAT | os.O_EXCL)  # fails if it ran before
        os.close(fd)
        return i

    blocked = [rc[i].apply_async(tasks.report_and_hold, report, flag) for i in rc.ids]
    eventually(lambda: len(lines_of(report)) == 2)
    ars = [view.apply_async(note, i) for i in range(100)]
    os.kill(int(lines_of(report)[0]), signal.SIGKILL)
    eventually(lambda: len(rc.ids) == 1)
    flag.touch()
    assert [ar.get(30) for ar in ars] == list(range(100))
    assert sorted(isinstance(ar.exception(30), ipp.EngineError) for ar in blocked) == [False, True]


@pytest.mark.parametrize("how, cause", [
    ("import os; os._exit(3)", "exited with code 3"),
    ("import ctypes; ctypes.string_at(0)", "SIGSEGV"),
    ("import os; os.abort()", "SIGABRT"),
    ("import os, signal; os.kill(os.getpid(), signal.SIGTERM)", "stop"),
])
def test_the_error_names_how_the_engine_ended(start, how, cause):
    rc = start()
    with pytest.raises(ipp.EngineError, match=cause):
        rc[0].execute(how).get(30)
    eventually(lambda: rc.ids == [1])


def test_a_crash_leaves_its_traceback_in_the_log(start):
    rc = start()
    agent = rc.cluster.engines["0"]
    with pytest.raises(ipp.EngineError, match="SIGSEGV"):
        rc[0].apply_async(tasks.segfault).get(30)
    log = eventually(lambda: "Segmentation fault" in agent.get_output() and agent.get_output())
    assert "in segfault" in log  # the Python function that crashed


def test_exit_and_memory_error_do_not_end_the_engine(start):
    rc = start(1)
    pid = rc[0].apply_sync(os.getpid)
    with pytest.raises(MemoryError):
        rc[0].apply_async(bytearray, 1 << 60).get(30)
    with pytest.raises(ipp.RemoteError, match="SystemExit"):
        rc[0].apply_async(sys.exit, 3).get(30)
    assert rc[0].apply_sync(os.getpid) == pid


def test_the_last_engine_and_tasks_that_wait_for_it(start, tmp_path):
    rc = start(1)
    with pytest.raises(ipp.EngineError):
        rc[0].apply_async(tasks.die).get(30)
    eventually(lambda: rc.ids == [])
    with pytest.raises(ipp.NoEnginesRegistered):
        rc.direct_view().apply_sync(os.getpid)
    waiting = rc.load_balanced_view().apply_async(os.getpid)
    rc.cluster.start_engines_sync(1)
    assert waiting.get(30) > 0


def test_wait_for_engines_that_have_ended(start):
    rc = start(1)
    rc[0].apply_async(tasks.die).exception(30)
    with pytest.raises(ipp.EngineError, match="ended"):
        rc.wait_for_engines(2, timeout=30)


def test_interrupt_keeps_engine_and_names(start, tmp_path):
    rc = start(1)
    view, report = rc[0], tmp_path / "report"
    view["kept"] = 5
    ar = view.apply_async(tasks.report_and_hold, report, tmp_path / "never")
    pid = pid_in(report)
    rc.send_signal(signal.SIGINT)
    with pytest.raises(ipp.RemoteError, match="KeyboardInterrupt"):
        ar.get(30)
    assert (view["kept"], view.apply_sync(os.getpid)) == (5, pid)
    rc.send_signal(signal.SIGINT)  # while it has nothing to do
    rc.queue_status()
    assert view["kept"] == 5


def test_shutdown_of_one_engine_and_of_all(start):
    rc = start()
    pids, agent = family(rc)
    rc.shutdown(targets=0)
    eventually(lambda: rc.ids == [1])
    eventually(lambda: gone(pids[0]))
    rc.shutdown(hub=True)
    eventually(lambda: gone(*pids, agent, controller_pid(rc)))
    with pytest.raises(ipp.ControllerLost):
        rc.queue_status()


# --- engines that are busy, not dead


def test_holding_the_gil_is_being_busy(start):
    rc = start(controller_args=QUICK_PING)
    pids = rc[:].apply_sync(os.getpid)
    in_c = rc[0].apply_async(tasks.hold_the_gil, 4.5)
    in_re = rc[1].apply_async(tasks.long_match, 2.5)
    assert [in_c.get(60), in_re.get(60)] == pids
    assert rc.ids == [0, 1]
    assert rc[:].apply_sync(os.getpid) == pids


@pytest.mark.slow
def test_holding_the_gil_beyond_the_default_limit(start):
    rc = start()
    ar = rc.load_balanced_view().apply_async(tasks.hold_the_gil, 8)
    assert ar.get(60) > 0
    assert ar.metadata["attempt"] == 1


def test_work_behind_a_long_task_is_taken_back(start, tmp_path):
    rc = start()
    view, flag = rc.load_balanced_view(), tmp_path / "flag"
    for _ in range(3):  # each engine learns that this function is quick, and is given many of them
        view.map_sync(tasks.hold, [None] * 300, chunksize=1)
    long = view.apply_async(tasks.hold, flag, "long")
    short = [view.apply_async(tasks.hold, None, i) for i in range(300)]
    assert [ar.get(30) for ar in short] == list(range(300))
    assert not long.done()
    flag.touch()
    assert long.get(30) == "long"


# --- agents


def test_a_killed_agent_takes_its_engines_along(start, tmp_path):
    rc = start()
    pids, agent = family(rc)
    rc.cluster.start_engines_sync(1)
    rc.wait_for_engines(3, timeout=30)
    report, flag = tmp_path / "report", tmp_path / "flag"
    pinned = rc[0].apply_async(tasks.report_and_hold, report, flag)
    movable = rc.load_balanced_view([1, 2]).apply_async(tasks.report_and_hold, tmp_path / "other", flag, "moved")
    pid_in(report), pid_in(tmp_path / "other")
    os.kill(agent, signal.SIGKILL)
    eventually(lambda: rc.ids == [2], NOTICED_S)
    eventually(lambda: gone(*pids), NOTICED_S)
    with pytest.raises(ipp.EngineError):
        pinned.get(30)
    flag.touch()
    assert movable.get(30) == "moved"
    assert movable.metadata["engine_id"] == 2


def test_a_frozen_host_is_noticed_and_comes_back(start, tmp_path):
    """With the limits that users get."""
    rc = start()
    report, flag = tmp_path / "report", tmp_path / "flag"
    pids, agent = family(rc)
    ar = rc[0].apply_async(tasks.report_and_hold, report, flag)
    pid_in(report)
    signal_all([agent, *pids], signal.SIGSTOP)
    try:
        with pytest.raises(ipp.EngineError, match="did not answer"):
            ar.get(NOTICED_S)
        eventually(lambda: rc.ids == [], 1)
    finally:
        signal_all([agent, *pids], signal.SIGCONT)
    flag.touch()
    rc.wait_for_engines(2, timeout=30)
    assert sorted(rc[:].apply_sync(os.getpid)) == sorted(pids)
    assert rc.load_balanced_view().map_sync(abs, range(10)) == list(range(10))


def test_a_frozen_host_s_tasks_run_elsewhere(start, tmp_path):
    rc = start(1, controller_args=QUICK_PING)
    (engine,), agent = family(rc)
    report, flag = tmp_path / "report", tmp_path / "flag"
    ar = rc.load_balanced_view().apply_async(tasks.report_and_hold, report, flag, "value")
    pid_in(report)
    rc.cluster.start_engines_sync(1)
    rc.wait_for_engines(2, timeout=30)
    signal_all([agent, engine], signal.SIGSTOP)
    try:
        eventually(lambda: len(lines_of(report)) == 2)
        flag.touch()
        assert ar.get(30) == "value"
        assert ar.metadata["attempt"] == 2
    finally:
        signal_all([agent, engine], signal.SIGCONT)
    rc.wait_for_engines(2, timeout=30)
    assert engine in eventually(lambda: len(rc.ids) == 2 and rc[:].apply_sync(os.getpid))


# --- the controller


async def awaited(ar):
    return await ar


WAITING = {
    "get": lambda rc, ar: ar.get(),
    "get with a timeout": lambda rc, ar: ar.get(300),
    "result": lambda rc, ar: ar.result(),
    "iteration": lambda rc, ar: list(rc.load_balanced_view().map_async(tasks.hold, NEVER)),
    "unordered iteration": lambda rc, ar: list(rc.load_balanced_view().map_async(tasks.hold, NEVER, ordered=False)),
    "imap": lambda rc, ar: list(rc.load_balanced_view().imap(tasks.hold, NEVER)),
    "as_completed": lambda rc, ar: [each.result() for each in concurrent.futures.as_completed([ar])],
    "wait": lambda rc, ar: [each.result() for each in concurrent.futures.wait([ar]).done],
    "await": lambda rc, ar: asyncio.run(awaited(ar)),
    "wait_for_engines": lambda rc, ar: rc.wait_for_engines(50),
    "queue_status": lambda rc, ar: rc.queue_status(),
    "apply_sync": lambda rc, ar: rc[0].apply_sync(tasks.hold, "/never"),
    "push": lambda rc, ar: rc[0].__setitem__("a", 1),
}


def all_waiting(rc):
    """{name of a call: future of how it ends}: each of WAITING is under way in a thread, and its controller frozen."""
    ar = rc[0].apply_async(tasks.hold, "/never")
    started = threading.Barrier(len(WAITING) + 1)
    pool = concurrent.futures.ThreadPoolExecutor(len(WAITING))

    def call(waits):
        started.wait()
        return waits(rc, ar)

    futures = {name: pool.submit(call, waits) for name, waits in WAITING.items()}
    os.kill(controller_pid(rc), signal.SIGSTOP)
    started.wait()
    pool.shutdown(wait=False)
    return futures


def expect_controller_lost(futures):
    deadline = time.monotonic() + NOTICED_S
    ends = {}
    for name, future in futures.items():
        try:
            ends[name] = type(future.exception(max(0.0, deadline - time.monotonic()))).__name__
        except concurrent.futures.TimeoutError:
            ends[name] = "still waits"
    assert set(ends.items()) == {(name, "ControllerLost") for name in futures}


def test_every_waiting_call_fails_when_the_controller_is_killed(start):
    rc = start(2, controller_args=SLOW_PING)
    pids, agent = family(rc)
    futures = all_waiting(rc)
    os.kill(controller_pid(rc), signal.SIGKILL)
    expect_controller_lost(futures)
    assert rc.ids == []
    for late in (lambda: rc.load_balanced_view().apply_async(abs, 1), rc.queue_status, rc.wait_for_engines):
        with pytest.raises(ipp.ControllerLost):
            late()
    eventually(lambda: gone(*pids, agent), NOTICED_S)


def test_every_waiting_call_goes_on_when_a_frozen_controller_thaws(start, caplog):
    """And fails when it is killed then."""
    rc = start(controller_args=QUICK_PING)
    pids = rc[:].apply_sync(os.getpid)
    futures = all_waiting(rc)
    try:
        eventually(lambda: rc._connection.away, NOTICED_S, "the silence is noticed")
        with pytest.raises(ipp.TimeoutError):
            rc[0].apply_async(abs, 1).get(0.1)
        assert rc.ids == [0, 1]
    finally:
        os.kill(controller_pid(rc), signal.SIGCONT)
    eventually(lambda: not rc._connection.away, NOTICED_S, "the connection is back")
    assert type(futures.pop("queue_status").result(NOTICED_S)) is dict
    assert not any(future.done() for future in futures.values())
    assert rc.load_balanced_view().client.ids == [0, 1] and rc.queue_status()[0]["queue"] >= 1
    assert len([r for r in caplog.records if r.levelname == "WARNING" and "the controller" in r.getMessage()]) in (1, 2)
    os.kill(controller_pid(rc), signal.SIGKILL)
    expect_controller_lost(futures)
    eventually(lambda: gone(*pids), NOTICED_S)


def test_submitting_while_the_controller_is_killed(start):
    """Neither a send into the broken connection nor a wait hangs, whoever does it."""
    rc = start()
    view, pid, many = rc.load_balanced_view(), controller_pid(rc), threading.Event()

    def submit(k):
        for i in range(10**9):
            ars = [view.apply_async(abs, i) for _ in range(k)]
            if i == 100:
                many.set()
            for ar in ars:
                ar.get()

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        futures = [pool.submit(submit, k) for k in (1, 1, 100, 100)]
        assert many.wait(30)
        os.kill(pid, signal.SIGKILL)
        for future in futures:
            assert isinstance(future.exception(NOTICED_S), ipp.ControllerLost)


def test_a_stopped_controller_says_so(start):
    rc = start()
    pids, agent = family(rc)
    ar = rc[0].apply_async(tasks.hold, "/never")
    os.kill(controller_pid(rc), signal.SIGTERM)
    with pytest.raises(ipp.ControllerLost):
        ar.get(NOTICED_S)
    eventually(lambda: gone(*pids, agent), 20)


def test_callbacks_run_when_the_controller_is_killed(start):
    rc = start(1)
    ar = rc[0].apply_async(tasks.hold, "/never")
    called = threading.Event()
    ar.add_done_callback(lambda f: called.set())
    os.kill(controller_pid(rc), signal.SIGKILL)
    assert called.wait(NOTICED_S)
    assert isinstance(ar.exception(), ipp.ControllerLost)


# --- the client's process


def run_script(path, code, *args):
    path.write_text("import os, signal, sys, time\nimport ipclite as ipp\n" + code)
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen([sys.executable, str(path), *args], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            text=True, env=env, start_new_session=True)


OWNER = """
rc = ipp.Cluster(n=2).start_and_connect_sync()
if sys.argv[1] == "busy":
    def sleep():
        while True:
            try:
                time.sleep(600)
            except BaseException:
                pass
    ars = [view.apply_async(sleep) for view in rc]
    rc.queue_status()
print("ready", flush=True)
signal.pause()
"""


@pytest.mark.parametrize("state", ["idle", "busy"])
def test_nothing_survives_a_killed_owner(tmp_path, ipython_dir, state):
    before = set(our_processes())
    with run_script(tmp_path / "owner.py", OWNER, state) as script:
        assert script.stdout.readline() == "ready\n", script.stderr.read()
        assert len(set(our_processes()) - before) == 5  # itself, controller, agent, two engines
        script.kill()
        script.wait()
        eventually(lambda: not set(our_processes()) - before, 20)
    assert not cluster_files(ipython_dir.parent)
    assert not list((ipython_dir.parent / "run").iterdir())


INTERRUPTED = """
print("starting", flush=True)
with ipp.Cluster(n=2) as rc:
    ar = rc[:].apply_async(time.sleep, 600)
    rc.queue_status()
    print("ready", flush=True)
    if sys.argv[1] == "get":
        ar.get()
    elif sys.argv[1] == "progress":
        ar.wait_interactive()
    else:
        signal.pause()
"""


@pytest.mark.parametrize("moment", ["starting", "get", "progress", "own code"])
def test_ctrl_c_leaves_nothing(tmp_path, ipython_dir, moment):
    before = set(our_processes())
    with run_script(tmp_path / "script.py", INTERRUPTED, moment) as script:
        assert script.stdout.readline() == "starting\n"
        if moment == "starting":
            eventually(lambda: len(set(our_processes()) - before) > 1, what="a child of the script")
        else:
            assert script.stdout.readline() == "ready\n", script.stderr.read()
        os.killpg(script.pid, signal.SIGINT)  # what a terminal does
        assert script.wait(30) in (1, -signal.SIGINT)
        assert "KeyboardInterrupt" in script.stderr.read()
        eventually(lambda: not set(our_processes()) - before, 20)
    assert not cluster_files(ipython_dir.parent)


def test_an_unhandled_error_in_a_script_leaves_nothing(tmp_path, ipython_dir):
    code = "rc = ipp.Cluster(n=1).start_and_connect_sync()\nrc[0].apply_sync(lambda: 1 / 0)\n"
    with run_script(tmp_path / "script.py", code) as script:
        _, err = script.communicate(timeout=60)
    assert script.returncode == 1
    assert "ZeroDivisionError" in err


# --- forks


def test_a_client_is_not_for_a_forked_child(start):
    rc = start(1)
    view = rc.load_balanced_view()
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(read)
        try:
            view.apply_sync(abs, -1)
        except BaseException as e:
            os.write(write, f"{type(e).__name__}: {e}".encode())
        os._exit(0)
    os.close(write)
    with open(read) as f:
        said = f.read()
    os.waitpid(pid, 0)
    assert said.startswith("ControllerLost: ") and "fork" in said
    assert view.apply_sync(abs, -1) == 1


def test_user_code_may_start_processes(start):
    def spawn():
        import multiprocessing
        import subprocess
        import sys

        done = subprocess.run([sys.executable, "-c", "print(6 * 7)"], stdout=subprocess.PIPE, check=True)
        with multiprocessing.get_context("fork").Pool(2) as pool:
            return done.stdout, pool.map(abs, [-1, -2, -3])

    rc = start(1)
    for _ in range(3):
        assert rc[0].apply_async(spawn).get(60) == (b"42\n", [1, 2, 3])


def test_a_forked_child_that_returns_from_the_task_is_no_second_engine(start):
    def fork():
        pid = os.fork()
        return pid or "child"

    rc = start(1)
    child = rc[0].apply_async(fork).get(30)
    assert type(child) is int
    assert rc[0].map_sync(abs, range(100)) == list(range(100))
    eventually(lambda: gone(child), what="the end of the forked child")


def test_what_user_code_leaves_running_ends_with_its_engine(start):
    def spawn():
        import subprocess

        return subprocess.Popen(["sleep", "600"]).pid

    rc = start(1)
    child = rc[0].apply_async(spawn).get(30)
    assert not gone(child)
    rc[0].apply_async(tasks.die).exception(30)
    eventually(lambda: gone(child))
