"""Job scripts and what schedulers say are text: golden files for what is rendered, real outputs for what is parsed.

`REWRITE_GOLDEN=1 pytest tests/unit/test_batch.py` writes the golden files anew; read the difference before you commit it.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from support import need

from ipclite import batch
from ipclite.batch import DIALECTS, Job, Status
from ipclite.errors import ConfigError, LauncherError

GOLDEN = Path(__file__).parent / "batch"
NAMED = [name for name in DIALECTS if name != "batch"]
ENGINES = Job(
    role="engine", command=["/usr/py thon/bin/python", "-m", "package.engine", "--timeout=60"],
    profile_dir="/home/ann/.ipython/profile_hpc", cluster_id="c1", n=8, name="ipengine-c1",
    script="/home/ann/.ipython/profile_hpc/batch/job", output_file="/home/ann/.ipython/profile_hpc/log/job.log",
    work_dir="/scratch/ann", environment={"IPP_CLUSTER_ID": "c1", "NAME": "it's"})
EVERYTHING = {"n": 8, "nodes": 2, "engines_per_node": 4, "queue": "long", "account": "phys42", "qos": "high",
              "timelimit": "02:00:00", "memory": "16G", "gpus": "2", "constraint": "skylake", "parallel_environment": "smp",
              "prologue": "module load python", "options": ["first option", "second"], "must_enter": True}
NOT_HAD = {"pbs": ("qos",), "sge": ("qos",), "lsf": ("qos",), "htcondor": ("queue", "qos")}
CASES = {
    "plain": {"parallel_environment": "smp"},
    "everything": EVERYTHING,
    "controller": {"role": "controller", "n": 1, "nodes": 1, "engines_per_node": 1, "name": "ipcontroller", "queue": "short",
                   "command": ["/usr/bin/python3", "-m", "package.controller", "--ip=*"]},
}


def case_of(name, case):
    more = {key: value for key, value in CASES[case].items() if key not in NOT_HAD.get(name, ())}
    return ENGINES._replace(**more)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", NAMED)
def test_golden(name, case):
    job = case_of(name, case)
    text = batch.render(DIALECTS[name], job)
    more = batch.companion(DIALECTS[name], job)
    text += f"---- {job.script}.sh\n{more}" if more else ""
    path = GOLDEN / f"{name}-{case}.txt"
    if os.environ.get("REWRITE_GOLDEN"):
        path.write_text(text)
    assert text == path.read_text()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", NAMED)
def test_scripts_are_shell(name, case):
    job = case_of(name, case)
    text = batch.companion(DIALECTS[name], job) or batch.render(DIALECTS[name], job)
    done = subprocess.run(["bash", "-n"], input=text, capture_output=True, text=True, timeout=20)
    assert done.returncode == 0 and not done.stderr, done.stderr


SRUN = 'while [ "$1" != /bin/bash ]; do shift; done; for SLURM_NODEID in 0 1 2; do export SLURM_NODEID; "$@"; done'
PBSDSH = 'echo "at $2" >>"$LOG"; shift 3; exec "$@"'
BLAUNCH = 'echo "at $1" >>"$LOG"; shift; exec "$@"'


@pytest.mark.parametrize("name, fakes, env, said", [
    ("slurm", {"srun": SRUN}, {"SLURM_JOB_NUM_NODES": "3", "SLURM_TASKS_PER_NODE": "4(x2),2"},
     ["agent -n 2", "agent -n 4", "agent -n 4"]),
    ("slurm", {"srun": SRUN}, {"SLURM_JOB_NUM_NODES": "3", "SLURM_TASKS_PER_NODE": "1,3,6"},
     ["agent -n 1", "agent -n 3", "agent -n 6"]),
    ("pbs", {"pbsdsh": PBSDSH}, {"HOSTS": "n1 n1 n1 n2 n3 n3"}, ["agent -n 1", "agent -n 2", "agent -n 3", "at 0", "at 3", "at 4"]),
    ("torque", {"pbsdsh": PBSDSH}, {"HOSTS": "n1 n1"}, ["agent -n 10"]),
    ("torque", {}, {"HOSTS": ""}, ["agent -n 10"]),
    ("lsf", {"blaunch": BLAUNCH}, {"LSB_MCPU_HOSTS": "hostA 4 hostB 6"}, ["agent -n 4", "agent -n 6", "at hostA", "at hostB"]),
    ("lsf", {}, {"LSB_MCPU_HOSTS": "hostA 10"}, ["agent -n 10"]),
    ("sge", {}, {}, ["agent -n 1"]),
])
def test_one_agent_is_started_on_each_node(name, fakes, env, said, tmp_path):
    (tmp_path / "bin").mkdir()
    for command, text in {**fakes, "engine": 'echo "agent $*" >>"$LOG"'}.items():
        (tmp_path / "bin" / command).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / "bin" / command).chmod(0o755)
    (tmp_path / "nodes").write_text("".join(f"{host}\n" for host in env.get("HOSTS", "").split()))
    job = ENGINES._replace(command=["engine"], n=10, script=str(tmp_path / "job"), work_dir="")
    (tmp_path / "job").write_text(batch.render(DIALECTS[name], job))
    done = subprocess.run(["bash", str(tmp_path / "job")], capture_output=True, text=True, timeout=20, env={
        **env, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "LOG": str(tmp_path / "log"),
        "PBS_NODEFILE": str(tmp_path / "nodes")})
    assert (done.returncode, done.stderr) == (0, "")
    assert sorted((tmp_path / "log").read_text().splitlines()) == said


@pytest.mark.parametrize("case", CASES)
def test_condor_reads_what_we_write(case, monkeypatch):
    """Its own parser understands the submit file as we mean it."""
    monkeypatch.setenv("CONDOR_CONFIG", os.devnull)
    try:
        import htcondor2
    except ImportError:
        htcondor2 = None
    need(htcondor2, "the package htcondor")
    job = case_of("htcondor", case)._replace(options=["nice_user = True"] if case == "everything" else [])
    read = htcondor2.Submit(batch.render(DIALECTS["htcondor"], job))
    per_task = job.engines_per_node or 1
    assert read["executable"] == job.script + ".sh" and read["request_cpus"] == str(per_task)
    assert read.getQArgs() == str(job.n // per_task)
    assert read.expand("output") == read.expand("error") == job.output_file + ".0"
    if case == "everything":
        assert (read["request_memory"], read["request_gpus"], read["requirements"]) == ("16G", "2", "skylake")
        assert (read["accounting_group"], read["allowed_job_duration"], read["nice_user"]) == ("phys42", "7200", "True")


@pytest.mark.parametrize("name", NAMED)
def test_what_a_scheduler_does_not_have_is_an_error(name):
    for key in ("queue", "account", "qos", "timelimit", "memory", "gpus", "constraint"):
        job = ENGINES._replace(**{key: "something"})
        if key in NOT_HAD.get(name, ()):
            with pytest.raises(ConfigError, match=f"nothing like '{key}'"):
                batch.render(DIALECTS[name], job)
        else:
            assert "something" in batch.render(DIALECTS[name], job)


# ---------------------------------------------------------------- templates

# The templates of IPython Parallel's documentation, as its users have them in their files.
ENGINE_TEMPLATE = """\
#PBS -N ipython
#PBS -j oe
#PBS -l walltime=00:10:00
#PBS -l nodes={n//4}:ppn=4
#PBS -q {queue}

