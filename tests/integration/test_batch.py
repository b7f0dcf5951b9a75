"""Batch systems: LSF and HTCondor by commands that really run the jobs (tests/services/fake_batch.py), and what users
and schedulers do wrong. `tests/schedulers` has the real ones."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import threading
import time
from pathlib import Path

import pytest
from shell import ROOT, Command, one_sentence, run, security
from support import eventually

import ipclite as ipp
from ipclite import jobs, launchers
from ipclite.errors import ConfigError, EngineError, LauncherError

SERVICES = Path(__file__).resolve().parents[1] / "services"
KINDS = {"lsf": "fake_lsf", "htcondor": "fake_condor"}
QUICK = {"BatchSystemLauncher": {"poll_seconds": 0.5}}


@pytest.fixture
def fake(ipython_dir, monkeypatch):
    """A function that puts the commands of a batch system on the path; returns the directory of its jobs."""
    home = ipython_dir.parent / "jobs"
    home.mkdir()
    monkeypatch.setenv("FAKE_BATCH", str(home))
    monkeypatch.chdir(ipython_dir.parent)

    def install(kind):
        monkeypatch.setenv("PATH", f"{SERVICES / KINDS[kind]}{os.pathsep}{os.environ['PATH']}")
        return home

    yield install
    jobs.Scheduler._all.clear()


@pytest.fixture
def commands(ipython_dir, monkeypatch):
    """A function that puts shell scripts on the path, by name; the directory is the only thing it returns."""
    folder = ipython_dir.parent / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.chdir(ipython_dir.parent)

    def make(**scripts):
        for name, text in scripts.items():
            path = folder / name
            path.write_text(f"#!/bin/sh\n{text}\n")
            path.chmod(0o755)
        return folder

    yield make
    jobs.Scheduler._all.clear()


def merged(*configs):
    found = {}
    for config in configs:
        for section, keys in config.items():
            found.setdefault(section, {}).update(keys)
    return found


def cluster(kind, n=2, **options):
    options["config"] = merged(QUICK, options.pop("config", {}))
    return ipp.Cluster(n=n, engines=kind, **options)


def states(its_cluster):
    return [job["state"] for each in its_cluster.status()["engines"].values() for job in each["jobs"]]


def nap(view, n):
    """Tasks that sleep on n engines, once all of them do."""
    def run(folder):
        import pathlib
        import tempfile
        import time

        tempfile.mkstemp(dir=folder)
        time.sleep(60)
        return pathlib.Path(folder)

    folder = Path(os.environ["FAKE_BATCH"], "naps")
    folder.mkdir()
    ar = view.apply_async(run, str(folder))
    eventually(lambda: len(list(folder.iterdir())) == n)
    return ar


@pytest.mark.parametrize("kind", KINDS)
def test_life(fake, kind, ipython_dir):
    home = fake(kind)
    with cluster(kind, 3, cluster_id="x") as rc:
        its_cluster = rc.cluster
        assert rc[:].apply_sync(os.getpid) == list(dict.fromkeys(rc[:].apply_sync(os.getpid)))
        noted = json.loads((security(ipython_dir) / "cluster-x.json").read_text())
        job, = noted["engines"]["sets"]["0"]["jobs"]
        assert (home / job["id"]).is_dir() and noted["engines"]["class"] == kind
        assert stat.S_IMODE(os.stat(job["script"]).st_mode) == 0o700
        eventually(lambda: states(its_cluster) == ["running"])
        assert its_cluster.status()["engines"]["0"]["jobs"][0]["nodes"]
        assert rc.cluster.engine_set.get_output() is not None
        rows = json.loads(run("cluster", "list", "--json").out)
        assert [(row["state"], row["engines_ready"], row["launcher"]) for row in rows] == [("running", 3, kind)]
        shown = run("cluster", "status", "--cluster-id=x").out
        assert job["id"] in shown and "running" in shown
        launcher = its_cluster.engine_set
    assert launcher.state == "after" and "was cancelled" in launcher.stop_data["reason"]
    assert not Path(job["script"]).exists()


def test_controller_as_a_job(fake):
    fake("lsf")
    with cluster("lsf", controller="lsf") as rc:
        assert len(rc[:].apply_sync(os.getpid)) == 2
        status = rc.cluster.status()
        assert status["controller"]["jobs"][0]["state"] in ("pending", "running")
        agents = {info["host"] for info in rc.engine_info().values()}
        assert len(agents) == 1


def test_a_set_in_several_jobs(fake):
    fake("lsf")
    with cluster("lsf", 5, config={"LSFLauncher": {"engines_per_job": 2}}) as rc:
        assert [job["n"] for job in rc.cluster.status()["engines"]["0"]["jobs"]] == [2, 2, 1]
        assert len(set(rc[:].apply_sync(os.getppid))) == 3  # an agent for each job
        ar = nap(rc[:], 5)
        rc.cluster.signal_engines_sync(signal.SIGINT)
        with pytest.raises(ipp.error.CompositeError, match="KeyboardInterrupt"):
            ar.get(timeout=30)
        assert len(rc.ids) == 5


def test_engines_are_usable_as_they_arrive(fake):
    home = fake("lsf")
    (home / "902").mkdir()
    (home / "902" / "held").write_text("not yet")  # taken, so that the second job is 903
    (home / "903").mkdir()
    with cluster("lsf", 1) as rc:
        rc.cluster.start_engines_sync(1)
        rc.wait_for_engines(2, timeout=30)
        (home / "shut").write_text("no room")
        rc.cluster.start_engines_sync(1)
        eventually(lambda: "pending" in states(rc.cluster))
        assert len(rc[:].apply_sync(os.getpid)) == 2
        (home / "shut").unlink()
        rc.wait_for_engines(3, timeout=30)


def test_time_in_the_queue_does_not_count(fake):
    home = fake("lsf")
    (home / "shut").write_text("waiting for room")
    with Command("cluster", "start", "-n2", "--engines=lsf", "--timeout=4", "--BatchSystemLauncher.poll_seconds=0.5") as start:
        begun = time.monotonic()
        row = eventually(lambda: [row for row in json.loads(run("cluster", "list", "--json").out) if row["state"] == "pending"])
        assert "1 of 1 jobs wait" in row[0]["reason"] and "waiting for room" in row[0]["reason"]
        shown = run("cluster", "status").out
        assert "pending" in shown and "waiting for room" in shown
        eventually(lambda: time.monotonic() - begun > 5)
        assert start.running(), start.err
        (home / "shut").unlink()
        start.says("2 engines are ready")


def test_a_controller_in_the_queue(fake):
    home = fake("lsf")
    (home / "shut").write_text("full")
    with Command("cluster", "start", "-n1", "--engines=lsf", "--controller=lsf", "--timeout=4") as start:
        rows = eventually(lambda: json.loads(run("cluster", "list", "--json").out))
        eventually(lambda: "pending" in json.loads(run("cluster", "list", "--json").out)[0]["state"])
        assert [job["role"] for job in rows[0]["jobs"]] == ["controller"]  # engines would waste their nodes
        (home / "shut").unlink()
        start.says("1 engines are ready")


@pytest.mark.parametrize("kind", KINDS)
def test_a_job_that_fails_tells_why(fake, kind):
    fake(kind)
    with pytest.raises(LauncherError, match=r"The engines of .* ended: .* job \d+ failed(.|\n)*no-such-python"):
        cluster(kind, config={"EngineLauncher": {"engine_cmd": ["/no-such-python"]}}).start_and_connect_sync()


def test_a_job_that_is_cancelled_takes_its_engines_with_it(fake, caplog):
    fake("lsf")
    with cluster("lsf", 2, config={"LSFLauncher": {"engines_per_job": 1}}) as rc:
        doomed = rc.cluster.engine_set.jobs[0]
        victim, = [i for i, info in rc.engine_info().items() if info["set"] == doomed.tag]
        ar = nap(rc[victim], 1)
        subprocess.run(["bkill", doomed.id], check=True, stdout=subprocess.DEVNULL)
        with pytest.raises(EngineError, match=f"LSF job {doomed.id}"):
            ar.get(timeout=30)
        eventually(lambda: states(rc.cluster).count("cancelled") == 1)
        eventually(lambda: f"1 engines ended: LSF job {doomed.id} was cancelled" in caplog.text)
        with pytest.raises(EngineError, match=f"LSF job {doomed.id} was cancelled"):
            rc.wait_for_engines(2, timeout=30)
        assert len(rc.ids) == 1


def test_a_silent_host_is_given_up_with_its_job(fake):
    """The batch system knows that the job has ended, while nobody hears from the engines, which are frozen."""
    home = fake("lsf")
    with cluster("lsf", 1, controller_args=["--ping=60000"]) as rc:
        job = rc.cluster.engine_set.jobs[0]
        leader = int((home / job.id / "0.pid").read_text())
        keeper = int(Path(f"/proc/{leader}/stat").read_text().rpartition(")")[2].split()[1])
        os.kill(keeper, signal.SIGSTOP)
        for pid in launchers.relatives(leader, "session"):
            os.kill(pid, signal.SIGSTOP)
        (home / job.id / "0.code").write_text("1")
        eventually(lambda: not rc.ids)
        for pid in launchers.relatives(leader, "session"):
            os.kill(pid, signal.SIGKILL)
        os.kill(keeper, signal.SIGKILL)


def test_stop_after_the_submitter_was_killed(fake, ipython_dir):
    home = fake("lsf")
    (home / "shut").write_text("full")
    with Command("cluster", "start", "-n2", "--engines=lsf") as start:
        path = security(ipython_dir) / "cluster-.json"
        eventually(lambda: path.exists() and json.loads(path.read_text()).get("engines"))
        job, = json.loads(path.read_text())["engines"]["sets"]["0"]["jobs"]
        start.stop(signal.SIGKILL)
    assert not (home / job["id"] / "killed").exists() and path.exists()
    eventually(lambda: "are left" in run("cluster", "list").out)
    assert run("cluster", "stop").process.returncode == 0
    assert (home / job["id"] / "killed").exists() and not path.exists()


def test_dry_run(fake, ipython_dir):
    home = fake("lsf")
    shown = run("cluster", "start", "-n8", "--engines=lsf", "--dry-run", "--queue=long", "--engines-per-node=4", "--timelimit=60")
    assert shown.process.returncode == 0, shown.err
    for line in ("#BSUB -n 8", "#BSUB -q long", "#BSUB -W 60", '#BSUB -R "span[ptile=4]"', "# bsub < ", "ipclite.controller"):
        assert line in shown.out, shown.out
    assert not list(home.iterdir()) and not (ipython_dir / "profile_default" / "batch").exists()
    script = ipp.Cluster(n=4, engines="htcondor", controller="slurm").job_script()
    assert "queue 4" in script and "#!/bin/bash" in script
    assert "#SBATCH" in ipp.Cluster(engines="htcondor", controller="slurm").job_script("controller")


def test_connection_information_by_the_environment(fake, ipython_dir):
    """For nodes that do not see our files: in the script, which nobody else can read, never on a command line."""
    fake("lsf")
    with cluster("lsf", 1, send_engines_connection_env=True) as rc:
        job = rc.cluster.engine_set.jobs[0]
        secret = json.loads((security(ipython_dir) / f"ipcontroller-{rc.cluster.cluster_id}-engine.json").read_text())["secret_key"]
        assert secret in Path(job.script).read_text()
        assert rc[0].apply_sync(lambda: "IPP_CONNECTION_INFO" in __import__("os").environ)
        argv = rc[0].apply_sync(lambda: open(f"/proc/{__import__('os').getppid()}/cmdline").read())
        assert secret not in argv


def test_nodes_that_do_not_know_the_name_of_the_submit_host(fake, ipython_dir):
    """The controller listens where nodes reach it, encrypted, and gives its addresses besides its name."""
    fake("lsf")
    with cluster("lsf", 1, cluster_id="x") as rc:
        path = security(ipython_dir) / "ipcontroller-x-client.json"
        info = json.loads(path.read_text())
        assert info["url"].startswith("tcp://") and info["server_key"] and info["location"] == info["host"]
        assert not any(address.startswith("127.") for address in info["addresses"])
        far = {**info, "ipc": "", "host": "no-such-host.invalid", "location": "no-such-host.invalid"}
        with ipp.Client(connection_info={**far, "addresses": ["127.0.0.2", "127.0.0.1"]}) as other:
            assert other.ids == rc.ids
        with pytest.raises(ipp.error.ConnectError, match=r"no-such-host.invalid.*can not be looked up"):
            ipp.Client(connection_info={**far, "addresses": []}, timeout=2)


def test_one_query_for_all_clusters_in_a_list(commands, ipython_dir):
    squeue = ('echo "$PPID $*" >> "$0.log"; [ -e "$(dirname "$0")/gone" ] && s=CANCELLED || s=PENDING; '
              'for i in 201 202; do echo "$i|$s|1||Priority"; done')
    folder = commands(sbatch='n=$(($(cat "$0.count" 2>/dev/null || echo 200) + 1)); echo $n > "$0.count"; echo "Submitted batch job $n"',
                      squeue=squeue, scancel='touch "$(dirname "$0")/gone"')
    def rows():
        return [row for row in json.loads(run("cluster", "list", "--json").out) if row["state"] == "pending"]

    with Command("cluster", "start", "-n1", "--engines=slurm", "--cluster-id=a").says("job 201 is pending") as one, \
            Command("cluster", "start", "-n1", "--engines=slurm", "--cluster-id=b").says("job 202 is pending") as two:
        for starter in (one, two):
            os.kill(starter.pid, signal.SIGSTOP)  # they would ask, too
        (folder / "squeue.log").unlink()
        found = rows()
        asked = [line for line in (folder / "squeue.log").read_text().splitlines()
                 if int(line.split()[0]) not in (one.pid, two.pid)]
        for starter in (one, two):
            os.kill(starter.pid, signal.SIGCONT)
        assert [row["reason"] for row in found] == ["1 of 1 jobs wait; 201: Priority", "1 of 1 jobs wait; 202: Priority"]
        assert len(asked) == 1 and asked[0].endswith("--jobs=201,202"), asked


# ---------------------------------------------------------------- templates, names, custom launchers


def test_a_template_of_ones_own(fake, ipython_dir):
    home = fake("lsf")
    profile = ipython_dir / "profile_default"
    profile.mkdir()
    (profile / "lsf.template").write_text(
        "#!/bin/bash\n#BSUB -q {queue}\n#BSUB -o {output_file}\nexport MINE={mine}\nexec {program_and_args}\n")
    settings = {"LSFEngineSetLauncher": {"batch_template_file": "lsf.template", "queue": "normal", "namespace": {"mine": 7},
                                         "batch_file_name": "my.lsf"}}
    with cluster("lsf", 2, config=settings) as rc:
        assert rc[:].apply_sync(os.getenv, "MINE") == ["7", "7"]
        text = Path("my.lsf").read_text()
        assert text.startswith("#!/bin/bash\n#BSUB -q normal\n#BSUB -o /") and "-n 2" in text
    assert len([path for path in home.iterdir() if path.is_dir()]) == 1


def test_the_example_of_a_launcher_of_ones_own(ipython_dir, tmp_path):
    niceness = 10 + os.getpriority(os.PRIO_PROCESS, 0)
    shown = run(code=[str(ROOT / "examples" / "own_launcher.py")], timeout=60)
    assert (shown.out, shown.err) == (f"niceness of the engines: [{niceness}, {niceness}]\n", "")
    # By its dotted path, and by an entry point; with its setting on the command line, and in the config file.
    made = tmp_path / "yours-1.0.dist-info"
    made.mkdir()
    (made / "METADATA").write_text("Metadata-Version: 2.1\nName: yours\nVersion: 1.0\n")
    (made / "entry_points.txt").write_text("[ipclite.engine_launchers]\nnice = examples.own_launcher:NiceEngineSetLauncher\n")
    env = {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    for words, more in ((["--engines=examples.own_launcher.NiceEngineSetLauncher", "--NiceEngineSetLauncher.niceness=5"], 5),
                        (["--engines=Nice"], 7)):
        with Command("cluster", "start", "-n1", *words, env=env) as start:
            start.says("1 engines are ready")
            with ipp.Client() as rc:
                assert rc[0].apply_sync(os.getpriority, os.PRIO_PROCESS, 0) == niceness - 10 + more
        profile = ipython_dir / "profile_default"
        (profile / "ipcluster_config.py").write_text("c = get_config()\nc.NiceEngineSetLauncher.niceness = 7\n")
    start_fails(["no engine launcher 'nicest'", "choose from local", "nice"], 2, ["--engines=nicest"], env=env)
    start_fails(["unknown section", "did you mean SlurmEngineSetLauncher"], 2, ["--SlurmEngneSetLauncher.queue=x"])


@pytest.mark.parametrize("settings, words", [
    ({"batch_template": "#BSUB -q {quue}\n"}, ["'quue'", "queue", "profile_dir"]),
    ({"batch_template": "#BSUB -n {n"}, ["line 1", "never closed"]),
    ({"batch_template_file": "not-there.template"}, ["not-there.template", "No such file"]),
    ({"qos": "high"}, ["LSF has nothing like 'qos'"]),
    ({"job_id_regexp": "("}, ["job_id_regexp"]),
])
def test_faults_before_anything_is_submitted(fake, settings, words):
    home = fake("lsf")
    with pytest.raises(ConfigError) as caught:
        cluster("lsf", config={"LSFLauncher": settings}).start_and_connect_sync()
    for word in words:
        assert word in str(caught.value)
    assert "job_id_regexp" in settings or not list(home.iterdir())


# ---------------------------------------------------------------- schedulers that fail


def start_fails(words, code=1, flags=(), **options):
    ended = run("cluster", "start", "-n2", *flags, **options)
    return one_sentence(ended, code, *words)


def test_commands_that_are_missing(ipython_dir, monkeypatch):
    monkeypatch.setenv("PATH", "/nonexistent")
    start_fails(["no command 'sbatch'", "submit_command"], flags=["--engines=slurm"])


def test_commands_that_fail(commands):
    commands(sbatch="echo 'sbatch: error: Batch job submission failed: Invalid partition name specified' >&2; exit 1")
    start_fails(["not accepted", "sbatch failed with code 1", "Invalid partition name"], flags=["--engines=slurm"])


def test_a_queue_that_does_not_exist(fake):
    fake("lsf")
    start_fails(["nope: No such queue"], flags=["--engines=lsf", "--queue=nope"])


def test_an_id_that_is_none(commands):
    commands(sbatch="echo thank you very much")
    start_fails(["no job id", "thank you very much", "job_id_regexp"], flags=["--engines=slurm"])


def test_what_is_refused_halfway_is_cancelled(commands):
    folder = commands(
        sbatch='n=$(cat "$0.count" 2>/dev/null || echo 0); echo $((n + 1)) > "$0.count"; '
               '[ $n -lt 2 ] && echo "Submitted batch job 7$n" || { echo "QOSMaxSubmitJobPerUserLimit" >&2; exit 1; }',
        scancel='echo "$@" >> "$0.log"', squeue='[ -e "$(dirname "$0")/scancel.log" ] && s=CANCELLED || s=PENDING; '
                                               'for i in 70 71; do echo "$i|$s|1||None"; done')
    start_fails(["QOSMaxSubmitJobPerUserLimit"], flags=["--engines=slurm", "--engines-per-job=1", "-n3"])
    assert (folder / "scancel.log").read_text() == "70 71\n"


def test_a_submission_is_tried_again_while_the_scheduler_is_away(commands):
    folder = commands(
        sbatch='[ -e "$0.tried" ] || { touch "$0.tried"; echo "Unable to contact slurm controller (connect failure)" >&2; exit 1; }; '
               'echo "sbatch: error: invalid account" >&2; exit 1')
    start_fails(["invalid account"], flags=["--engines=slurm"])
    assert (folder / "sbatch.tried").exists()


def test_a_job_that_is_held(fake):
    home = fake("htcondor")
    with Command("cluster", "start", "-n1", "--engines=htcondor", env={"FAKE_NOTHING": "1"}) as start:
        start.says("1 engines are ready")
    jobs.Scheduler._all.clear()
    (home / "shut").write_text("full")
    with Command("cluster", "start", "-n1", "--engines=htcondor") as start:
        folder = eventually(lambda: home / "902" if (home / "902" / "job.json").exists() else None)
        (folder / "held").write_text("The job exceeded its memory")
        assert start.wait() == 1
        assert "held: The job exceeded its memory" in start.err and "condor_release 902" in start.err
    assert (folder / "killed").exists()


def test_a_job_that_is_gone(fake):
    home = fake("lsf")
    with cluster("lsf", 1) as rc:
        job = rc.cluster.engine_set.jobs[0]
        eventually(lambda: states(rc.cluster) == ["running"])
        pid = int((home / job.id / "0.pid").read_text())
        (home / job.id / "job.json").rename(home / job.id / "forgotten.json")
        eventually(lambda: states(rc.cluster) == ["lost"])
        assert "LSF does not know it any more" in rc.cluster.status()["engines"]["0"]["jobs"][0]["reason"]
        eventually(lambda: not rc.ids)  # nobody else would tell them to end
        eventually(lambda: not launchers.config.process_alive(pid))


def test_a_status_that_is_not_understood_changes_nothing(commands):
    commands(qstat="echo '<job_list state=\"running\"><JB_job_number></job_list>'", qacct="echo jobnumber; exit 1")
    scheduler = jobs.Scheduler.of(launchers.batch.DIALECTS["sge"])
    record = jobs.Record("9", 1, "", "", "x")
    with pytest.raises(LauncherError, match="The output of qstat is not understood.*JB_job_number"):
        scheduler.query([record])
    assert record.status.state == "pending"


def test_a_status_that_can_not_be_had_changes_nothing(commands):
    """The scheduler is away for a while: the jobs are still there."""
    commands(sbatch="echo Submitted batch job 9", scancel=":",
             squeue='echo "slurm_load_jobs error: Unable to contact slurm controller (connect failure)" >&2; exit 1')
    scheduler = jobs.Scheduler.of(launchers.batch.DIALECTS["slurm"])
    record = jobs.Record("9", 1, "", "", "x")
    for _ in range(10):
        with pytest.raises(LauncherError, match="Unable to contact"):
            scheduler.query([record])
    assert record.status.state == "pending"


@pytest.mark.parametrize("kind", KINDS)
def test_a_work_directory_that_is_missing(fake, kind, ipython_dir):
    fake(kind)
    missing = str(ipython_dir.parent / "not-there")
    with pytest.raises(LauncherError, match="not-there does not exist"):
        cluster(kind, config={f"{kind.upper().replace('HTCONDOR', 'HTCondor')}Launcher": {"work_dir": missing}}).start_and_connect_sync()


def test_a_work_directory_that_is_missing_on_the_node(fake, ipython_dir):
    home = fake("lsf")
    there = ipython_dir.parent / "here-only"
    there.mkdir()
    (home / "shut").write_text("full")
    failed = []

    def start():
        try:
            cluster("lsf", config={"LSFLauncher": {"work_dir": str(there)}}).start_and_connect_sync()
        except LauncherError as e:
            failed.append(str(e))

    thread = threading.Thread(target=start)
    thread.start()
    folder = eventually(lambda: home / "901" if (home / "901" / "job.json").exists() else None)
    job = json.loads((folder / "job.json").read_text())
    (folder / "job.json").write_text(json.dumps({**job, "cwd": "/"}))
    there.rmdir()
    (home / "shut").unlink()
    thread.join(30)
    assert failed and "here-only is missing on this node" in failed[0], failed


def test_ctrl_c_while_jobs_are_submitted(fake, ipython_dir):
    home = fake("lsf")
    (home / "shut").write_text("full")
    words = ["-n60", "--engines-per-job=1", "--engines=lsf", "--BatchSystemLauncher.submit_rate=1"]
    with Command("cluster", "start", *words) as start:
        path = security(ipython_dir) / "cluster-.json"
        eventually(lambda: path.exists() and json.loads(path.read_text()).get("engines"))
        assert start.stop(signal.SIGINT) == 128 + signal.SIGINT, start.err
    submitted = [folder for folder in home.iterdir() if folder.is_dir()]
    assert 0 < len(submitted) < 60 and all((folder / "killed").exists() for folder in submitted)


def test_stop_while_a_job_waits(fake):
    home = fake("lsf")
    (home / "shut").write_text("full")
    with Command("cluster", "start", "-n1", "--engines=lsf") as start:
        start.says("job 901 is pending")
        assert run("cluster", "stop").process.returncode == 0
        assert start.wait() == 1
        assert start.err.splitlines()[-1].startswith("ipcluster: ") and "Traceback" not in start.err, start.err


def test_jobs_that_can_not_be_cancelled_are_not_forgotten(fake, ipython_dir):
    home = fake("lsf")
    (home / "shut").write_text("full")
    path = security(ipython_dir) / "cluster-.json"
    with Command("cluster", "start", "-n1", "--engines=lsf") as start:
        start.says("job 901 is pending")
        start.stop(signal.SIGKILL)
    config = ipython_dir / "profile_default" / "ipcluster_config.py"
    config.write_text("c.LSFLauncher.stop_timeout = 0.5\n"
                      "c.LSFLauncher.delete_command = ['sh', '-c', 'echo daemon not responding to $0 >&2; exit 1']\n")
    line = one_sentence(run("cluster", "stop"), 1, "LSF job 901 could not be cancelled", "daemon not responding to 901")
    assert "again" in line and path.exists()
    config.unlink()
    assert run("cluster", "stop").process.returncode == 0
    assert (home / "901" / "killed").exists() and not path.exists()


# ---------------------------------------------------------------- many jobs


def test_a_storm_of_jobs_keeps_to_the_rate_and_is_watched_by_one_query(commands, tmp_path):
    folder = commands(
        sbatch='n=$(($(cat "$0.count" 2>/dev/null || echo 100) + 1)); echo $n > "$0.count"; echo "Submitted batch job $n"',
        squeue='s=RUNNING; [ -e "$(dirname "$0")/scancel.log" ] && s=CANCELLED; '
               'for a in "$@"; do case $a in --jobs=*) for i in $(echo "${a#--jobs=}" | tr , " "); '
               'do echo "$i|$s|1|n1|None"; done;; esac; done',
        scancel='echo "$@" >> "$0.log"')
    rate = 40.0
    launcher = launchers.SlurmEngineSetLauncher(n=50, profile_dir=tmp_path, options={
        "engines_per_job": 1, "submit_rate": rate, "poll_seconds": 0.5})
    begun = time.monotonic()
    launcher.start()
    assert time.monotonic() - begun >= 49 / rate
    assert len({job.id for job in launcher.jobs}) == 50
    eventually(lambda: all(job.status.state == "running" for job in launcher.jobs))
    assert launcher.scheduler.queries < 25  # of all jobs each
    launcher.stop()
    assert len((folder / "scancel.log").read_text().split()) == 50  # by one command
    assert len((folder / "scancel.log").read_text().splitlines()) == 1
    assert launcher.status()["state"] == "cancelled" and not list((tmp_path / "batch").iterdir())
