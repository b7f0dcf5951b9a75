"""Where tests have their engines: services that are started for them, and for each launcher a place to try it.

    Service ──tests/services/<script> start──► daemons with all they have below a temporary directory
       └── Place ── launcher, settings, environment; the queue; how its jobs are ended from outside

A service takes ports that are free, so that several runs of the tests do not meet. While it runs it is in `QUEUES`, and a
test that leaves a job in its queue fails.
"""

from __future__ import annotations

import contextlib
import functools
import getpass
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Callable, Iterator, NamedTuple

import pytest
from networks import SBIN, SERVICES, an_sshd
from support import MARK, QUEUES, need

import ipclite as ipp

PATIENCE_S = 120
SLURM = ("root", "munged", "slurmctld", "slurmd", "sbatch")
SGE = Path("/usr/lib/gridengine")
TORQUE = Path("/usr/local/lib/torque-commands/bin")


def free_ports(n: int) -> int:
    """The first of `n` ports in a row on which nobody listens."""
    while True:
        first = random.randrange(10_000, 32_000)
        with contextlib.ExitStack() as stack:
            try:
                for port in range(first, first + n):
                    stack.enter_context(socket.create_server(("127.0.0.1", port)))
            except OSError:
                continue
            return first


def output_of(*command: str) -> str:
    """What a command writes to stdout; "" if it fails."""
    return subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
                          timeout=PATIENCE_S).stdout


class Service:
    """What a script of tests/services starts, for as long as the `with` block lasts; its environment is ours then.

    Args:
        script: name of the script.
        needs: commands, or paths of programs, without which it counts as absent; "root" stands for being root.
        port: the environment variable that gives it its ports, and how many these are.
        listing: a command that lists the jobs in the queue, an id at the start of each line.
        titles: so many lines of that are titles.
        delete: the command that ends the job whose id follows.
        settings: more environment variables for the script.
    """

    def __init__(self, script: str, needs: tuple[str, ...], port: tuple[str, int] = ("", 0), listing: tuple[str, ...] = (),
                 titles: int = 0, delete: str = "", **settings: str):
        self.name, self._script, self._needs = script.partition(".")[0], SERVICES / script, needs
        self._port, self._settings = port, settings
        self._listing, self._titles, self._delete = listing, titles, delete

    def __enter__(self) -> "Service":
        need("root" not in self._needs or os.geteuid() == 0, f"root, which {self.name} needs,")
        need(all(shutil.which(word, path=SBIN) for word in self._needs if word != "root"), self.name)
        self.state = Path(tempfile.mkdtemp(prefix=f"ipc-{self.name}-"))
        self.state.chmod(0o755)
        variable, n = self._port
        self._env = {**os.environ, "STATE": str(self.state), **self._settings, **({variable: str(free_ports(n))} if n else {})}
        self._stack = contextlib.ExitStack()
        self._stack.callback(self._stop)
        try:
            self._run("start")
            monkeypatch = self._stack.enter_context(pytest.MonkeyPatch.context())
            for name, value in self.environment().items():
                monkeypatch.setenv(name, value)
        except BaseException:
            self._stack.close()
            raise
        if self._listing:
            QUEUES[self.name] = self
        return self

    def __exit__(self, *exc: Any) -> None:
        QUEUES.pop(self.name, None)
        self._stack.close()

    def _run(self, verb: str) -> None:
        done = subprocess.run([self._script, verb], env=self._env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT, text=True, timeout=PATIENCE_S)
        assert done.returncode == 0, f"{self._script.name} {verb}: {done.stdout}"

    def _stop(self) -> None:
        self._run("stop")
        shutil.rmtree(self.state)

    def environment(self) -> dict[str, str]:
        """What its commands need to find it."""
        text = subprocess.run(["bash", "-c", f'eval "$("{self._script}" env)"; command env -0'], env=self._env, check=True,
                              stdout=subprocess.PIPE, text=True, timeout=PATIENCE_S).stdout
        rows = dict(row.partition("=")[::2] for row in text.split("\0") if row)
        return {name: value for name, value in rows.items() if self._env.get(name) != value and name != "_"}

    def jobs(self) -> list[str]:
        """The ids of jobs that wait or run."""
        return [line.split()[0] for line in output_of(*self._listing).splitlines()[self._titles:] if line.strip()]

    def clear(self) -> None:
        """End all jobs."""
        for job in self.jobs():
            output_of(self._delete, job)


def slurm(**settings: str) -> Service:
    """Slurm with three nodes of four CPUs."""
    return Service("slurm.sh", SLURM, ("SLURM_PORT", 4), ("squeue", "-h", "-o", "%i"), delete="scancel", **settings)


def torque(**settings: str) -> Service:
    """Torque's commands over such a Slurm."""
    return Service("torque.sh", (*SLURM, f"{TORQUE}/qsub.slurm"), ("SLURM_PORT", 4), ("squeue", "-h", "-o", "%i"),
                   delete="scancel", **settings)


