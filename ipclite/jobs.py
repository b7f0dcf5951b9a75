"""Jobs of batch systems while they live: submits them, watches them all with one query, deletes them.

    launcher ──submit(script)──► Scheduler ──sbatch, qsub, ...──► Record(id)
             ◄──on_change────── its thread ──squeue, qstat, ...── one query for the jobs of all launchers

Rules that hold here:
- there is one `Scheduler` per kind and process, so that a hundred jobs cost it one query, not a hundred;
- while nothing changes it asks ever less often, up to `poll_s` between two queries;
- a job that the scheduler has forgotten is looked up among the ended ones, and given up as lost only after several looks;
- a command that fails changes no state: it is told and tried again later.
"""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import threading
import time
from typing import Any, Callable, Dict, Iterable, Optional, Sequence, Tuple

from . import batch, config
from .batch import Status
from .errors import LauncherError

FIRST_LOOK_S = 0.3  # between two queries after something has changed ...
SLOWER = 1.4  # ... and how much longer each further pause is
MISSES = 4  # looks in which nobody knows a job, before it is lost
COMMAND_S = 120.0  # what a command of the scheduler may take
SHOWN = 500  # characters of an output that is not understood
ATTEMPTS = 4  # to submit, while the scheduler can't be reached
_PASSING = re.compile(r"unable to contact|connection refused|cannot connect|communication (connection )?failure|"
                      r"temporarily unavailable|is down", re.IGNORECASE)


class Record:
    """One submitted job: what a launcher remembers of it."""

    __slots__ = ("id", "n", "script", "output_file", "tag", "status", "told")

    def __init__(self, id: str, n: int, script: str, output_file: str, tag: str):
        self.id, self.n, self.script, self.output_file, self.tag = id, n, script, output_file, tag
        self.status = Status("pending")
        self.told = False  # has its end been told?

    @property
    def ended(self) -> bool:
        """Has it ended?"""
        return self.status.state in batch.ENDED

    def to_dict(self) -> Dict[str, Any]:
        """What the cluster file holds."""
        return {"id": self.id, "n": self.n, "state": self.status.state, "reason": self.status.reason,
                "nodes": self.status.nodes, "script": self.script, "output_file": self.output_file, "tag": self.tag}

    @classmethod
    def from_dict(cls, state: Dict[str, Any]) -> "Record":
        """The job that `to_dict` described."""
        self = cls(state["id"], state["n"], state["script"], state["output_file"], state["tag"])
        self.status = Status(state["state"], state["reason"], state["nodes"])
        return self


def run(command: Sequence[str], what: str, text: Optional[str] = None, env: Optional[Dict[str, str]] = None,
        cwd: Optional[str] = None) -> "subprocess.CompletedProcess[str]":
    """Run a command of the scheduler and return what came of it, also if it failed.

    Args:
        what: what it is for, as in "submit".
        text: its standard input.

    Raises:
        LauncherError: there is no such command, or it takes longer than `COMMAND_S`.
    """
    try:
        return subprocess.run(list(command), input=text if text is not None else "", stdout=subprocess.PIPE,
                              stderr=subprocess.PIPE, universal_newlines=True, errors="replace", timeout=COMMAND_S,
                              env=env, cwd=cwd)
    except FileNotFoundError as e:
        if cwd is not None and not os.path.isdir(cwd):
            raise LauncherError(f"The work directory {cwd} does not exist; make it, or set work_dir.") from None
        raise LauncherError(f"There is no command {e.filename!r} here to {what} jobs; go to a host from which they are "
                            f"submitted, put it on PATH, or set {what}_command.") from None
    except OSError as e:
        raise LauncherError(f"{command[0]} can't be run to {what} jobs: {e.strerror}.") from None
    except subprocess.TimeoutExpired:
        raise LauncherError(f"{command[0]} has not answered in {COMMAND_S:g} s.") from None


