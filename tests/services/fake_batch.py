"""Batch systems in a hundred lines, for tests: the commands of LSF and of HTCondor, which really run their jobs.

    bsub, condor_submit ──► $FAKE_BATCH/<id>/job.json ──► one keeper per task: waits while the gate is shut, runs, notes
    bjobs, condor_q     ◄── state, exit code, pid    ◄──┘ how it ended

A task is a process of its own session on this host. The file $FAKE_BATCH/shut keeps all tasks waiting, with its text as
the reason; $FAKE_BATCH/<id>/held keeps one. Queues are those of $FAKE_QUEUES (default: normal).
"""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

HOME = Path(os.environ.get("FAKE_BATCH", "/nonexistent"))
KILL_S = 4.0  # between SIGTERM and SIGKILL
LOOK_S = 0.02


def new_job(command, tasks, outputs, env, held="", **more):
    """Note a job of several tasks, start their keepers; returns its id. `held` is why it is not to run, or ""."""
    HOME.mkdir(parents=True, exist_ok=True)
    number = 901
    while True:
        folder = HOME / str(number)
        try:
            folder.mkdir()
            break
        except FileExistsError:
            number += 1
    job = {"id": str(number), "command": command, "env": env, "cwd": os.getcwd(), "outputs": outputs, **more}
    (folder / "job.json").write_text(json.dumps(job))
    if held:
        (folder / "held").write_text(held)
    for task in range(tasks):
        subprocess.Popen([sys.executable, __file__, str(folder), str(task)], stdin=subprocess.DEVNULL,
                         stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    return str(number)


def keep(folder, task):
    """Run one task of a job when it may run, and note how it ended."""
    job = json.loads((folder / "job.json").read_text())
    while (HOME / "shut").exists() or (folder / "held").exists():
        if (folder / "killed").exists():
            return
        time.sleep(LOOK_S)
    if (folder / "killed").exists():
        return
    env = {**os.environ, **{name: value.replace("%J", job["id"]) for name, value in job["env"].items()}}
    output = job["outputs"].replace("$(Process)", str(task)).replace("$(Cluster)", job["id"]).replace("%J", job["id"])
    with open(output or os.devnull, "ab") as log:
        child = subprocess.Popen(job["command"], stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=env, cwd=job["cwd"],
                                 start_new_session=True)
        (folder / f"{task}.pid").write_text(str(child.pid))
        doomed = None
        while child.poll() is None:
            if doomed is None and (folder / "killed").exists():
                doomed = time.monotonic() + KILL_S
                to_all(child.pid, signal.SIGTERM)
            if doomed is not None and time.monotonic() > doomed:
                to_all(child.pid, signal.SIGKILL)
            time.sleep(LOOK_S)
        to_all(child.pid, signal.SIGKILL)  # what it left behind ends with it
    (folder / f"{task}.code").write_text(str(child.returncode))


def to_all(leader, signum):
    """Signal each process of a session, as batch systems do."""
    for name in os.listdir("/proc") if os.path.isdir("/proc/self") else [str(leader)]:
        try:
            if name.isdigit() and os.getsid(int(name)) == leader:
                os.kill(int(name), signum)
        except OSError:
            continue  # it has ended


def load(job_id):
    """(job, folder) or (None, folder) if there is no such job."""
    folder = HOME / job_id
    try:
        return json.loads((folder / "job.json").read_text()), folder
    except OSError:
        return None, folder


def states(folder, tasks):
    """What is known of each task: "waits", "runs", "killed", or its exit code."""
    found = []
    for task in range(tasks):
        code, pid = folder / f"{task}.code", folder / f"{task}.pid"
        if code.exists() and code.read_text():
            found.append("killed" if (folder / "killed").exists() else int(code.read_text()))
        elif pid.exists():
            found.append("runs")
        else:
            found.append("killed" if (folder / "killed").exists() else "waits")
    return found


def fail(text, code=255):
    """Complain as a command does."""
    print(text, file=sys.stderr)
    return code


# ---------------------------------------------------------------- LSF


def bsub(argv):
    """Submit the script on standard input."""
    script = sys.stdin.read()
    words = [word for line in re.findall(r"^#BSUB (.*)$", script, re.MULTILINE) for word in shlex.split(line)] + argv
    options = dict(zip(words[::2], words[1::2]))
    unknown = set(options) - {"-J", "-n", "-o", "-q", "-R", "-P", "-W", "-gpu"}
    if unknown:
        return fail(f"{unknown.pop()}: Illegal option. Job not submitted.")
    queue = options.get("-q", "normal")
    if queue not in os.environ.get("FAKE_QUEUES", "normal").split():
        return fail(f"{queue}: No such queue. Job not submitted.")
    HOME.mkdir(parents=True, exist_ok=True)
    path = HOME / f"script.{os.getpid()}"
    path.write_text(script)
    env = {"LSB_MCPU_HOSTS": f"{socket.gethostname()} {options.get('-n', '1')}", "LSB_JOBID": "%J"}
    job_id = new_job(["/bin/bash", str(path)], 1, options.get("-o", ""), env)
    print(f"Job <{job_id}> is submitted to {'queue' if '-q' in options else 'default queue'} <{queue}>.")
    return 0


def bjobs(argv):
    """Show jobs in the form that we ask for."""
    fields = argv[argv.index("-o") + 1]
    names = fields.replace("delimiter='|'", "").split()
    for job_id in [word for word in argv if word.isdigit()]:
        job, folder = load(job_id)
        if job is None:
            fail(f"Job <{job_id}> is not found")
            continue
        state, shut, held = states(folder, 1)[0], HOME / "shut", folder / "held"
        row = {"jobid": job_id, "stat": "DONE", "exec_host": socket.gethostname()}
        if state == "waits":
            row = {"jobid": job_id, "stat": "PSUSP" if held.exists() else "PEND",
                   "pend_reason": held.read_text() if held.exists() else shut.read_text() if shut.exists() else ""}
        elif state == "runs":
            row["stat"] = "RUN"
        elif state == "killed":
            row.update(stat="EXIT", exit_code="130", exit_reason="TERM_OWNER: job killed by owner")
        elif state:
            row.update(stat="EXIT", exit_code=str(state if state > 0 else 128 - state))
        print("|".join(row.get(name) or "-" for name in names))
    return 0


def bkill(argv):
    """Cancel or signal jobs."""
    signum = int(argv[1]) if argv[:1] == ["-s"] else None
    code = 0
    for job_id in argv[2 if signum else 0:]:
        job, folder = load(job_id)
        if job is None:
            code = fail(f"Job <{job_id}>: No matching job found")
        elif states(folder, 1)[0] not in ("waits", "runs"):
            code = fail(f"Job <{job_id}>: Job has already finished")
        elif signum:
            to_all(int((folder / "0.pid").read_text()), signum)
        else:
            (folder / "killed").touch()
            print(f"Job <{job_id}> is being terminated")
    return code


# ---------------------------------------------------------------- HTCondor


def condor_submit(argv):
    """Submit a description of jobs."""
    lines = [line.partition("#")[0].strip() for line in Path(argv[0]).read_text().splitlines()]
    queue = [line for line in lines if line.split()[:1] == ["queue"]]
    words = {key.strip().lower(): value.strip() for key, equals, value in (line.partition("=") for line in lines) if equals}
    if len(queue) != 1 or "executable" not in words:
        return fail("ERROR: Failed to parse command file (line 1).", 1)
    tasks = int((queue[0].split() + ["1"])[1])
    if words.get("output") != words.get("error"):
        return fail("ERROR: this fake writes both to one file.", 1)
    held = "" if os.access(words["executable"], os.X_OK) else f"Failed to execute '{words['executable']}'"
    job_id = new_job([words["executable"], *shlex.split(words.get("arguments", ""))], tasks, words.get("output", ""), {},
                     held, processes=tasks)
    print(f"Submitting job(s){'.' * tasks}\n{tasks} job(s) submitted to cluster {job_id}.")
    return 0


def _ads(argv, ended):
    """Lines of `-af:t` for those jobs that have, or have not, ended."""
    at = argv.index("-af:t")
    for job_id in argv[:at]:
        job, folder = load(job_id)
        for task, state in enumerate(states(folder, job["processes"]) if job else ()):
            ad = {"ClusterId": job_id, "ProcId": str(task), "JobStatus": {"waits": "1", "runs": "2", "killed": "3"}.get(state, "4")}
            if state == "waits" and (folder / "held").exists():
                ad.update(JobStatus="5", HoldReason=(folder / "held").read_text())
            elif state == "runs":
                ad["RemoteHost"] = f"slot1@{socket.gethostname()}"
            elif state == "killed":
                ad["RemoveReason"] = "via condor_rm (by user ann)"
            elif isinstance(state, int):
                ad.update({"ExitBySignal": "true", "ExitSignal": str(-state)} if state < 0 else
                          {"ExitBySignal": "false", "ExitCode": str(state)})
            if (ad["JobStatus"] in "34") == ended:
                print("\t".join(ad.get(name, "undefined") for name in argv[at + 1:]))
    return 0


def condor_q(argv):
    """Show jobs that wait or run."""
    return _ads(argv, False)


def condor_history(argv):
    """Show jobs that have ended."""
    return _ads(argv, True)


def condor_rm(argv):
    """Remove jobs."""
    code = 0
    for job_id in argv:
        job, folder = load(job_id)
        if job is None:
            code = fail(f"Couldn't find/remove all jobs in cluster {job_id}", 1)
        else:
            (folder / "killed").touch()
            print(f"All jobs in cluster {job_id} have been marked for removal")
    return code


if __name__ == "__main__":
    keep(Path(sys.argv[1]), int(sys.argv[2]))
