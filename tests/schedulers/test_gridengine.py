"""What only a queue shows, on Grid Engine with eight slots."""

from __future__ import annotations

import os
import subprocess
import time

import pytest
from places import grid_engine, output_of
from shell import one_sentence, run
from support import eventually
from tasks import report_and_hold

import ipclite as ipp
from ipclite.errors import ConfigError, EngineError, LauncherError

SOON_S = 20
SLOTS = 8


@pytest.fixture(scope="module", autouse=True)
def service(_mark):
    with grid_engine() as running:
        yield running


@pytest.fixture
def make(ipython_dir):
    """A function that makes a cluster, not yet started; `settings` are those of SGEEngineSetLauncher."""
    def of(n=2, settings=None, **options):
        return ipp.Cluster(n=n, engines="sge", config={"SGEEngineSetLauncher": settings or {}}, **options)
    return of


def jobs_of(cluster):
    return cluster.engine_set.status()["jobs"]


def test_engines_come_as_there_is_room(make):
    c = make(n=SLOTS + 2).start_cluster_sync()
    try:
        with c.connect_client_sync() as rc:
            rc.wait_for_engines(SLOTS, timeout=SOON_S)
            assert rc.load_balanced_view().map_sync(abs, range(-20, 0)) == list(range(20, 0, -1))
            eventually(lambda: c.engine_set.status()["state"] == "running", SOON_S)
            assert len(jobs_of(c)) == 1 and len(rc.ids) == SLOTS
    finally:
        c.stop_cluster_sync()


def test_engines_of_one_task_share_a_node(make):
    with make(n=4, settings={"engines_per_node": 2, "parallel_environment": "smp"}) as rc:
        assert len(rc.ids) == 4 and len(set(rc[:].apply_sync(os.getppid))) == 2
        assert rc[:].apply_sync(os.getenv, "NSLOTS") == ["2"] * 4


def test_its_time_ends(make, tmp_path):
    c = make(n=2, settings={"timelimit": "0:0:3"})
    with c as rc:
        begun = time.monotonic()
        running = rc[:].apply_async(report_and_hold, str(tmp_path / "pids"), str(tmp_path / "never"))
        with pytest.raises((ipp.CompositeError, EngineError)):
            running.get(SOON_S)
        eventually(lambda: rc.ids == [], SOON_S)
        assert time.monotonic() - begun < SOON_S
        eventually(lambda: not c.engine_set.running, SOON_S)
        assert "Grid Engine job" in c.engine_set.stop_data["reason"]


def test_another_job_takes_the_place_of_one_whose_time_ends(make):
    def nap(seconds):
        import time
        time.sleep(seconds)
        return os.getenv("JOB_ID")

    with make(n=2, settings={"timelimit": "0:0:9"}, keep_engines=True) as rc:
        first = rc[0].apply_sync(os.getenv, "JOB_ID")
        ar = rc.load_balanced_view().map_async(nap, [0.1] * 150, chunksize=1)
        jobs = ar.get(60)
        assert len(jobs) == 150 and first in jobs and len(set(jobs)) > 1
        assert rc.cluster.size == 2


@pytest.mark.parametrize("settings, words", [
    ({"queue": "nosuch.q"}, "unknown queue"),
    ({"constraint": "unicorn=1"}, "unknown resource"),
    ({"engines_per_node": 2, "parallel_environment": "nosuch"}, "parallel environment"),
])
def test_a_job_that_is_refused(make, settings, words):
    with pytest.raises((LauncherError, ConfigError), match=f"not accepted: qsub failed.*{words}"):
        make(settings=settings).start_and_connect_sync()


def test_the_command_line_says_it_in_one_sentence(ipython_dir):
    one_sentence(run("cluster", "start", "--engines=sge", "-n", "2", "--SGELauncher.queue=nosuch.q"), 1, "nosuch.q", "qsub")


def test_a_held_job_is_told_at_once_and_how_to_release_it(make):
    with pytest.raises(LauncherError, match="held.*qrls"):
        make(settings={"options": ["-h"]}).start_and_connect_sync()


def test_a_job_in_error_is_told_at_once(make, tmp_path):
    with pytest.raises(LauncherError, match="held.*qmod -cj"):
        make(settings={"options": [f"-wd {tmp_path / 'nowhere'}"]}).start_and_connect_sync()


def test_the_output_says_why_a_job_failed(make):
    with pytest.raises(LauncherError, match="(?s)Grid Engine job .* failed.*exit code 3.*no such license"):
        make(settings={"prologue": "echo no such license; exit 3"}).start_and_connect_sync()


def test_one_task_is_deleted(make):
    with make(n=3) as rc:
        subprocess.run(["qdel", jobs_of(rc.cluster)[0]["id"], "-t", "2"], check=True, stdout=subprocess.DEVNULL)
        eventually(lambda: len(rc.ids) == 2, SOON_S)
        assert rc[:].apply_sync(abs, -1) == [1, 1] and rc.cluster.engine_set.running


def test_the_controller_as_a_job(make):
    with make(controller="sge") as rc:
        assert rc[:].apply_sync(abs, -1) == [1, 1]
    eventually(lambda: output_of("qstat", "-u", "*") == "", SOON_S)


def test_dry_run(ipython_dir, tmp_path):
    shown = run("cluster", "start", "--engines=sge", "-n", "3", "--dry-run", "--SGELauncher.queue=main.q")
    assert shown.process.returncode == 0 and {"#$ -q main.q", "#$ -t 1-3"} <= set(shown.out.splitlines())
    assert output_of("qstat", "-u", "*") == ""
    script = ipp.Cluster(n=3, engines="sge").job_script()
    (tmp_path / "job.sh").write_text(script[script.index("#!"):])
    checked = subprocess.run(["qsub", "-verify", "job.sh"], cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    assert checked.returncode == 0 and "job-array tasks:            1-3:1" in checked.stdout
