"""What only a queue shows, on Slurm with three nodes of four CPUs: jobs that wait, are refused, held, ended in part or in
time; many at once; a controller among them."""

from __future__ import annotations

import collections
import contextlib
import json
import os
import signal
import subprocess
import threading
import time

import pytest
from places import output_of, slurm
from shell import Command, one_sentence, run
from support import eventually
from tasks import hold

import ipclite as ipp
from ipclite.errors import ConfigError, EngineError, LauncherError

SOON_S = 20
CPUS = 12


@pytest.fixture(scope="module", autouse=True)
def service(_mark):
    with slurm() as running:
        yield running


@pytest.fixture
def make(ipython_dir):
    """A function that makes a cluster, not yet started; `settings` are those of SlurmEngineSetLauncher."""
    def of(n=2, settings=None, **options):
        return ipp.Cluster(n=n, engines="slurm", config={"SlurmEngineSetLauncher": settings or {}}, **options)
    return of


@pytest.fixture
def busy():
    """All CPUs are somebody else's; a function makes them free."""
    job = subprocess.run(["sbatch", "--parsable", f"--ntasks={CPUS}", "--output=/dev/null", "--wrap=sleep 600"], check=True,
                         stdout=subprocess.PIPE, text=True).stdout.strip()
    eventually(lambda: output_of("squeue", "-h", "-j", job, "-o", "%T") == "RUNNING\n")

    def free():
        subprocess.run(["scancel", job], check=True)
        eventually(lambda: not output_of("squeue", "-h", "-j", job))

    yield free
    free()


@contextlib.contextmanager
def connecting(cluster):
    """Start a cluster in a thread; yields a list that gets its client, or why it does not start."""
    found = []

    def start():
        try:
            found.append(cluster.start_and_connect_sync())
        except Exception as e:
            found.append(e)

    thread = threading.Thread(target=start)
    thread.start()
    try:
        yield found
    finally:
        thread.join()
        if found and isinstance(found[0], ipp.Client):
            found[0].close()
        cluster.stop_cluster_sync()


def jobs_of(cluster):
    return cluster.engine_set.status()["jobs"]


# --- waiting


def test_the_reason_why_a_job_waits_is_told_and_the_time_does_not_count(make, busy):
    c = make(cluster_id="", engine_timeout=2)
    with connecting(c) as found:
        eventually(lambda: c.engines and jobs_of(c) and jobs_of(c)[0]["reason"] == "Resources", SOON_S)
        row = json.loads(run("cluster", "list", "-o", "json").out)[0]
        assert row["state"] == "pending" and "Resources" in row["reason"] and row["jobs"][0]["id"] == jobs_of(c)[0]["id"]
        assert "Resources" in run("cluster", "list").out and "Resources" in run("cluster", "status").out
        begun = time.monotonic()
        eventually(lambda: time.monotonic() > begun + 1.5 * c.engine_timeout)
        assert not found, "it did not wait"
        busy()
        eventually(lambda: found, SOON_S)
        assert found[0].ids == [0, 1]


def test_a_job_that_is_cancelled_while_it_waits(make, busy):
    c = make()
    with connecting(c) as found:
        eventually(lambda: c.engines and jobs_of(c) and jobs_of(c)[0]["state"] == "pending", SOON_S)
        subprocess.run(["scancel", jobs_of(c)[0]["id"]], check=True)
        eventually(lambda: found, SOON_S)
        assert isinstance(found[0], LauncherError) and "was cancelled" in str(found[0])


def test_a_job_that_waits_is_cancelled_by_stop_after_its_owner_was_killed(ipython_dir, busy):
    with Command("cluster", "start", "--engines=slurm", "-n", "2") as first:
        eventually(lambda: "Resources" in output_of("squeue", "-h", "-o", "%r"), SOON_S)
        first.stop(signal.SIGKILL)
        eventually(lambda: "are left, `ipcluster stop` cancels them" in run("cluster", "list").out, SOON_S)
        run("cluster", "stop")
        eventually(lambda: "Resources" not in output_of("squeue", "-h", "-o", "%r"), SOON_S)


