"""A controller that is killed, frozen or cut off, and a run that goes on: each task's future resolves once, with the right value,
and what has ended is not run again."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import os
import signal
import threading
import time

import psutil
import pytest
import tasks
from shell import Command, run
from support import eventually, is_running

import ipclite as ipp

pytestmark = pytest.mark.keeps_files
LASTING = ("--sqlitedb", "--reuse", "--ping=500")
SOON_S = 40


def controller(*more):
    return Command("controller", *LASTING, *more)


def note(folder, i, value=None):
    """Write down that task i runs here; returns the value, or 2 i."""
    fd = os.open(os.path.join(folder, str(os.getpid())), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.write(fd, b"%d\n" % i)
    os.close(fd)
    return 2 * i if value is None else value


def note_and_hold(folder, i, flag):
    note(folder, i)
    tasks.hold(flag)
    return ipp.current_task().attempt


def runs(folder):
    """{task: how often it ran}"""
    return collections.Counter(int(line) for path in folder.iterdir() for line in path.read_text().split())


def enough_are_done(ars, n):
    eventually(lambda: sum(ar.done() for ar in ars) > n, SOON_S, f"more than {n} tasks have ended")


class Site:
    """A controller and engines started by hand, and a client."""

    def __init__(self, stack, engines=3, flags=()):
        self._stack, self.flags = stack, flags
        self.controller = stack.enter_context(controller(*flags))
        self.engines = stack.enter_context(Command("engine", "-n", str(engines)))
        self.rc = self.client()
        self.rc.wait_for_engines(engines, timeout=30)
        self.view = self.rc.load_balanced_view()

    def client(self):
        return self._stack.enter_context(ipp.Client(timeout=30))

    def kill(self):
        self.controller.stop(signal.SIGKILL)

    def start(self, *more):
        self.controller = self._stack.enter_context(controller(*self.flags, *more))

    def back(self, rc=None):
        rc = rc or self.rc
        eventually(lambda: not rc._connection.away and rc.queue_status(), SOON_S, "the client is back")


@pytest.fixture
def site(ipython_dir):
    with contextlib.ExitStack() as stack:
        yield lambda *args, **options: Site(stack, *args, **options)


@pytest.fixture
def ran(tmp_path):
    folder = tmp_path / "ran"
    folder.mkdir()
    return folder


def test_a_controller_killed_in_the_middle_of_20_000_tasks(site, ran):
    here = site()
    ars = [here.view.apply_async(note, ran, i) for i in range(20_000)]
    enough_are_done(ars, 3000)
    here.kill()
    ars += [here.view.apply_async(note, ran, i) for i in range(20_000, 20_500)]
    here.start()
    assert [ar.get(SOON_S) for ar in ars] == [2 * i for i in range(20_500)]
    assert runs(ran) == dict.fromkeys(range(20_500), 1)
    assert here.rc.ids == [0, 1, 2] and here.rc[:].apply_sync(os.getppid) == [here.engines.pid] * 3


def test_a_cluster_that_restarts_its_controller(ipython_dir, ran):
    with ipp.Cluster(n=2, restart_controller=True, controller_args=["--sqlitedb", "--ping=500"]) as rc:
        view, pids = rc.load_balanced_view(), rc[:].apply_sync(os.getpid)
        ars = []
        for k in range(2):
            ars += [view.apply_async(note, ran, i) for i in range(3000 * k, 3000 * (k + 1))]
            enough_are_done(ars, 3000 * k + 300)
            os.kill(rc.cluster.controller.process.pid, signal.SIGKILL)
        assert [ar.get(SOON_S) for ar in ars] == [2 * i for i in range(6000)]
        assert runs(ran) == dict.fromkeys(range(6000), 1)
        assert rc[:].apply_sync(os.getpid) == pids
        waiting = [view.apply_async(note, ran, i) for i in range(6000, 9000)]
        rc.cluster.restart_controller_sync()
        assert [ar.get(SOON_S) for ar in waiting] == [2 * i for i in range(6000, 9000)]
        assert runs(ran) == dict.fromkeys(range(9000), 1)
        folder = rc.cluster.profile_dir / "security"
    assert not [path for path in folder.iterdir() if "ipcontroller" in path.name and path.suffix != ".db" and "tasks" not in path.name]


@pytest.mark.parametrize("daemonize", [False, True])
def test_ipcluster_restarts_its_controller(ipython_dir, daemonize):
    words = ["cluster", "start", "-n", "1", "--restart-controller", *["--daemonize"] * daemonize, "--", "--sqlitedb", "--ping=500"]
    with Command(*words) as cluster:
        cluster.says("engines are ready")
        try:
            with ipp.Client(timeout=30) as rc:
                pid = rc[0].apply_async(os.getpid).get(SOON_S)
                os.kill(rc._connection.link_info["pid"], signal.SIGKILL)
                assert rc.load_balanced_view().apply_async(os.getpid).get(SOON_S) == pid
            assert daemonize or cluster.running()
        finally:
            assert run("cluster", "stop").process.returncode == 0


def test_killed_again_while_it_recovers(site, ran):
    here = site()
    ars = [here.view.apply_async(note, ran, i) for i in range(3000)]
    enough_are_done(ars, 500)
    here.kill()
    for said in ("carrying on: ", "came back", "connected"):
        here.start()
        here.controller.says(said)
        here.kill()
    here.start()
    assert [ar.get(SOON_S) for ar in ars] == [2 * i for i in range(3000)]
    assert runs(ran) == dict.fromkeys(range(3000), 1)


def test_what_runs_while_the_controller_is_away_goes_on(site, ran, tmp_path):
    """It runs once, and so does what depends on it, or was to run behind it."""
    here = site(2)
    flag = tmp_path / "flag"
    long = [view.apply_async(note_and_hold, ran, i, flag) for i, view in enumerate(here.rc)]
    behind = here.rc[0].apply_async(note, ran, 2)
    after = here.view.temp_flags(after=long[0], follow=long[0])
    with after as view:
        follower = view.apply_async(note, ran, 3)
    eventually(lambda: len(runs(ran)) == 2, SOON_S, "both run")
    here.rc.queue_status()
    here.kill()
    assert not any(ar.done() for ar in (*long, behind, follower))
    here.start()
    here.controller.says("carrying on\n")
    here.back()
    flag.touch()
    assert [ar.get(SOON_S) for ar in (*long, behind, follower)] == [1, 1, 4, 6]
    assert follower.metadata["engine_id"] == 0
    assert runs(ran) == dict.fromkeys(range(4), 1)
    later = here.view.temp_flags(after=follower)
    with later as view:
        assert view.apply_sync(abs, -1) == 1


def test_what_ended_before_can_be_depended_on(site):
    here = site(1)
    first = here.view.apply_async(abs, -1)
    bad = here.view.apply_async(lambda: 1 / 0)
    assert first.get(SOON_S) == 1 and bad.exception(SOON_S)
    here.kill()
    here.start()
    here.back()
    with here.view.temp_flags(after=first) as view:
        assert view.apply_async(abs, -2).get(SOON_S) == 2
    with here.view.temp_flags(after=bad) as view, pytest.raises(ipp.ImpossibleDependency):
        view.apply_async(abs, -2).get(SOON_S)


def test_an_engine_that_dies_meanwhile(site, ran, tmp_path):
    """Its tasks are run again as others are; with `retries=0` what may have run is not."""
    here = site(2, flags=("--restore-grace=2",))
    flag = tmp_path / "flag"
    again = here.view.apply_async(note_and_hold, ran, 0, flag)
    eventually(lambda: runs(ran)[0] == 1, SOON_S)
    once = here.rc.load_balanced_view(retries=0).apply_async(note_and_hold, ran, 1, flag)
    eventually(lambda: len(runs(ran)) == 2, SOON_S)
    eventually(lambda: len(here.rc.db_query({"engine_id": {"$ne": None}}, keys=["engine_id"])) == 2, SOON_S)
    time.sleep(0.5)  # so that the database has noted where they run
    here.kill()
    for process in psutil.Process(here.engines.pid).children():
        process.kill()
    flag.touch()
    with Command("engine", "-n", "1"):
        here.start()
        assert again.get(SOON_S) == 2
        with pytest.raises(ipp.EngineError, match="retries=0"):
            once.get(SOON_S)
    assert runs(ran) == {0: 2, 1: 1}


def test_a_client_that_dies_meanwhile(site, ran, tmp_path):
    """Its tasks are done nonetheless, and others can have the results."""
    here = site(1)
    code = ("import os, sys; sys.path[:0] = sys.argv[1:3]; import ipclite as ipp; from test_restart import note\n"
            "rc = ipp.Client(timeout=30); v = rc.load_balanced_view()\n"
            "ars = [v.apply_async(note, sys.argv[3], i) for i in range(2000)]\n"
            "rc.queue_status(); print('sent', ars[-1].msg_ids[0], flush=True)\nars[-1].get()\nimport time; time.sleep(600)")
    folder = os.path.dirname(__file__)
    with Command(code=["-c", code, os.path.dirname(folder), folder, str(ran)]) as client:
        client.says("sent ")
        here.kill()
        client.stop(signal.SIGKILL)
        last = client.out.split()[1]
    here.start("--restore-grace=1")
    here.back()
    eventually(lambda: here.rc.queue_status().get(0, {"tasks": 1})["tasks"] == here.rc.queue_status()["unassigned"] == 0, SOON_S)
    counted = runs(ran)
    assert max(counted.values()) == 1
    if len(counted) == 2000:  # all had been on disk
        assert here.rc.get_result(last).get(SOON_S) == 3998


def test_large_arguments_and_results(site):
    here = site(2)
    data = [os.urandom(3_000_000) for _ in range(6)]
    ars = [here.view.apply_async(lambda b: (time.sleep(0.05), b[::-1])[1], block) for block in data]
    here.kill()
    here.start()
    assert [ar.get(SOON_S) for ar in ars] == [block[::-1] for block in data]


def test_functions_that_only_the_old_controller_had(site):
    here = site(1)

    def double(x):
        return 2 * x

    assert here.view.apply_sync(double, 1) == 2
    here.kill()
    here.start()
    here.back()
    assert here.view.apply_async(double, 2).get(SOON_S) == 4
    assert here.view.map_async(double, range(10)).get(SOON_S) == list(range(0, 20, 2))


def test_coroutines_that_wait(site, ran):
    here = site(2)

    async def both():
        ars = [here.view.apply_async(note, ran, i) for i in range(200)]
        waiting = [asyncio.ensure_future(asyncio.wait_for(ar, SOON_S)) for ar in ars]
        await asyncio.sleep(0)
        await asyncio.get_running_loop().run_in_executor(None, here.kill)
        here.start()
        return await asyncio.gather(*waiting)

    assert asyncio.run(both()) == [2 * i for i in range(200)]
    assert runs(ran) == dict.fromkeys(range(200), 1)


def test_calls_during_the_gap(site, caplog):
    """They wait as long as they are to; what they ask for is answered afterwards."""
    here = site(1)
    rc, view = here.rc, here.view
    here.kill()
    eventually(lambda: rc._connection.away, SOON_S)
    assert rc.ids == [0]
    with pytest.raises(ipp.TimeoutError):
        view.apply_async(abs, -1).get(0.2)
    with pytest.raises(ipp.TimeoutError, match="connection"):
        rc._query("queue_status", 0.2, targets=None)
    threading.Timer(0.3, signal.raise_signal, [signal.SIGINT]).start()
    with pytest.raises(KeyboardInterrupt):
        view.apply_async(abs, -1).get()
    waiting = view.apply_async(abs, -5)
    here.start()
    assert rc.queue_status()[0]["queue"] == 0
    assert waiting.get(SOON_S) == 5
    said = [r.getMessage() for r in caplog.records if r.name == "ipclite.client"]
    assert len(said) == 2 and "trying" in said[0] and "is back" in said[1], said


def test_a_client_closed_during_the_gap(site):
    here = site(1)
    ar = here.view.apply_async(abs, -1)
    here.kill()
    eventually(lambda: here.rc._connection.away or ar.done(), SOON_S)
    began = time.monotonic()
    here.rc.close()
    assert time.monotonic() - began < 10
    assert ar.done()


def test_restore_needs_records_that_last(ipython_dir):
    refused = run("controller", "--restore")
    assert refused.process.returncode != 0 and "--sqlitedb" in refused.err and "Traceback" not in refused.err


def test_the_attempt_is_known_to_the_task(site, tmp_path):
    here = site(2)
    assert ipp.current_task() is None
    path = tmp_path / "killed"

    def attempt():
        if not path.exists():
            path.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return ipp.current_task()

    ar = here.view.apply_async(attempt)
    found = ar.get(SOON_S)
    assert (found.msg_id, found.attempt, found.engine_id) == (ar.msg_ids[0], 2, ar.engine_id) and ar.metadata["attempt"] == 2


def test_a_task_with_retries_0_is_not_run_again_when_its_engine_dies(site, ran):
    here = site(2)

    def die():
        note(ran, 0)
        os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(ipp.EngineError, match="retries=0"):
        here.rc.load_balanced_view(retries=0).apply_async(die).get(SOON_S)
    assert runs(ran) == {0: 1}


def test_a_controller_that_sleeps_for_a_while(ipython_dir, ran):
    """Without records that last: nothing is run twice, and no result is lost, nor a task that was submitted meanwhile."""
    with ipp.Cluster(n=2, controller_args=["--ping=300"]) as rc:
        view = rc.load_balanced_view()
        ars = [view.apply_async(note, ran, i) for i in range(2000)]
        eventually(lambda: sum(ar.done() for ar in ars) > 100, SOON_S)
        os.kill(rc.cluster.controller.process.pid, signal.SIGSTOP)
        try:
            ars += [view.apply_async(note, ran, i) for i in range(2000, 2100)]
            eventually(lambda: rc._connection.away, SOON_S, "the silence is noticed")
            ars += [view.apply_async(note, ran, i) for i in range(2100, 2200)]
        finally:
            os.kill(rc.cluster.controller.process.pid, signal.SIGCONT)
        assert [ar.get(SOON_S) for ar in ars] == [2 * i for i in range(2200)]
        assert runs(ran) == dict.fromkeys(range(2200), 1)
        assert rc[:].apply_sync(abs, -1) == [1, 1]
        assert all(map(is_running, map(psutil.Process, rc[:].apply_sync(os.getpid))))