cd $PBS_O_WORKDIR
export PATH=$HOME/usr/local/bin
/usr/local/bin/mpiexec -n {n} ipengine --profile-dir={profile_dir}
"""
CONTROLLER_TEMPLATE = """\
#PBS -N ipython
#PBS -j oe
#PBS -l walltime=00:10:00
#PBS -l nodes=1:ppn=1
#PBS -q {queue}

cd $PBS_O_WORKDIR
export PATH=$HOME/usr/local/bin
ipcontroller --profile-dir={profile_dir}
"""


def test_templates_of_the_documentation():
    job = ENGINES._replace(n=128, queue="veryshort.q", template=ENGINE_TEMPLATE, memory="ignored by templates", prologue="x")
    expected = (ENGINE_TEMPLATE.replace("{n//4}", "32").replace("{n}", "128").replace("{queue}", "veryshort.q")
                .replace("{profile_dir}", job.profile_dir))
    for name in DIALECTS:
        assert batch.render(DIALECTS[name], job) == expected
        assert batch.companion(DIALECTS[name], job) == ""
    job = job._replace(role="controller", n=1, template=CONTROLLER_TEMPLATE)
    assert batch.render(DIALECTS["pbs"], job) == CONTROLLER_TEMPLATE.replace("{queue}", "veryshort.q").replace(
        "{profile_dir}", job.profile_dir)


@pytest.mark.parametrize("template, text", [
    ("{n} {n//3} {n/3:.2f} {n%3} {-n} {(n+1)*2} {min(n, 5)} {max(n,50)}", "8 2 2.67 2 -8 18 5 50"),
    ("{n:03d}|{queue!r}|{queue:>6}|{str(n) + queue}", "008|'q'|     q|8q"),
    ("{'few' if n < 10 else 'many'} {n != 8}", "few False"),
    ("$HOME ${HOME} ${X:-${Y:-1}} ${#a[@]} ${a//x/y} ${{HOME}} {{n}} $${{n}}",
     "$HOME ${HOME} ${X:-${Y:-1}} ${#a[@]} ${a//x/y} ${HOME} {n} $${n}"),
    ("awk '{{print $1}}' {mine}", "awk '{print $1}' 7"),
    ("{cluster_id} {program_args}", "c1 -m package.engine --timeout=60 -n 8"),
    ("{program} {program_and_args}", "'/usr/py thon/bin/python' '/usr/py thon/bin/python' -m package.engine --timeout=60 -n 8"),
    ("{environment_json}", """{"IPP_CLUSTER_ID": "c1", "NAME": "it's"}"""),
    ("{output_file} {account}{qos}{timelimit}", "/home/ann/.ipython/profile_hpc/log/job.log "),
    ("", ""),
])
def test_fields(template, text):
    job = ENGINES._replace(queue="q", namespace={"mine": 7}, template=template or " ")
    assert batch.render(DIALECTS["slurm"], job) == (text or " ")


@pytest.mark.parametrize("template, words", [
    ("#PBS -q {quue}", ["line 1", "'quue'", "queue", "profile_dir", "mine"]),
    ("\n\n{n", ["line 3", "never closed"]),
    ("}", ["closes nothing", "doubled"]),
    ("{}", ["no field"]),
    ("awk '{print $1}'", ["{print $1}", "no arithmetic", "{{ }}"]),
    ("{n.__class__}", ["no arithmetic"]),
    ("{n[0]}", ["no arithmetic"]),
    ("{n**n}", ["no arithmetic"]),
    ("{(lambda: 1)()}", ["no arithmetic"]),
    ("{open(queue)}", ["'open'"]),
    ("{__import__('os')}", ["'__import__'"]),
    ("{n // 0}", ["can't be computed", "zero"]),
    ("{n + queue}", ["can't be computed"]),
])
def test_faulty_templates(template, words):
    with pytest.raises(ConfigError) as caught:
        batch.render(DIALECTS["pbs"], ENGINES._replace(template=template, namespace={"mine": 7}))
    for word in words:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------- sizes and ids


@pytest.mark.parametrize("sizes, jobs", [
    ((4,), [(4, 0, 0)]),
    ((10, 4), [(4, 0, 0), (4, 0, 0), (2, 0, 0)]),
    ((10, 0, 4), [(8, 2, 4), (2, 1, 2)]),
    ((10, 8, 4), [(8, 2, 4), (2, 1, 2)]),
    ((3, 0, 4), [(3, 1, 3)]),
    ((7, 3, 2), [(2, 1, 2), (1, 1, 1), (2, 1, 2), (1, 1, 1), (1, 1, 1)]),
])
def test_plan(sizes, jobs):
    assert batch.plan(*sizes) == jobs
    assert sum(job[0] for job in jobs) == sizes[0]


@pytest.mark.parametrize("size, parts, share", [("16G", 4, "4096M"), ("1gb", 3, "341M"), ("100", 4, "100"), ("3G", 1, "3G"),
                                                ("lots", 2, "lots"), ("512M", 2, "256M")])
def test_share_of_memory(size, parts, share):
    assert batch.share_of(size, parts) == share


@pytest.mark.parametrize("name, said, job_id", [
    ("slurm", "Submitted batch job 4711\n", "4711"),
    ("slurm", "sbatch: Priority is 2\nSubmitted batch job 4711 on cluster big\n", "4711"),
    ("pbs", "1234.pbs01.example.org\n", "1234.pbs01.example.org"),
    ("pbs", "1235[].pbs01\n", "1235[].pbs01"),
    ("torque", "17\n", "17"),
    ("sge", 'Your job 7 ("ipcontroller") has been submitted\n', "7"),
    ("sge", 'warning: 2 slots\nYour job-array 8.1-4:1 ("ipengine") has been submitted\n', "8"),
    ("lsf", "Job <930> is submitted to default queue <normal>.\n", "930"),
    ("htcondor", "Submitting job(s)....\n4 job(s) submitted to cluster 2319.\n", "2319"),
])
def test_job_ids(name, said, job_id):
    assert batch.parse_job_id(DIALECTS[name], said) == job_id


def test_job_ids_of_ones_own():
    assert batch.parse_job_id(DIALECTS["pbs"], "taken as job-77 today", r"job-(\d+)", 1) == "77"
    with pytest.raises(LauncherError, match="no job id.*It was: thank you"):
        batch.parse_job_id(DIALECTS["slurm"], "thank you\n")
    for regexp, group in (("(", 0), (r"\d+", 2)):
        with pytest.raises(ConfigError, match="job_id_regexp"):
            batch.check_regexp(regexp, group)


def test_commands():
    assert batch.commands(("qdel", "IDS"), ["1", "2"]) == [["qdel", "1", "2"]]
    assert batch.commands(("squeue", "--jobs={ids}"), ["1", "2"]) == [["squeue", "--jobs=1,2"]]
    assert batch.commands(("qacct", "-j", "{id}"), ["1", "2"]) == [["qacct", "-j", "1"], ["qacct", "-j", "2"]]


# ---------------------------------------------------------------- states

SQUEUE = """\
15|PENDING|1||Nodes required for job are DOWN, DRAINED or reserved for jobs in higher priority partitions
16|PENDING|1||Priority
17|PENDING|1||JobHeldUser
3|RUNNING|2|node[1-2]|None
1|COMPLETED|2|node[1-2]|None
6|FAILED|1|node1|NonZeroExitCode
7|CANCELLED|1|node1|None
8|TIMEOUT|1|node1|TimeLimit
9|PREEMPTED|1|node2|None
10|NODE_FAIL|1|node2|None
11|OUT_OF_MEMORY|1|node2|OutOfMemory
12|COMPLETING|1|node2|None
"""
SACCT = """\
6|FAILED|127:0|node1
7|CANCELLED by 1000|0:0|node1
8|TIMEOUT|0:0|node1
1|COMPLETED|0:0|node[1-2]
"""
QSTAT_PBS = """\
Job Id: 1234.pbs01
    Job_Name = ipengine
    Job_Owner = ann@login1
    job_state = Q
    queue = workq
    comment = Not Running: Insufficient amount of resource: ncpus (R: 64 A: 16
\t T: 16)
    Variable_List = PBS_O_HOME=/home/ann,PBS_O_LANG=en_US.UTF-8,