def test_a_held_job_is_told_at_once_and_how_to_release_it(make):
    c = make(settings={"options": ["--hold"]})
    with pytest.raises(LauncherError, match="held.*scontrol release"):
        c.start_and_connect_sync()


def test_jobs_are_used_as_they_start(make, tmp_path):
    with subprocess.Popen(["srun", "--nodes=2", "--exclusive", "sleep", "600"], stdin=subprocess.DEVNULL,
                          stderr=subprocess.DEVNULL) as other:
        try:
            eventually(lambda: output_of("squeue", "-h", "-o", "%D %T") == "2 RUNNING\n")
            c = make(n=6, settings={"engines_per_job": 3}).start_cluster_sync()  # on the third node there is room for four
            try:
                with c.connect_client_sync() as rc:
                    rc.wait_for_engines(3, timeout=SOON_S)
                    assert rc.load_balanced_view().map_sync(abs, [-1, 2]) == [1, 2]
                    eventually(lambda: sorted(job["state"] for job in jobs_of(c)) == ["pending", "running"])
                    assert c.engine_set.status()["state"] == "running"
                    other.send_signal(signal.SIGTERM)
                    rc.wait_for_engines(6, timeout=SOON_S)
                    assert rc[:].apply_sync(abs, -1) == [1] * 6
            finally:
                c.stop_cluster_sync()
        finally:
            other.kill()


# --- refused


@pytest.mark.parametrize("n, settings, words", [
    (2, {"queue": "nosuch"}, "invalid partition"),
    (2, {"memory": "999999M"}, "Requested node configuration is not available|Memory specification"),
    (2, {"timelimit": "soon"}, "--time"),
    (2, {"constraint": "unicorn"}, "[Ff]eature"),
])
def test_a_job_that_is_refused(make, n, settings, words):
    with pytest.raises(LauncherError, match=f"not accepted: sbatch failed.*{words}"):
        make(n, settings).start_and_connect_sync()


def test_the_command_line_says_it_in_one_sentence(ipython_dir):
    one_sentence(run("cluster", "start", "--engines=slurm", "-n", "2", "--SlurmLauncher.queue=nosuch"), 1, "nosuch", "sbatch")


def test_slurm_does_not_answer(make, monkeypatch, tmp_path):
    conf = tmp_path / "slurm.conf"
    with open(os.environ["SLURM_CONF"]) as file:
        conf.write_text(file.read().replace("SlurmctldPort=", "MessageTimeout=1\nSlurmctldPort=1#"))
    monkeypatch.setenv("SLURM_CONF", str(conf))
    with pytest.raises(LauncherError, match="sbatch failed"):
        make().start_and_connect_sync()


# --- ended


def test_one_of_several_jobs_is_cancelled(make, tmp_path):
    c = make(n=4, settings={"engines_per_job": 2})
    with c as rc:
        running = rc[:].apply_async(hold, str(tmp_path / "go"), 7)
        first = jobs_of(c)[0]["id"]
        subprocess.run(["scancel", first], check=True)
        eventually(lambda: len(rc.ids) == 2, SOON_S)
        (tmp_path / "go").touch()
        with pytest.raises(ipp.CompositeError) as e:
            running.get(SOON_S)
        gone = [error for error in e.value.elist if error is not None]
        assert len(gone) == 2 and all(isinstance(error, EngineError) for error in gone)
        assert rc[:].apply_sync(abs, -1) == [1, 1] and c.engine_set.running
        eventually(lambda: sorted(job["state"] for job in jobs_of(c)) == ["cancelled", "running"], SOON_S)


def test_another_job_takes_the_place_of_one_that_is_cancelled(make):
    with make(n=2, settings={"engines_per_job": 1}, keep_engines=True) as rc:
        cancelled = jobs_of(rc.cluster)[0]["id"]
        gone = rc[:].apply_sync(os.getenv, "SLURM_JOB_ID").index(cancelled)
        subprocess.run(["scancel", cancelled], check=True)
        eventually(lambda: gone not in rc.ids and len(rc.ids) == 2, SOON_S)
        assert cancelled not in rc[:].apply_sync(os.getenv, "SLURM_JOB_ID") and rc.cluster.size == 2