def outcome(done: "subprocess.CompletedProcess[str]") -> str:
    """How a command failed, with what it wrote."""
    said = (done.stderr.strip() or done.stdout.strip() or "it wrote nothing").replace("\n", " ")
    return f"{done.args[0]} failed with code {done.returncode}: {said}"


class Scheduler:
    """The commands of one batch system, and the thread that watches all jobs of this process in it."""

    _all: Dict[Tuple[str, Tuple[str, ...]], "Scheduler"] = {}
    _lock = threading.Lock()

    def __init__(self, dialect: batch.Dialect):
        self.dialect = dialect
        self.poll_s = 3600.0  # until somebody is less patient
        self._watched: Dict[str, Tuple[Record, Callable[[Record], None]]] = {}
        self._misses: Dict[str, int] = {}
        self._asked: Dict[str, Tuple[Status, str]] = {}  # job -> its status as it was listed, and what else was said of it
        self._change = threading.Condition()
        self._hurry = False
        self._thread: Optional[threading.Thread] = None
        self._foreseen: Dict[str, Status] = {}
        self._complaint = ""
        self.queries = 0  # so far

    @classmethod
    def of(cls, dialect: batch.Dialect) -> "Scheduler":
        """The one of this process."""
        with cls._lock:
            key = (dialect.name, dialect.status)
            if key not in cls._all:
                cls._all[key] = cls(dialect)
            return cls._all[key]

    def submit(self, command: Sequence[str], script: str, text: str, env: Dict[str, str], cwd: Optional[str],
               regexp: str = "", group: int = 0) -> str:
        """Submit a script; returns the job's id.

        Raises:
            LauncherError: the command is missing or fails, or names no id.
        """
        words = list(command)
        for attempt in range(ATTEMPTS):
            done = run(words if self.dialect.by_stdin else [*words, script], "submit",
                       text if self.dialect.by_stdin else None, env, cwd)
            if done.returncode == 0 or not _PASSING.search(done.stderr) or attempt == ATTEMPTS - 1:
                break
            config.log("jobs").warning("%s; trying again.", outcome(done))
            time.sleep(2.0 ** attempt)
        if done.returncode != 0:
            raise LauncherError(f"The job was not accepted: {outcome(done)}")
        return batch.parse_job_id(self.dialect, done.stdout + done.stderr if self.dialect.by_stdin else done.stdout,
                                  regexp, group)

    def tell(self, template: Sequence[str], ids: Iterable[str], what: str, **words: str) -> str:
        """Run the delete or signal command for some jobs; returns how it failed, or ""."""
        trouble = ""
        for line in batch.commands(template, ids):
            for key, value in words.items():
                line = [word.replace(f"{{{key}}}", value) for word in line]
            done = run(line, what)
            if done.returncode != 0:
                trouble = outcome(done)
        return trouble

    # ---------------------------------------------------------------- watching

    def watch(self, record: Record, on_change: Callable[[Record], None], at_once: bool = True) -> None:
        """Have `on_change(record)` called, in another thread, whenever its status changes, until it has ended.

        Args:
            at_once: look at once, as nothing is known of it yet.
        """
        with self._change:
            self._watched[record.id] = (record, on_change)
            self._hurry = self._hurry or at_once
            if self._thread is None and self.dialect.status:
                self._thread = threading.Thread(target=self._watch, name=f"watch {self.dialect.name}", daemon=True)
                self._thread.start()
            self._change.notify_all()

    def foresee(self, ids: Sequence[str]) -> None:
        """Ask for jobs of which each will be asked for once more right away, by somebody who does not know of the others."""
        with contextlib.suppress(LauncherError):  # who asks then is told
            self._foreseen = self._find(ids) if ids and self.dialect.status else {}

    def query(self, records: Iterable[Record]) -> None:
        """Ask now for some jobs, and note what is found.

        Raises:
            LauncherError: the command can't be run, or fails.
        """
        wanted = {record.id: record for record in records if not record.ended}
        if not wanted or not self.dialect.status:
            return
        found = {job_id: self._foreseen.pop(job_id) for job_id in wanted if job_id in self._foreseen}
        found = found if len(found) == len(wanted) else self._find(list(wanted))
        for job_id, record in wanted.items():
            status = found.get(job_id)
            if status is None:
                self._misses[job_id] = self._misses.get(job_id, 0) + 1
                if self._misses[job_id] < MISSES:
                    continue
                status = Status("lost", f"{self.dialect.title} does not know it any more", record.status.nodes)
            self._misses.pop(job_id, None)
            if self._asked.get(job_id, (None, ""))[0] != status:
                self._asked[job_id] = (status, self._why(job_id, status))
            record.status = batch.explained(status, self._asked[job_id][1])

    def _find(self, ids: Sequence[str]) -> Dict[str, Status]:
        found = self._ask(self.dialect.status, self.dialect.parse, ids)
        missing = [job_id for job_id in ids if _entry(found, job_id) is None]
        if missing and self.dialect.ended:
            with contextlib.suppress(LauncherError):  # there is no such command: not everybody keeps accounts
                found.update(self._ask(self.dialect.ended, self.dialect.parse_ended, missing))
        return {job_id: status for job_id in ids for status in [_entry(found, job_id)] if status is not None}

    def _why(self, job_id: str, status: Status) -> str:
        """More about a job that has just come to this state, from schedulers whose list does not tell it."""
        if not self.dialect.why or status.state != self.dialect.why_of:
            return ""
        try:
            return self.dialect.parse_why(run(batch.commands(self.dialect.why, [job_id])[0], "watch").stdout)
        except LauncherError:
            return ""

    def _ask(self, template: Sequence[str], parse: Callable[[str], Dict[str, Status]],
             ids: Sequence[str]) -> Dict[str, Status]:
        """What one command says; the ids that are not known make it fail, so a failure counts only if nothing is said
        about ids."""
        found: Dict[str, Status] = {}
        for line in batch.commands(template, ids):
            self.queries += 1
            done = run(line, "watch")
            try:
                found.update(parse(done.stdout))
            except (ValueError, LookupError) as e:
                raise LauncherError(f"The output of {line[0]} is not understood ({type(e).__name__}: {e}): "
                                    f"{done.stdout[:SHOWN]}") from None
            if done.returncode != 0 and not found and _PASSING.search(done.stderr):
                raise LauncherError(outcome(done))
        return found

    def _watch(self) -> None:
        pause = FIRST_LOOK_S if self._hurry else self.poll_s  # nobody asks twice who only wants to list jobs
        while True:
            with self._change:
                if self._change.wait_for(lambda: self._hurry, pause):
                    pause, self._hurry = FIRST_LOOK_S, False
                watched = list(self._watched.values())
                if not watched:
                    self._thread = None
                    return
            before = [record.status for record, _ in watched]
            try:
                self.query([record for record, _ in watched])
                self._complaint = ""
            except LauncherError as e:
                if str(e) != self._complaint:
                    config.log("jobs").warning("%s The states of jobs are not known for now.", e)
                    self._complaint = str(e)
            changed = [pair for pair, status in zip(watched, before) if pair[0].status != status]
            with self._change:
                for record, _ in watched:
                    if record.ended and self._watched.get(record.id, (None,))[0] is record:
                        del self._watched[record.id]
            for record, on_change in changed:
                try:
                    on_change(record)
                except Exception:
                    config.log("jobs").exception("What %s job %s has come to could not be told.", self.dialect.title, record.id)
            pause = FIRST_LOOK_S if changed else min(pause * SLOWER, self.poll_s)
            time.sleep(FIRST_LOOK_S)  # however much is going on


def _entry(found: Dict[str, Status], job_id: str) -> Optional[Status]:
    """The status of a job; schedulers add and leave out the name of their server."""
    if job_id in found:
        return found[job_id]
    short = job_id.partition(".")[0]
    return next((status for other, status in found.items() if other.partition(".")[0] == short), None)