\tPBS_O_WORKDIR=/home/ann

Job Id: 1235.pbs01
    Job_Name = ipengine
    job_state = R
    exec_host = node01/0*4+node02/0*4
    comment = Job run at Mon Nov 23 at 10:00 on (node01:ncpus=4)+(node02:ncpus=4)

Job Id: 1236.pbs01
    job_state = H
    Hold_Types = u
    comment = Job held by ann on Mon Nov 23 10:01:02 2026

Job Id: 1237.pbs01
    job_state = F
    Exit_status = 0
    comment = Job run at Mon Nov 23 at 09:00 on (node01:ncpus=1) and finished

Job Id: 1238.pbs01
    job_state = F
    Exit_status = 271
    comment = Job run at Mon Nov 23 at 09:00 on (node01:ncpus=1) and terminated

Job Id: 1239.pbs01
    job_state = F
    Exit_status = -29
    comment = Job run at Mon Nov 23 at 09:00 on (node01:ncpus=1) and exceeded resource walltime

Job Id: 1240.pbs01
    job_state = F
    Exit_status = 127
"""
# Torque's commands over Slurm: a tab begins attributes, not the rest of a folded line.
QSTAT_SLURM = """\
Job Id:\t7
\tJob_Name = ipengine
\tjob_state = R
\texec_host = node1/2
\tResource_List.ncpus = 2