def test_the_output_says_why_a_job_failed(make):
    with pytest.raises(LauncherError, match="(?s)Slurm job .* failed.*exit code 3.*no such license"):
        make(settings={"prologue": "echo no such license; exit 3"}).start_and_connect_sync()


def test_the_work_directory_is_missing_on_the_nodes(make, busy, tmp_path):
    (tmp_path / "here").mkdir()
    with connecting(make(settings={"work_dir": str(tmp_path / "here")})) as found:
        eventually(lambda: "Resources" in output_of("squeue", "-h", "-o", "%r"), SOON_S)
        (tmp_path / "here").rmdir()
        busy()
        eventually(lambda: found, SOON_S)
        assert f"The work directory {tmp_path / 'here'} is missing on this node: " in str(found[0])


# --- shapes


def test_one_job_on_several_nodes(make):
    with make(n=6, settings={"engines_per_node": 2}) as rc:
        assert len(jobs_of(rc.cluster)) == 1
        nodes = rc[:].apply_sync(os.getenv, "SLURMD_NODENAME")
        assert collections.Counter(nodes) == {"node1": 2, "node2": 2, "node3": 2}
        assert len(set(rc[:].apply_sync(os.getppid))) == 3, "there is an agent on each node"
        eventually(lambda: jobs_of(rc.cluster)[0]["nodes"] == "node[1-3]", SOON_S)


def test_a_storm_of_jobs(make):
    begun = time.monotonic()
    c = make(n=50, settings={"engines_per_job": 1, "submit_rate": 20}).start_cluster_sync()
    took_s = time.monotonic() - begun
    try:
        assert took_s > 49 / 20, "faster than the rate"
        assert len({job["id"] for job in jobs_of(c)}) == 50
        before = c.engine_set.scheduler.queries
        with c.connect_client_sync() as rc:
            rc.wait_for_engines(CPUS, timeout=60)
            assert rc.load_balanced_view().map_sync(abs, range(-50, 0)) == list(range(50, 0, -1))
            eventually(lambda: c.engine_set.status()["state"] == "running", SOON_S)
            assert c.engine_set.scheduler.queries - before < 50, "one query is for all jobs"
    finally:
        c.stop_cluster_sync()
    assert output_of("squeue", "-h") == ""


def test_the_controller_as_a_job(make):
    c = make(controller="slurm", cluster_id="")
    with c as rc:
        assert rc[:].apply_sync(abs, -1) == [1, 1]
        status = c.status()
        eventually(lambda: c.status()["controller"]["state"] == "running", SOON_S)
        ids = {job["id"] for job in status["controller"]["jobs"]} | {job["id"] for job in jobs_of(c)}
        assert ids == set(output_of("squeue", "-h", "-o", "%i").split()) and len(ids) == 2
        assert run("cluster", "list").out.count("running") == 1
        rc.close()
        assert "Stopped" in run("cluster", "stop").out
    assert output_of("squeue", "-h") == ""


def test_dry_run(ipython_dir, tmp_path):
    shown = run("cluster", "start", "--engines=slurm", "-n", "6", "--dry-run", "--SlurmEngineSetLauncher.engines_per_node=2",
                "--SlurmLauncher.queue=main", "--SlurmLauncher.timelimit=0:10:00")
    assert shown.process.returncode == 0
    for line in ("#SBATCH --partition=main", "#SBATCH --nodes=3", "#SBATCH --ntasks-per-node=2", "#SBATCH --time=0:10:00"):
        assert line in shown.out.splitlines()
    assert output_of("squeue", "-h") == "" and "engine" in shown.out
    script = ipp.Cluster(n=6, engines="slurm", config={"SlurmEngineSetLauncher": {"engines_per_node": 2}}).job_script()
    (tmp_path / "job.sh").write_text(script[script.index("#!"):])
    subprocess.run(["sbatch", "--test-only", "job.sh"], cwd=tmp_path, check=True, stderr=subprocess.DEVNULL)


def test_a_setting_that_nobody_knows(make):
    with pytest.raises(ConfigError, match="engines_per_jobs"):
        make(settings={"engines_per_jobs": 2}).start_and_connect_sync()