def grid_engine(**settings: str) -> Service:
    """Grid Engine with eight slots."""
    return Service("gridengine.sh", ("root", "qconf", "qsub", f"{SGE}/sge_qmaster", f"{SGE}/sge_execd"), ("SGE_PORT", 2),
                   ("qstat", "-u", "*"), titles=2, delete="qdel", **settings)


def mpi(which: str) -> Service:
    """Open MPI or MPICH."""
    return Service("mpi.sh", (f"mpiexec.{which}",), MPI=which)


@contextlib.contextmanager
def fake(commands: str) -> Iterator[None]:
    """The commands of a batch system that can't be had (a folder of tests/services); they really run the jobs."""
    with pytest.MonkeyPatch.context() as monkeypatch, tempfile.TemporaryDirectory(prefix=f"ipc-{commands}-") as home:
        monkeypatch.setenv("FAKE_BATCH", home)
        monkeypatch.setenv("PATH", f"{SERVICES / commands}{os.pathsep}{os.environ['PATH']}")
        yield


@contextlib.contextmanager
def two_hosts() -> Iterator[None]:
    """Two ssh servers, and a home directory whose ~/.ssh calls them node1 and node2."""
    with an_sshd(options=f"SetEnv {MARK}={os.environ[MARK]}") as server, pytest.MonkeyPatch.context() as monkeypatch, \
            tempfile.TemporaryDirectory(prefix="ipc-home-") as home:
        monkeypatch.setenv("HOME", home)
        monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)
        Path(home, ".ssh").mkdir(mode=0o700)
        Path(home, ".ssh/known_hosts").write_text(server.known)
        Path(home, ".ssh/config").write_text(
            "Host node1\n  HostName 127.0.0.1\nHost node2\n  HostName 127.0.0.2\n"
            f"Host *\n  User {getpass.getuser()}\n  Port {server.port}\n  IdentityFile {server.key}\n")
        yield


class Place(NamedTuple):
    """A launcher, and where it is tried.

    `service` starts what it needs; `config` are settings of the cluster; `cancel(cluster)` ends its engines from outside,
    and `says` is in the reason that users are then told. With `is_world` all engines end with the first.
    """

    launcher: str
    service: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext
    config: dict[str, dict[str, Any]] = {}
    cancel: Callable[[Any], None] = lambda cluster: os.kill(cluster.engine_set.process.pid, signal.SIGKILL)
    says: str = "SIGKILL"
    is_world: bool = False

    def cluster(self, n: int = 3, **options: Any) -> ipp.Cluster:
        """A cluster whose engines are here; not yet started."""
        return ipp.Cluster(n=n, engines=self.launcher, config=self.config, **options)


def _kill_agents(cluster: Any) -> None:
    for job in cluster.engine_set.status()["jobs"]:
        os.kill(int(job["id"].rpartition(":")[2]), signal.SIGKILL)


def _delete_with(command: str) -> Callable[[Any], None]:
    def cancel(cluster: Any) -> None:
        for job in cluster.engine_set.status()["jobs"]:
            assert subprocess.run([command, str(job["id"])], timeout=PATIENCE_S).returncode == 0

    return cancel


_SLURM = Place("slurm", slurm, cancel=_delete_with("scancel"), says="cancelled")
PLACES = {
    "local": Place("local"),
    "slurm": _SLURM,
    "slurm-jobs": _SLURM._replace(config={"SlurmEngineSetLauncher": {"engines_per_job": 1}}),
    "slurm-nodes": _SLURM._replace(config={"SlurmEngineSetLauncher": {"engines_per_node": 1}}),
    "sge": Place("sge", grid_engine, cancel=_delete_with("qdel"), says="cancelled"),
    "pbs": Place("pbs", torque, cancel=_delete_with("qdel"), says="has ended"),  # its qstat knows no more
    "lsf": Place("lsf", functools.partial(fake, "fake_lsf"), cancel=_delete_with("bkill"), says="cancelled"),
    "htcondor": Place("htcondor", functools.partial(fake, "fake_condor"), cancel=_delete_with("condor_rm"), says="cancelled"),
    **{name: Place("mpi", functools.partial(mpi, name), {"MPILauncher": {"mpi_cmd": [f"mpiexec.{name}"]}}, is_world=True)
       for name in ("openmpi", "mpich")},
    "ssh": Place("ssh", two_hosts, {"SSHLauncher": {"remote_python": sys.executable},
                                    "SSHEngineSetLauncher": {"engines": {"node1": 1, "node2": 2}}}, cancel=_kill_agents),
}


@contextlib.contextmanager
def running(name: str) -> Iterator[Place]:
    """The place of this name, and what it needs, started."""
    place = PLACES[name]
    with place.service():
        yield place