Job Id:\t8
\tJob_Name = ipengine
\tjob_state = C
\texec_host = node2/2
"""
QSTAT_TORQUE_XML = ("<Data><Job><Job_Id>55.server</Job_Id><Job_Name>ipengine</Job_Name><job_state>C</job_state>"
                    "<exec_host>n1/0+n1/1+n2/0</exec_host><exit_status>1</exit_status></Job></Data>")
QSTAT_SGE = """\
<?xml version='1.0'?>
<job_info  xmlns:xsd="http://arc.liv.ac.uk/repos/darcs/sge/source/dist/util/resources/schemas/qstat/qstat.xsd">
  <queue_info>
    <job_list state="running">
      <JB_job_number>4</JB_job_number>
      <JAT_prio>0.55500</JAT_prio>
      <JB_name>ipengine</JB_name>
      <JB_owner>ann</JB_owner>
      <state>r</state>
      <JAT_start_time>2026-11-23T22:00:00</JAT_start_time>
      <queue_name>main.q@node7</queue_name>
      <slots>1</slots>
      <tasks>1</tasks>
    </job_list>
  </queue_info>
  <job_info>
    <job_list state="pending">
      <JB_job_number>4</JB_job_number>
      <state>qw</state>
      <queue_name></queue_name>
      <tasks>2</tasks>
    </job_list>
    <job_list state="pending">
      <JB_job_number>5</JB_job_number>
      <state>hqw</state>
      <queue_name></queue_name>
    </job_list>
    <job_list state="pending">
      <JB_job_number>6</JB_job_number>
      <state>Eqw</state>
      <queue_name></queue_name>
    </job_list>
    <job_list state="pending">
      <JB_job_number>7</JB_job_number>
      <state>qw</state>
      <queue_name></queue_name>
    </job_list>
  </job_info>
