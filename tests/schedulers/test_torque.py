"""What only a queue shows, with Torque's commands over Slurm."""

from __future__ import annotations

import subprocess

import pytest
from places import output_of, torque
from shell import one_sentence, run
from support import eventually

import ipclite as ipp
from ipclite.errors import LauncherError

SOON_S = 20


@pytest.fixture(scope="module", autouse=True)
def service(_mark):
    with torque() as running:
        yield running


@pytest.fixture
def make(ipython_dir):
    """A function that makes a cluster, not yet started; `settings` are those of PBSEngineSetLauncher."""
    def of(n=2, settings=None, **options):
        return ipp.Cluster(n=n, engines="pbs", config={"PBSEngineSetLauncher": settings or {}}, **options)
    return of


def test_several_jobs(make):
    with make(n=4, settings={"engines_per_job": 2, "timelimit": "0:10:00"}) as rc:
        jobs = rc.cluster.engine_set.status()["jobs"]
        assert len(jobs) == 2 and rc[:].apply_sync(abs, -1) == [1] * 4
        subprocess.run(["qdel", jobs[1]["id"]], check=True)
        eventually(lambda: len(rc.ids) == 2, SOON_S)
        assert rc.cluster.engine_set.running


def test_a_job_that_is_refused(make):
    with pytest.raises(LauncherError, match="not accepted: qsub failed.*invalid partition"):
        make(settings={"queue": "nosuch"}).start_and_connect_sync()
    one_sentence(run("cluster", "start", "--engines=pbs", "-n", "2", "--PBSLauncher.queue=nosuch"), 1, "nosuch", "qsub")


def test_the_output_of_a_job_that_failed(make):
    with pytest.raises(LauncherError, match="(?s)Torque job .*no such license"):
        make(settings={"prologue": "echo no such license; exit 3"}).start_and_connect_sync()


def test_the_controller_as_a_job(make):
    with make(controller="pbs") as rc:
        assert rc[:].apply_sync(abs, -1) == [1, 1]
    eventually(lambda: output_of("squeue", "-h") == "", SOON_S)


def test_dry_run(ipython_dir):
    shown = run("cluster", "start", "--engines=pbs", "-n", "4", "--dry-run", "--PBSEngineSetLauncher.engines_per_node=2")
    assert shown.process.returncode == 0 and "#PBS -l nodes=2:ppn=2" in shown.out.splitlines()
    assert output_of("squeue", "-h") == ""