</job_info>
"""
QACCT = """\
==============================================================
qname        main.q
hostname     node7
owner        ann
jobname      ipengine
jobnumber    9
taskid       1
failed       0
exit_status  0
ru_wallclock 3s
==============================================================
qname        main.q
hostname     node8
jobnumber    9
taskid       2
failed       100 : assumedly after job
exit_status  137                  (Killed)
==============================================================
qname        main.q
hostname     node7
jobnumber    10
failed       0
exit_status  127
==============================================================
qname        main.q
hostname     node7
jobnumber    11
failed       26  : opening input/output file
exit_status  0
"""
BJOBS = """\
930|PEND|-|-|-|New job is waiting for scheduling;
931|RUN|-|4*hostA:4*hostB|-|-
932|DONE|-|hostA|-|-
933|EXIT|127|hostA|-|-
934|EXIT|130|hostA|TERM_OWNER: job killed by owner|-
935|EXIT|140|hostA|TERM_RUNLIMIT: job killed after reaching LSF run time limit|-
936|PSUSP|-|-|-|The job was suspended by the user while pending;
937|UNKWN|-|hostA|-|-
"""
CONDOR = """\
2319\t2\tundefined\tundefined\tundefined\tslot1@node1.example.org\tundefined\tundefined
2319\t1\tundefined\tundefined\tundefined\tundefined\tundefined\tundefined
2320\t1\tundefined\tundefined\tundefined\tundefined\tundefined\tundefined
2321\t5\tundefined\tundefined\tundefined\tundefined\tFailed to execute '/x': No such file or directory\tundefined
2322\t4\t0\tfalse\tundefined\tundefined\tundefined\tundefined
2323\t4\t1\tfalse\tundefined\tundefined\tundefined\tundefined
2324\t4\tundefined\ttrue\t9\tundefined\tundefined\tundefined
2325\t3\tundefined\tundefined\tundefined\tundefined\tundefined\tvia condor_rm (by user ann)
"""


@pytest.mark.parametrize("parse, text, expected", [
    (batch.parse_squeue, SQUEUE, {
        "15": Status("pending", "Nodes required for job are DOWN, DRAINED or reserved for jobs in higher priority partitions"),
        "16": Status("pending", "Priority"), "17": Status("pending", "held: JobHeldUser"),
        "3": Status("running", "", "node[1-2]"), "1": Status("done", "", "node[1-2]"),
        "6": Status("failed", "NonZeroExitCode", "node1"), "7": Status("cancelled", "", "node1"),
        "8": Status("failed", "it reached its time limit (TimeLimit)", "node1"),
        "9": Status("failed", "it was preempted", "node2"), "10": Status("failed", "a node failed", "node2"),
        "11": Status("failed", "it ran out of memory (OutOfMemory)", "node2"), "12": Status("running", "", "node2")}),
    (batch.parse_squeue, "slurm_load_jobs error: Invalid job id specified\n", {}),
    (batch.parse_sacct, SACCT, {
        "6": Status("failed", "exit code 127", "node1"), "7": Status("cancelled", "", "node1"),
        "8": Status("failed", "it reached its time limit", "node1"), "1": Status("done", "", "node[1-2]")}),
    (batch.parse_pbs, QSTAT_PBS, {
        "1234.pbs01": Status("pending", "Not Running: Insufficient amount of resource: ncpus (R: 64 A: 16 T: 16)"),
        "1235.pbs01": Status("running", "", "node01,node02"),
        "1236.pbs01": Status("pending", "held: Job held by ann on Mon Nov 23 10:01:02 2026"),
        "1237.pbs01": Status("done"), "1238.pbs01": Status("cancelled", "deleted"),
        "1239.pbs01": Status("failed", "it reached its time limit"), "1240.pbs01": Status("failed", "exit code 127")}),
    (batch.parse_pbs, QSTAT_SLURM, {"7": Status("running", "", "node1"), "8": Status("done", "", "node2")}),
    (batch.parse_pbs, QSTAT_TORQUE_XML, {"55.server": Status("failed", "exit code 1", "n1,n2")}),
    (batch.parse_sge, QSTAT_SGE, {
        "4": Status("running", "", "node7"), "5": Status("pending", "held: state hqw"),
        "6": Status("pending", "held: error state Eqw"), "7": Status("pending")}),
    (batch.parse_qacct, QACCT, {
        "9": Status("cancelled", "assumedly after job", "node7,node8"), "10": Status("failed", "exit code 127", "node7"),
        "11": Status("failed", "opening input/output file", "node7")}),
    (batch.parse_bjobs, BJOBS, {
        "930": Status("pending", "New job is waiting for scheduling;"), "931": Status("running", "", "hostA,hostB"),
        "932": Status("done", "", "hostA"), "933": Status("failed", "exit code 127", "hostA"),
        "934": Status("cancelled", "TERM_OWNER: job killed by owner", "hostA"),
        "935": Status("failed", "TERM_RUNLIMIT: job killed after reaching LSF run time limit", "hostA"),
        "936": Status("pending", "held: The job was suspended by the user while pending;"),
        "937": Status("running", "its host does not answer", "hostA")}),
    (batch.parse_condor, CONDOR, {
        "2319": Status("running", "", "node1.example.org"), "2320": Status("pending"),
        "2321": Status("pending", "held: Failed to execute '/x': No such file or directory"), "2322": Status("done"),
        "2323": Status("failed", "exit code 1"), "2324": Status("failed", "killed by signal 9"),
        "2325": Status("cancelled", "via condor_rm (by user ann)")}),
], ids=lambda value: getattr(value, "__name__", ""))
def test_states(parse, text, expected):
    assert parse(text) == expected
    assert parse("") == {}


QSTAT_J = """\
==============================================================
job_number:                 6
stdout_path_list:           NONE:NONE:/nonexistent/y.log
job-array tasks:            1-2:1
binding:                    NONE
error reason          1:      11/23/2026 23:00:53 [0:22407]: error: can't open output file "/nonexistent/y.log": No such file or directory
error reason          2:      11/23/2026 23:00:54 [0:22406]: error: can't open output file "/nonexistent/y.log": No such file or directory
scheduling info:            Job is in error state
"""
QSTAT_J_WAITS = """\
job_number:                 7
scheduling info:            queue instance "main.q@node7" dropped because it is full
                            All queues dropped because of overload or full
"""


@pytest.mark.parametrize("parse, text, why", [
    (batch.parse_scontrol, "JobId=16 JobState=FAILED Reason=NonZeroExitCode ExitCode=3:0 DerivedExitCode=0:0", "exit code 3"),
    (batch.parse_scontrol, "JobId=17 JobState=FAILED ExitCode=0:9", "killed by signal 9"),
    (batch.parse_scontrol, "JobId=18 ExitCode=0:0", ""),
    (batch.parse_scontrol, "slurm_load_jobs error: Invalid job id specified", ""),
    (batch.parse_qstat_j, QSTAT_J, 'error: can\'t open output file "/nonexistent/y.log": No such file or directory'),
    (batch.parse_qstat_j, QSTAT_J_WAITS,
     'queue instance "main.q@node7" dropped because it is full; All queues dropped because of overload or full'),
    (batch.parse_qstat_j, "", ""),
])
def test_why(parse, text, why):
    assert parse(text) == why


def test_explained():
    assert batch.explained(Status("failed", "NonZeroExitCode"), "exit code 3").reason == "exit code 3"
    assert batch.explained(Status("pending"), "full").reason == "full"
    assert batch.explained(Status("pending", "held: state Eqw"), "no directory").reason == "held: state Eqw: no directory"
    assert batch.explained(Status("running", "suspended"), "").reason == "suspended"


def test_states_of_several_tasks():
    waits, runs, fails, done = (Status(state, state) for state in ("pending", "running", "failed", "done"))
    assert batch.combined([waits, runs, done]).state == "running"
    assert batch.combined([waits, done]).state == "pending"
    assert batch.combined([fails, done]) == Status("failed", "failed")
    assert batch.combined([done, done]).state == "done"
    assert batch.combined([]).state == "lost"


@pytest.mark.parametrize("name, text, seconds", [
    ("slurm", "90", 5400), ("slurm", "10:30", 630), ("slurm", "1:00:00", 3600), ("slurm", "2-1", 176400),
    ("slurm", "1-0:30", 88200), ("pbs", "90", 90), ("torque", "01:30:00", 5400), ("sge", "600", 600),
    ("lsf", "90", 5400), ("lsf", "1:30", 5400), ("lsf", "1:30:00", 0), ("htcondor", "7200", 7200),
    ("slurm", "UNLIMITED", 0), ("pbs", "", 0), ("slurm", "a-1", 0)])
def test_time_limits(name, text, seconds):
    assert batch.seconds_of(DIALECTS[name], text) == seconds
