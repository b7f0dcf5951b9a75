"""Starts and stops processes: a controller, or a set of engines.

    Cluster ──start, stop, signal──► launcher ──Popen──► python -m <package>.controller
            ◄──on_stop, poll, get_output──            └► python -m <package>.engine -n N, the agent that forks N engines

A launcher lives through `before` ──start──► `running` ──stop, or the process ends──► `after`. What `to_dict` returns
goes into the cluster file; from it `from_dict` makes, in another process, a launcher that can stop what is running.

Rules that hold here:
- a process is its pid and its start time, so that a recycled pid is never signalled;
- what a launcher started is a session of its own: Ctrl-C in a terminal reaches only who started it;
- an owned process gets `--parent` and ends with us; a detached one outlives us;
- roles are named, never imported.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, Callable, Dict, Iterable, Iterator, List, NamedTuple, Optional, Tuple, Type, Union

from . import batch, config, hosts, jobs
from .errors import ConfigError, ConnectionFileError, LauncherError, NotRunning, UserError

POLL_S = 0.02  # between two looks at a process that is not our child
STOP_LOOK_S = 0.2  # between two looks whether jobs that are cancelled are gone
TAIL_BYTES = 64 * 1024
WORDS_MAX = 500  # characters of what mpiexec said last
# Lines that tell why ranks ended: of ours, MPICH, Slurm; and the box in which Open MPI tells it, of which the first paragraph
# says enough, unless it announces another one.
MPI_CAUSE = re.compile(r"(?:^ip\w+: |\[ip\w+\] ERROR: |^(?=Abort\(|srun: error: |YOUR APPLICATION TERMINATED))(.+?)(?:; the end of .*)?$")
MPI_BOX = re.compile(r"^-{40,}\n(.+?(?::\n\n.+?)?)\n(?:\n|-{40,}$)", re.MULTILINE | re.DOTALL)
StopCallback = Callable[[Dict[str, Any]], Any]


class Process(NamedTuple):
    """A process on this host. `popen` is there if it is our child."""

    pid: int
    started: Optional[str]
    popen: Optional["subprocess.Popen[bytes]"] = None

    def poll(self) -> Tuple[bool, Optional[int]]:
        """(is it running, its exit code if it ended as our child)"""
        if self.popen is not None:
            code = self.popen.poll()
            return code is None, code
        return config.process_alive(self.pid, self.started), None

    def wait(self, timeout_s: Optional[float] = None) -> bool:
        """True once it has ended, False if it still runs after `timeout_s`."""
        if self.popen is not None:
            try:
                self.popen.wait(timeout_s)
            except subprocess.TimeoutExpired:
                return False
            return True
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while self.poll()[0]:
            if deadline is not None and time.monotonic() > deadline:
                return False
            time.sleep(POLL_S)
        return True

    def send(self, signum: int) -> None:
        """Signal it, if it still runs."""
        if self.poll()[0]:
            with contextlib.suppress(ProcessLookupError):  # it ended in the meantime
                os.kill(self.pid, signum)


def exit_reason(code: Optional[int]) -> str:
    """How a process ended, in words."""
    if code is None:
        return "has ended"
    if code >= 0:
        return f"exited with code {code}"
    try:
        return f"was killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"was killed by signal {-code}"


@contextlib.contextmanager
def held_back() -> Iterator[None]:
    """Signals that would end us take effect at the end of the block, so that what it starts is known by then."""
    before: Dict[int, Any] = {}
    came: List[Tuple[int, Any]] = []
    if threading.current_thread() is threading.main_thread():
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):
            signum = getattr(signal, name, None)
            if signum is not None and callable(signal.getsignal(signum)):
                before[signum] = signal.signal(signum, lambda *how: came.append(how))
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
        for signum, frame in came:
            before[signum](signum, frame)


def relatives(pid: int, kinship: str) -> List[int]:
    """Pids of the "children" of process `pid`, or of all processes of the "session" that it leads (children where
    sessions can't be seen)."""
    if os.path.isdir("/proc/self"):
        field = {"children": 1, "session": 3}[kinship]
        stats = ((int(name), config.proc_stat(int(name))) for name in os.listdir("/proc") if name.isdigit())
        return sorted(other for other, stat in stats if stat and int(stat[field]) == pid)
    table = subprocess.run(["ps", "-A", "-o", "pid=,ppid="], stdout=subprocess.PIPE, check=True).stdout.split()
    return sorted(int(other) for other, parent in zip(table[::2], table[1::2]) if int(parent) == pid)


def environment(extra: Dict[str, Any]) -> Dict[str, str]:
    """Our environment for a child that shall import this package, wherever it lies and whatever it is called."""
    env = {**os.environ, **{key: str(value) for key, value in extra.items()}}
    root = Path(__file__).resolve().parents[(__package__ or "").count(".") + 1]
    if root.name not in ("site-packages", "dist-packages"):  # these are found anyhow, and must not precede the stdlib
        env["PYTHONPATH"] = os.pathsep.join(filter(None, (os.fspath(root), env.get("PYTHONPATH"))))
    return env


def tail_of(path: config.PathLike, lines: int) -> str:
    """The last lines of a file."""
    with open(path, "rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL_BYTES))
        return "\n".join(file.read().decode(errors="replace").splitlines()[-lines:])


class BaseLauncher:
    """The contract. A launcher of your own derives from `ControllerLauncher` or `EngineLauncher` and says how to
    `start`, `stop`, `signal` and `poll`; its name in config files is the name of its class.

    Args:
        profile_dir: absolute.
        cluster_id: "" for the default cluster.
        options: its section of the configuration, as `Settings.section` gives it.
        args: more arguments for the process.
        owned: shall it end when we end?

    Attributes: `state` ("before", "running", "after"), `start_data` and `stop_data` (dicts that say how it went).
    """

    role = ""
    name = ""
    stop_signal = int(signal.SIGTERM)  # what processes are asked to end with
    remote = False  # may what it starts be on other hosts? Then the controller listens where these can reach it
    queued = False  # may it have to wait for its turn? That time counts against no timeout
    sends_connection = False  # does it need the content of the connection file, as $IPP_CONNECTION_INFO in `environment`?

    def __init__(self, *, profile_dir: config.PathLike, cluster_id: str = "", options: Optional[Dict[str, Any]] = None,
                 args: Optional[List[str]] = None, owned: bool = True):
        self.profile_dir, self.cluster_id = Path(profile_dir), cluster_id
        self.options, self.extra_args, self.owned = options or {}, list(args or ()), owned
        self.state = "before"
        self.start_data: Dict[str, Any] = {}
        self.stop_data: Dict[str, Any] = {}
        self._callbacks: List[StopCallback] = []
        self._part_callbacks: List[StopCallback] = []
        self.ended_parts: List[Dict[str, Any]] = []
        self.noted: Callable[[], Any] = lambda: None  # called when there is something new for the cluster file
        self._lock = threading.RLock()

    def find_args(self) -> List[str]:
        """The command, as a list."""
        raise NotImplementedError

    def start(self) -> None:
        """Start it; returns once it is started or submitted, not when it is ready.

        Raises:
            LauncherError: it can't be started; nothing is left behind.
        """
        raise NotImplementedError

    def stop(self) -> None:
        """Stop it and wait until it is gone. Does nothing if it is."""
        raise NotImplementedError

    def signal(self, signum: int) -> None:
        """Deliver a signal to it; of an engine set, to each engine."""
        raise NotImplementedError

    def poll(self) -> bool:
        """Is it running? Who finds that it has ended calls `notify_stop`."""
        raise NotImplementedError

    def join(self, timeout_s: Optional[float] = None) -> bool:
        """Wait for its end; False if it still runs after `timeout_s`."""
        raise NotImplementedError

    def get_output(self, lines: Optional[int] = None) -> str:
        """The last lines of its output (default: `output_limit`)."""
        return ""

    @property
    def running(self) -> bool:
        """Is it running?"""
        return self.state == "running" and self.poll()

    @property
    def args(self) -> List[str]:
        """The command, as a list."""
        return self.find_args()

    def on_stop(self, callback: StopCallback) -> None:
        """Have `callback(stop_data)` called when it ends, in another thread; at once if it has ended."""
        with self._lock:
            if self.state != "after":
                self._callbacks.append(callback)
                if len(self._callbacks) == 1 and self.state == "running":
                    self._watch()
                return
        callback(self.stop_data)

    def notify_start(self, data: Dict[str, Any]) -> None:
        """Note that it runs."""
        with self._lock:
            self.state, self.start_data = "running", data
            if self._callbacks:
                self._watch()

    def notify_stop(self, data: Dict[str, Any]) -> None:
        """Note that it has ended, and tell who asked for it with `on_stop`."""
        with self._lock:
            if self.state == "after":
                return
            self.state, self.stop_data = "after", data
            callbacks, self._callbacks = self._callbacks, []
        for callback in callbacks:
            callback(data)

    def on_part_stop(self, callback: StopCallback) -> None:
        """Have `callback(data)` called, in another thread, for each part (a job, a host) of it that ends."""
        with self._lock:
            self._part_callbacks.append(callback)
            before = list(self.ended_parts)
        for data in before:
            callback(data)

    def notify_part(self, data: Dict[str, Any]) -> None:
        """Note that a part of it has ended; `data` is as for `notify_stop`."""
        with self._lock:
            self.ended_parts.append(data)
            callbacks = list(self._part_callbacks)
        for callback in callbacks:
            callback(data)

    def status(self) -> Dict[str, Any]:
        """How it is: `state` ("before", "pending", "running", "done", "failed", "cancelled" or "lost"), `reason` (what a
        pending one waits for, how one has ended), and for batch systems `jobs`, with the same and more of each."""
        if self.state != "after":
            return {"state": "running" if self.running else self.state, "reason": ""}
        ended = "done" if self.stop_data.get("exit_code") == 0 else "failed"
        return {"state": ended, "reason": str(self.stop_data.get("reason", ""))}

    def held(self) -> str:
        """Why it will never start by itself, as the end of a sentence about it, or ""."""
        return ""

    def job_script(self) -> str:
        """What `start` would run or submit."""
        return shlex.join(self.find_args()) + "\n"

    def to_dict(self) -> Dict[str, Any]:
        """What `from_dict` needs, without secrets."""
        return {"cluster_id": self.cluster_id, "profile_dir": os.fspath(self.profile_dir), "state": self.state}

    @classmethod
    def from_dict(cls, state: Dict[str, Any], options: Optional[Dict[str, Any]] = None) -> "BaseLauncher":
        """The launcher of what another process started.

        Raises:
            NotRunning: it has ended.
        """
        raise NotImplementedError

    def get_env(self) -> Dict[str, str]:
        """The environment of what it starts."""
        return environment({"IPP_CLUSTER_ID": self.cluster_id, "IPP_PROFILE_DIR": self.profile_dir,
                            **self.options.get("environment", {})})

    def _watch(self) -> None:
        threading.Thread(target=self.join, name=f"watch {self.role}", daemon=True).start()

    def _common_args(self) -> List[str]:
        args = [f"--profile-dir={self.profile_dir}", f"--cluster-id={self.cluster_id}"]
        return args + ([f"--parent={os.getpid()}"] if self.owned and not self.remote else [])

    def __repr__(self) -> str:
        return f"<{type(self).__name__}({self.start_data.get('pid', '')}, {self.state})>"


class ControllerLauncher(BaseLauncher):
    """Starts a controller."""

    role = "controller"

    def find_args(self) -> List[str]:
        """The command, as a list."""
        command: List[str] = self.options.get("controller_cmd") or [sys.executable, "-m", f"{__package__}.controller"]
        more: List[str] = self.options.get("controller_args", [])
        return command + self._common_args() + more + self.extra_args

    def wrote(self, info: Dict[str, Any]) -> bool:
        """Is this the connection file of the controller that we started, and not of an earlier one?"""
        raise NotImplementedError


class EngineLauncher(BaseLauncher):
    """Starts a set of `n` engines."""

    role = "engine"
    tag = ""  # what its engines call their set, if signals are to reach them through the controller

    def __init__(self, *, n: int = 1, **common: Any):
        super().__init__(**common)
        self.n = n

    @property
    def asked(self) -> int:
        """How many engines were asked for; `n` is less if not all could be started."""
        return self.n

    @classmethod
    def places(cls, options: Dict[str, Any]) -> Optional[int]:
        """For how many engines there is room, if its options say so: n by default, and at most."""
        return None

    def find_args(self) -> List[str]:
        """The command, as a list."""
        command: List[str] = self.options.get("engine_cmd") or [sys.executable, "-m", f"{__package__}.engine"]
        more: List[str] = self.options.get("engine_args", [])
        return command + self._size_args() + self._common_args() + more + self.extra_args

    def _size_args(self) -> List[str]:
        return ["-n", str(self.n)]

    def to_dict(self) -> Dict[str, Any]:
        """What `from_dict` needs."""
        return {**super().to_dict(), "n": self.n}


class LocalProcessLauncher(BaseLauncher):
    """Starts one process on this host, whose output goes to `<profile>/log/<program>[-<cluster_id>]-<pid>.log`."""

    name = "local"
    patience_s = 0.0  # beyond stop_seconds_until_kill
    process: Process
    output_file: Optional[Path] = None
    elsewhere = ""  # the host it runs on, if it is not this one

    def start(self) -> None:
        """Start it; a log directory that can't be written is an error."""
        args = self.find_args()
        work_dir = self.options.get("work_dir") or os.getcwd()
        env = self.get_env()
        unnamed = config.log_file(self.profile_dir, f"ip{self.role}", f"{self.cluster_id}-of")
        try:
            unnamed.parent.mkdir(parents=True, exist_ok=True)
            log = open(unnamed, "wb", opener=lambda name, flags: os.open(name, flags, 0o600))
        except OSError as e:
            raise LauncherError(f"The log directory {unnamed.parent} can't be written ({e.strerror}); make it writable "
                                "or choose another profile with --profile-dir.") from None
        with log:
            try:
                popen = subprocess.Popen(args, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
                                         cwd=work_dir, env=env, start_new_session=True)
            except OSError as e:
                unnamed.unlink()
                raise LauncherError(f"The {self.role} can't be started: {e.filename}: {e.strerror}.") from None
        self.process = Process(popen.pid, config.process_start(popen.pid), popen)
        self.output_file = config.log_file(self.profile_dir, f"ip{self.role}", self.cluster_id, popen.pid)
        unnamed.replace(self.output_file)
        config.log("launchers").debug("Started the %s, pid %d: %s", self.role, popen.pid, shlex.join(args))
        self.notify_start({"pid": popen.pid})

    def stop(self) -> None:
        """`stop_signal` (SIGTERM), and SIGKILL to its whole session after `stop_seconds_until_kill`."""
        if self.state != "running":
            return
        self._must_be_here()
        asked = signal.Signals(self.stop_signal)
        kill = asked is getattr(signal, "SIGKILL", None)
        if not kill:
            self.process.send(asked)
        if kill or not self.process.wait(self.options.get("stop_seconds_until_kill", 5.0) + self.patience_s):
            if not kill:
                config.log("launchers").warning("Killing the %s, pid %d: it ignores %s.", self.role, self.process.pid,
                                                asked.name)
            for process in self._relatives("session") + [self.process]:
                process.send(getattr(signal, "SIGKILL", signal.SIGTERM))
            self.process.wait()
        self.poll()

    def signal(self, signum: int) -> None:
        """Signal the process."""
        self._must_be_here()
        self.process.send(signum)

    def _must_be_here(self) -> None:
        if self.elsewhere:
            raise LauncherError(f"The {self.role} of cluster {self.cluster_id!r} runs on {self.elsewhere}; go there.")

    def _relatives(self, kinship: str) -> List[Process]:
        pids = relatives(self.process.pid, kinship) if self.process.poll()[0] else []
        return [Process(pid, config.process_start(pid)) for pid in pids if pid != self.process.pid]

    def poll(self) -> bool:
        """Is it running?"""
        if self.state != "running":
            return False
        if self.elsewhere:
            return True  # as far as can be told from here
        alive, code = self.process.poll()
        if not alive:
            self.notify_stop({"pid": self.process.pid, "exit_code": code, "reason": exit_reason(code)})
        return alive

    def join(self, timeout_s: Optional[float] = None) -> bool:
        """Wait for its end."""
        if self.state == "running" and self.process.wait(timeout_s):
            self.poll()
        return self.state != "running"

    def get_output(self, lines: Optional[int] = None) -> str:
        """The last lines of its log."""
        if self.output_file is None:
            return ""
        with contextlib.suppress(FileNotFoundError):
            return tail_of(self.output_file, lines or self.options.get("output_limit", 100))
        return ""

    def to_dict(self) -> Dict[str, Any]:
        """What `from_dict` needs."""
        return {**super().to_dict(), "host": self.elsewhere or socket.gethostname(), "pid": self.process.pid,
                "pid_start": self.process.started, "output_file": os.fspath(self.output_file or "")}

    @classmethod
    def from_dict(cls, state: Dict[str, Any], options: Optional[Dict[str, Any]] = None) -> "LocalProcessLauncher":
        """The launcher of a process that another one started on this host."""
        more = {"n": state["n"]} if "n" in state else {}
        self = cls(profile_dir=state["profile_dir"], cluster_id=state["cluster_id"], options=options, owned=False,
                   **more)
        self.output_file = Path(state["output_file"])
        self.process = Process(state["pid"], state["pid_start"])
        if state["host"] != socket.gethostname():
            self.elsewhere = state["host"]
        elif not self.process.poll()[0]:
            last = (self.get_output().splitlines() or [""])[-1]
            raise NotRunning(f"The {self.role}, pid {self.process.pid}, has ended. {last}".rstrip())
        self.notify_start({"pid": self.process.pid})
        return self


class LocalControllerLauncher(LocalProcessLauncher, ControllerLauncher):
    """A controller on this host."""

    def wrote(self, info: Dict[str, Any]) -> bool:
        """The file names its process."""
        return (info["pid"], info["host"]) == (self.process.pid, socket.gethostname())


class LocalEngineSetLauncher(LocalProcessLauncher, EngineLauncher):
    """Engines on this host, forked and watched by one agent."""

    patience_s = 2.0  # the agent kills engines that ignore SIGTERM itself

    def signal(self, signum: int) -> None:
        """Signal each engine, not the agent."""
        self._must_be_here()
        for process in self._relatives("children"):
            process.send(signum)


# ---------------------------------------------------------------- MPI


class MPILauncher(LocalProcessLauncher):
    """Starts `mpi_cmd` (mpiexec, mpirun, `srun --mpi=...` and their like), which starts the ranks, maybe on other hosts."""

    name = "mpi"
    remote = True
    n = 1

    def find_args(self) -> List[str]:
        """`mpi_cmd -n N mpi_args`, and what each rank runs."""
        command, more = self._mpi_words()
        exports = [word for name in self._exported(super().get_env()) for word in ("-x", name)]
        return [*command, "-n", str(self.n), *more, *(exports if "-x" in command + more else []), *super().find_args()]

    def _mpi_words(self) -> Tuple[List[str], List[str]]:
        return self.options.get("mpi_cmd") or ["mpiexec"], self.options.get("mpi_args", [])

    def _exported(self, env: Dict[str, str]) -> List[str]:
        """What ranks on other hosts need to get of our environment; Open MPI would keep it from them if it were not told."""
        named = ["IPP_CLUSTER_ID", "IPP_PROFILE_DIR", "IPP_CONNECTION_INFO", "PYTHONPATH", *self.options.get("environment", {})]
        return [name for name in dict.fromkeys(named) if name in env]

    def start(self) -> None:
        """Start it; that there is no such command is an error."""
        command, env = self.find_args()[0], self.get_env()
        if shutil.which(command, path=env.get("PATH")) is None:
            raise LauncherError(f"There is no command {command!r}; install Open MPI or MPICH, load the module that has it, or "
                                "name it by c.MPILauncher.mpi_cmd.")
        super().start()

    def get_env(self) -> Dict[str, str]:
        """Ours, and for Open MPI what it is to export; `-x`, which somebody else may use, does not go with that."""
        env = super().get_env()
        if "-x" not in sum(self._mpi_words(), []):
            env.setdefault("OMPI_MCA_mca_base_env_list", ";".join(self._exported(env)))
        return env

    def poll(self) -> bool:
        """Is it running? If not, the reason holds what mpiexec said last."""
        if self.state == "running" and not self.elsewhere and not self.process.poll()[0]:
            _, code = self.process.poll()
            reason = exit_reason(code) + (f": {said}" if (said := last_words(self.get_output(1000))) and code != 0 else "")
            self.notify_stop({"pid": self.process.pid, "exit_code": code, "reason": reason})
        return super().poll()


class MPIControllerLauncher(MPILauncher, ControllerLauncher):
    """A controller, started by mpiexec."""

    before = ""  # run id of the connection file that was there before

    def _common_args(self) -> List[str]:
        ours = f"{socket.gethostname()}:{os.getpid()}:{config.process_start(os.getpid())}"
        return super()._common_args() + ([f"--IPController.owner={ours}"] if self.owned else [])

    def start(self) -> None:
        """Start it."""
        with contextlib.suppress(ConnectionFileError):
            path = config.connection_file(self.profile_dir, self.cluster_id, "client")
            self.before = config.read_connection(path)["run_id"]
        super().start()

    def wrote(self, info: Dict[str, Any]) -> bool:
        """It is not the file that was there before; which process wrote it, and where, only mpiexec knows."""
        return bool(info["run_id"] != self.before)

    def to_dict(self) -> Dict[str, Any]:
        """What `from_dict` needs."""
        return {**super().to_dict(), "before": self.before}

    @classmethod
    def from_dict(cls, state: Dict[str, Any], options: Optional[Dict[str, Any]] = None) -> "MPIControllerLauncher":
        """The launcher of what another process started on this host."""
        self = super().from_dict(state, options)
        self.before = state["before"]
        return self


class MPIEngineSetLauncher(MPILauncher, EngineLauncher):
    """Engines that are the ranks of one MPI world: they begin and end together, and their ids are their ranks.

    A signal for the launcher goes to mpiexec; `Cluster.signal_engines` reaches the engines, wherever they are.
    """

    patience_s = 4.0  # mpiexec waits between SIGTERM and SIGKILL itself

    def __init__(self, **common: Any):
        super().__init__(**common)
        self.tag = os.urandom(8).hex()

    def _size_args(self) -> List[str]:
        return ["--mpi", f"--IPEngine.engine_set={self.tag}"]

    def to_dict(self) -> Dict[str, Any]:
        """What `from_dict` needs."""
        return {**super().to_dict(), "tag": self.tag}

    @classmethod
    def from_dict(cls, state: Dict[str, Any], options: Optional[Dict[str, Any]] = None) -> "MPIEngineSetLauncher":
        """The launcher of what another process started on this host."""
        self = super().from_dict(state, options)
        self.tag = state["tag"]
        return self


MPIExecLauncher, MPIExecControllerLauncher, MPIExecEngineSetLauncher = MPILauncher, MPIControllerLauncher, MPIEngineSetLauncher


def last_words(output: str) -> str:
    """What ranks, and then mpiexec, mpirun or srun, say of their end, on one line; "" if nothing looks like that."""
    found = [match.group(1) for line in output.splitlines() if (match := MPI_CAUSE.search(line))]
    boxes = [" ".join(box.split()) for box in MPI_BOX.findall(output) if "Primary job  terminated" not in box]
    return "; ".join(dict.fromkeys(found + boxes[-1:]))[:WORDS_MAX].rstrip(".")


# ---------------------------------------------------------------- ssh


class SSHLauncher(BaseLauncher):
    """Starts processes on other hosts, over one ssh connection each; they need Python and pyzmq, and nothing else.

    What a process needs there lies in `<remote_profile_dir>/security/ssh-<random>` and goes when it is stopped; its log
    stays in `<remote_profile_dir>/log`.
    """

    name = "ssh"
    remote = True
    sends_connection = True
    module = ""  # what is run there
    program = ""  # whose command and arguments the user may set
    depth = 0  # of the processes that signals are for, below the one that is started
    patience_s = 2.0  # beyond stop_seconds_until_kill, which is ours and the agent's
    look_s = 5.0  # between two looks at a host that we are not connected with
    lease_s = 0.0  # what we own there ends when nobody has come back for so long; 0: never

    def __init__(self, **common: Any):
        super().__init__(**common)
        self.sites: List[Any] = []
        self.failed: Dict[str, str] = {}  # host -> why nothing was started there
        self._told: List[Any] = []  # whose end has been noted
        self._gone = threading.Event()
        self._looked = 0.0
        self._visiting = False  # another process started it, and we only come to see

    # --- what is to be started where

    def _plan(self) -> List[Any]:
        """The hosts, as `hosts.Site`s."""
        if not self.options.get("location") and not self.options.get("hostname"):
            raise ConfigError(f"On which host? Set c.{type(self).__name__}.hostname, or location as user@host.")
        return [self._site(getattr(self, "n", 1), self.options, hosts.Questions())]

    def _site(self, n: int, options: Dict[str, Any], questions: Any) -> Any:
        server = options.get("location") or hosts.full_name(options.get("user", ""), options["hostname"])
        _, dropped = hosts.ssh_options(options.get("ssh_args") or ())
        if dropped:
            config.log("launchers").warning("ssh_args: %s has no effect; put it into ~/.ssh/config if it can be there.",
                                            ", ".join(dropped))
        command = hosts.ours(options.get(f"{self.program}_cmd") or [])
        site = hosts.Site(server, n, options, command, questions, config.log("launchers"))
        site.on_end = self._site_ended
        return site

    def _base(self, site: Any) -> List[str]:
        python = site.far.get("executable", site.python)
        return site.command or [python, "-m", f"{hosts.package_name()}.{self.module}"]

    def _where(self, site: Any) -> List[str]:
        return [f"--profile-dir={site.far.get('profile') or self._profile_there(site)}", f"--cluster-id={self.cluster_id}"]

    def _args_of(self, site: Any) -> List[str]:
        """Arguments that the user gives to the process."""
        own: List[str] = site.options.get(f"{self.program}_args") or []
        return own + self.extra_args

    def _profile_there(self, site: Any) -> str:
        named = [re.sub("^(--)?profile[-_]dir=", "", arg) for arg in self._args_of(site)
                 if re.match("(--)?profile[-_]dir=", arg)]
        return (named or [site.options.get("remote_profile_dir") or hosts.path_there(self.profile_dir)])[-1]

    def _command(self, site: Any) -> List[str]:
        raise NotImplementedError

    def find_args(self) -> List[str]:
        """The command on the first host, as a list."""
        return self._command((self.sites or self._plan())[0])

    def job_script(self) -> str:
        """What `start` would run on each host. Nothing is run, and nobody is asked."""
        return "".join(f"# on {site.server}\n{shlex.join(self._command(site))}\n" for site in self.sites or self._plan())

    # --- starting

    def start(self) -> None:
        """Start it on all hosts at once. Those that can't be used are told of in the log, and the others go on.

        Raises:
            LauncherError: none of them can be used; names why, for each.
        """
        self.sites = self._plan()
        trouble = hosts.each(self._begin, self.sites)
        bug = next((e for e in trouble.values() if not isinstance(e, UserError)), None)
        hosts.each(lambda site: site.give_up(), list(trouble) if bug is None else self.sites)
        if bug is not None:
            raise bug
        self.failed = {site.server: str(e) for site, e in trouble.items()}
        self.sites = [site for site in self.sites if site not in trouble]
        if not self.sites:
            raise LauncherError(" ".join(f"{host}: {reason}" for host, reason in self.failed.items()))
        for host, reason in self.failed.items():
            config.log("launchers").warning("%s: %s The other hosts go on without it.", host, reason)
        self._started()

    def _started(self) -> None:
        self.notify_start({"pid": ", ".join(f"{site.pid} on {site.server}" for site in self.sites)})
        for site in self.sites:
            if site.state == "ended":
                self._site_ended(site)

    def _begin(self, site: Any) -> None:
        site.prepare(self._profile_there(site), hosts.path_there(site.options.get("work_dir") or ""))
        self._prepared(site)
        secrets = []
        for data, there, mode, secret in self._to_send(site):
            path, made = site.put(data, there, mode)
            if made:
                site.made.append(path)
            if made and secret:
                secrets.append(path)
        env = {**{key: str(value) for key, value in site.options.get("environment", {}).items()},
               "IPP_CLUSTER_ID": self.cluster_id, "IPP_PROFILE_DIR": site.far["profile"]}
        env.pop("IPP_CONNECTION_INFO", None)
        name = "-".join(filter(None, (f"ip{self.role}", self.cluster_id, site.hostname, "{pid}")))
        site.start(self._command(site), env, f"{site.far['profile']}/log/{name}.log", secrets,
                   self.lease_s if self.owned else 0.0)

    def _prepared(self, site: Any) -> None:
        """Nothing has been sent or started there yet."""

    def _to_send(self, site: Any) -> Iterator[Tuple[bytes, str, int, bool]]:
        """(content, path there, mode, is it to be removed at the end) of what the process needs there."""
        for local, there in hosts.pairs(site.options.get("to_send") or [], "to_send"):
            try:
                data, mode = Path(local).expanduser().read_bytes(), Path(local).expanduser().stat().st_mode & 0o777
            except OSError as e:
                raise LauncherError(f"{local} of to_send can't be read ({e.strerror}).") from None
            secret = bool(re.fullmatch(r"ipcontroller.*-(client|engine)\.json", os.path.basename(there)))
            yield data, there, 0o600 if secret else mode, secret

    def _connection(self, role: str) -> str:
        """The text of the connection file of a role."""
        given = self.options.get("environment", {}).get("IPP_CONNECTION_INFO") if role == "engine" else None
        return str(given or json.dumps(config.read_connection(
            config.connection_file(self.profile_dir, self.cluster_id, role), role)))

    # --- stopping and signalling

    def stop(self) -> None:
        """Stop it everywhere, with force what does not end in `stop_seconds_until_kill`; nothing is left there."""
        if self.state == "before":
            return
        grace_s = self.options.get("stop_seconds_until_kill", 5.0) + self.patience_s
        trouble = hosts.each(lambda site: site.stop(int(self.stop_signal), grace_s, self._leftovers()), self.sites)
        for site, e in trouble.items():
            config.log("launchers").warning("%s: nothing could be stopped there, but engines end by themselves when their "
                                            "controller is gone. %s", site.server, e)
            site.close()
        self._finish()

    def _leftovers(self) -> List[str]:
        """What else is to be removed there."""
        return []

    def signal(self, signum: int) -> None:
        """Signal the process on each host; of engine sets, each engine."""
        reached: List[int] = []
        trouble = hosts.each(lambda site: reached.append(site.send_signal(signum, self.depth)),
                              [site for site in self.sites if site.state != "ended"])
        if trouble:
            raise LauncherError(" ".join(f"{site.server}: {e}" for site, e in trouble.items()))
        if not sum(reached):
            raise LauncherError(f"There is no process of the {self.role} on {', '.join(s.server for s in self.sites)} that the "
                                "signal could go to; try Client.send_signal.")

    def poll(self) -> bool:
        """Does it run on any host? One that can't be reached counts."""
        if self.state == "running" and self._visiting:
            self._look(self.look_s)
        return self.state == "running"

    def _look(self, age_s: float, stay: bool = False) -> None:
        """Ask hosts that do not tell by themselves how things are, if that has not been done for so long."""
        silent = [site for site in self.sites if not site.connected and site.state != "ended"]
        if not silent or time.monotonic() - self._looked < age_s:
            return
        self._looked = time.monotonic()
        for site, e in hosts.each(lambda site: site.look_again(), silent).items():
            site.state, site.reason = "unreachable", str(e)
        if self._visiting and not stay:
            for site in silent:
                site.close()

    def join(self, timeout_s: Optional[float] = None) -> bool:
        """Wait for its end on all hosts."""
        return self.state != "running" or self._gone.wait(timeout_s)

    def _watch(self) -> None:
        """Hosts that we are connected with tell by themselves."""
        self._look(0.0, stay=True)

    def notify_stop(self, data: Dict[str, Any]) -> None:
        """Note that it has ended."""
        super().notify_stop(data)
        self._gone.set()

    def _site_ended(self, site: Any) -> None:
        with self._lock:
            news = self.state == "running" and site not in self._told
            self._told += [site] if news else []
        if news:
            self.notify_part({"n": site.n, "exit_code": site.code, "reason": f"{exit_reason(site.code)} on {site.server}"})
        self._check()

    def _check(self) -> None:
        if self.state == "running" and all(site.state == "ended" for site in self.sites):
            self._finish()

    def _finish(self) -> None:
        failed = [site for site in self.sites if site.code] or self.sites
        ways: Dict[str, List[str]] = {}
        for site in failed:
            ways.setdefault(exit_reason(site.code), []).append(site.server)
        self.notify_stop({"exit_code": failed[0].code, "reason": ", ".join(
            f"{reason} on {', '.join(servers)}" for reason, servers in ways.items())})

    def get_output(self, lines: Optional[int] = None) -> str:
        """The last lines of its log, of each host."""
        found: Dict[Any, str] = {}
        limit = lines or self.options.get("output_limit", 100)
        trouble = hosts.each(lambda site: found.update({site: site.output(limit, self.depth)}), self.sites)
        found.update({site: f"({e})" for site, e in trouble.items()})
        if len(self.sites) == 1:
            return found[self.sites[0]]
        return "\n".join(f"==> {site.server} <==\n{found[site]}" for site in self.sites)

    def find_log(self, name: str, lines: int) -> str:
        """The last lines of the log of that name, on whichever host it is; "" if it is on none."""
        found = []
        hosts.each(lambda site: found.append(site.log_beside(name, lines)), self.sites)
        return next(filter(None, found), "")

    def status(self) -> Dict[str, Any]:
        """How it is, on each host."""
        if self.state == "running" and self._visiting:
            self._look(0.0)
        states = {"before": "before", "unreachable": "lost"}
        rows = [{"id": f"{site.server}:{site.pid}", "n": site.n, "nodes": site.server,
                 "state": states.get(site.state, site.state) if site.state != "ended" else "failed" if site.code else "done",
                 "reason": exit_reason(site.code) if site.state == "ended" else site.reason} for site in self.sites]
        rows += [{"id": server, "n": 0, "nodes": server, "state": "failed", "reason": reason}
                 for server, reason in self.failed.items()]
        found = [row["state"] for row in rows]
        state = next((state for state in ("running", "lost", "before", "failed", "done") if state in found), "before")
        reasons = [f"{row['nodes']}: {row['reason']}" for row in rows if row["reason"] and row["state"] != "running"]
        return {"state": state, "reason": " ".join(reasons), "jobs": rows}

    def to_dict(self) -> Dict[str, Any]:
        """What `from_dict` needs."""
        return {**super().to_dict(), "sites": [site.to_dict() for site in self.sites], "failed": self.failed}

    @classmethod
    def from_dict(cls, state: Dict[str, Any], options: Optional[Dict[str, Any]] = None) -> "SSHLauncher":
        """The launcher of what another process started; a host that can't be reached may run it."""
        more = {"n": state["n"]} if "n" in state else {}
        self = cls(profile_dir=state["profile_dir"], cluster_id=state["cluster_id"], options=options, owned=False, **more)
        questions = hosts.Questions()
        self.sites = [hosts.Site.from_dict(one, self.options, questions, config.log("launchers")) for one in state["sites"]]
        self.failed = state["failed"]
        self._look(0.0, stay=True)
        for site in self.sites:
            if site.state == "unreachable":
                config.log("launchers").warning("%s: %s", site.server, site.reason)
        if all(site.state == "ended" for site in self.sites):
            last = (self.get_output().splitlines() or [""])[-1]
            hosts.each(lambda site: site.stop(0, 0.0), self.sites)
            raise NotRunning(f"The {self.role} on {', '.join(site.server for site in self.sites)} has ended. {last}".rstrip())
        for site in self.sites:
            site.on_end = self._site_ended
            site.close()  # until something is wanted
        self._visiting, self._looked = True, time.monotonic()
        self._started()
        return self


class SSHControllerLauncher(SSHLauncher, ControllerLauncher):
    """A controller on another host; its connection files are fetched from there."""

    module = program = "controller"
    lease_s = 300.0  # engines end with their controller
    run_id = ""
    _stale: List[bytes] = []  # content of the files that an earlier run has left there
    fetched: Optional[Dict[str, Any]] = None  # what else is there because of it: paths, and whether they are to stay

    def _command(self, site: Any) -> List[str]:
        args = self._args_of(site)
        located = any(re.match(r"--(IPController\.)?location\b", arg) for arg in args)
        address = "" if located or not site.far else site.host().address
        here = address.startswith("127.") or address in ("", "::1")
        return self._base(site) + self._where(site) + ([] if here else [f"--location={address}"]) + args

    def start(self) -> None:
        """Start it there, and fetch what clients and engines need to find it.

        Raises:
            LauncherError: it can't be started, or was not ready in `connection_info_timeout`.
        """
        super().start()
        try:
            self._fetch(self.sites[0])
        except BaseException:
            self.stop()
            raise

    def _wanted(self, site: Any) -> List[Tuple[str, str]]:
        """The files to be fetched: (path there, path here)."""
        if self.options.get("to_fetch") is not None:
            return hosts.pairs(self.options["to_fetch"], "to_fetch")
        files = [config.connection_file(self.profile_dir, self.cluster_id, role) for role in ("engine", "client")]
        return [(f"{site.far['profile']}/security/{file.name}", os.fspath(file)) for file in files]

    def _prepared(self, site: Any) -> None:
        self._stale = [found[0] for there, _ in self._wanted(site) for found in [site.get(there)] if found is not None]

    def _fetch(self, site: Any) -> None:
        deadline = time.monotonic() + self.options.get("connection_info_timeout", 60.0)
        for there, here in self._wanted(site):
            data, path = self._await(site, there, deadline)
            here = os.path.abspath(os.path.expanduser(here))
            info: Any = None
            with contextlib.suppress(ValueError):
                info = json.loads(data)
            if isinstance(info, dict) and info.get("program") == config.PROGRAM:
                self.run_id = info["run_id"]
                self.fetched = self.fetched or {"paths": [], "keep": bool(info.get("reuse"))}
                self.fetched["paths"] += [path, *([os.path.dirname(info["ipc"])] if info["ipc"] else [])]
                config.write_json(here, self._with_way(site, info))
            else:
                os.makedirs(os.path.dirname(here), exist_ok=True)
                Path(here).write_bytes(data)

    def _await(self, site: Any, there: str, deadline: float) -> Tuple[bytes, str]:
        """(content, absolute path) of a file there, once it is not the one of an earlier run."""
        while True:
            found = site.get(there)
            if found is not None and found[0] not in self._stale:
                return found
            if site.state == "ended":
                raise LauncherError(f"The controller on {site.server} {exit_reason(site.code)}. The last lines of its log:\n"
                                    + site.output(20, 0))
            if time.monotonic() > deadline:
                raise LauncherError(f"{site.server}: the controller did not write {there} in time; correct to_fetch, or give "
                                    "it more time with connection_info_timeout.")
            time.sleep(0.05)

    @staticmethod
    def _with_way(site: Any, info: Dict[str, Any]) -> Dict[str, Any]:
        """Clients of a controller that listens on its own host only go through ssh, as we do."""
        if info["role"] == "client" and not info.get("ssh") and hosts.is_loopback(info) and info["host"] != socket.gethostname():
            return {**info, "ssh": site.server}
        return info

    def wrote(self, info: Dict[str, Any]) -> bool:
        """Is this the connection file of our controller?"""
        return bool(self.sites) and (info["run_id"] == self.run_id or
                                     (info["pid"], info["host"]) == (self.sites[0].pid, self.sites[0].hostname))

    def _leftovers(self) -> List[str]:
        return [] if self.fetched is None or self.fetched["keep"] else list(self.fetched["paths"])

    def to_dict(self) -> Dict[str, Any]:
        """What `from_dict` needs."""
        return {**super().to_dict(), "run_id": self.run_id, "fetched": self.fetched}

    @classmethod
    def from_dict(cls, state: Dict[str, Any], options: Optional[Dict[str, Any]] = None) -> "SSHControllerLauncher":
        """The launcher of a controller that another process started."""
        self = super().from_dict(state, options)
        assert isinstance(self, SSHControllerLauncher)
        self.run_id, self.fetched = state["run_id"], state["fetched"]
        return self


class SSHEngineLauncher(SSHLauncher, EngineLauncher):
    """Engines on another host."""

    module = program = "engine"
    depth = 1
    _asked = 0

    def _command(self, site: Any) -> List[str]:
        folder = site.folder or f"{self._profile_there(site)}/security/ssh-RANDOM"
        sent = [f"--file={folder}/engine.json"] if site.options.get("to_send") is None else []
        return self._base(site) + ["-n", str(site.n)] + self._where(site) + sent + self._args_of(site)

    def _to_send(self, site: Any) -> Iterator[Tuple[bytes, str, int, bool]]:
        yield from super()._to_send(site)
        if site.options.get("to_send") is not None:
            return
        text = self._connection("engine")
        info = json.loads(text)
        way = any(re.match(r"--(ssh|url|IPEngine\.(sshserver|registration_url))\b", arg) for arg in self._args_of(site))
        if hosts.is_loopback(info) and not info.get("ssh") and not way and site.hostname != info["host"]:
            raise LauncherError(f"engines there can't reach the controller, which listens on {info['host']} only; "
                                "start it with --ip=* (or --ip=ADDRESS), or with --enginessh=HOST, an ssh server through which "
                                f"they reach {info['host']}.")
        yield text.encode(), f"{site.folder}/engine.json", 0o600, True

    def start(self) -> None:
        """Start the engines."""
        super().start()
        self._asked, self.n = self.n, sum(site.n for site in self.sites)

    @property
    def asked(self) -> int:
        """How many engines were asked for."""
        return self._asked or self.n

    def to_dict(self) -> Dict[str, Any]:
        """What `from_dict` needs."""
        return {**super().to_dict(), "asked": self.asked}

    @classmethod
    def from_dict(cls, state: Dict[str, Any], options: Optional[Dict[str, Any]] = None) -> "SSHEngineLauncher":
        """The launcher of engines that another process started."""
        self = super().from_dict(state, options)
        assert isinstance(self, SSHEngineLauncher)
        self._asked = state["asked"]
        return self


class SSHEngineSetLauncher(SSHEngineLauncher):
    """Engines on many hosts, as `engines` says: {host: n}, {host: (n, arguments)} or {host: {"n": n, option: value}}."""

    @classmethod
    def places(cls, options: Dict[str, Any]) -> Optional[int]:
        """How many engines `engines` has room for."""
        return sum(n for _, n, _ in hosts.rooms(options.get("engines") or {})) or None

    def _plan(self) -> List[Any]:
        rooms = hosts.rooms(self.options.get("engines") or {})
        if not rooms and (self.options.get("location") or self.options.get("hostname")):
            return super()._plan()
        if not sum(n for _, n, _ in rooms):
            raise ConfigError("On which hosts? Set c.SSHEngineSetLauncher.engines = {'host1': 2, 'user@host2': 4}.")
        sites, left, questions = [], self.n, hosts.Questions()
        for host, places, own in rooms:
            n = min(places, left)
            left -= n
            options = {**self.options, "location": "", "hostname": host, **own}
            if n:
                sites.append(self._site(n, options, questions))
        return sites


class SSHProxyEngineSetLauncher(SSHLauncher, EngineLauncher):
    """Engines that `ipcluster engines` starts on another host, by the launcher which is configured there."""

    name = "sshproxy"
    module, program = "cluster", "ipcluster"
    depth = 2
    patience_s = 10.0  # it stops its engines first

    def _command(self, site: Any) -> List[str]:
        return self._base(site) + ["engines", "-n", str(site.n)] + self._where(site) + self._args_of(site)

    def _to_send(self, site: Any) -> Iterator[Tuple[bytes, str, int, bool]]:
        yield from super()._to_send(site)
        if site.options.get("to_send") is None:
            for role in ("engine", "client"):
                name = config.connection_file(self.profile_dir, self.cluster_id, role).name
                yield self._connection(role).encode(), f"{site.far['profile']}/security/{name}", 0o600, True


# ---------------------------------------------------------------- batch systems


class BatchSystemLauncher(BaseLauncher):
    """Submits jobs to a batch system, which starts what we want on its nodes when there is room, and watches them.

    What the systems differ in is a row of `batch.DIALECTS`; `dialect_name` says which. The script that is submitted
    lies in `<profile>/batch`, and goes when the job is stopped; the output of a job is in `<profile>/log`.

    For a system of your own derive from `BatchEngineSetLauncher` and `BatchControllerLauncher` and set `dialect_name`
    to a row that you have added to `batch.DIALECTS`, or set its commands and a template in the config file.
    """

    remote = True
    queued = True
    dialect_name = "batch"
    n = 1

    def __init__(self, **common: Any):
        super().__init__(**common)
        self.tag = os.urandom(4).hex()
        self.jobs: List[jobs.Record] = []
        self._dialect_name = ""  # as it was found out when the jobs were submitted
        self._dialect: Optional[batch.Dialect] = None
        self._gone = threading.Condition()
        self._stopping = False  # then it is no news that a job ends

    # ---- what is submitted

    @property
    def dialect(self) -> batch.Dialect:
        """How to speak to the batch system, with the commands that the configuration names."""
        if self._dialect is None:
            row = batch.DIALECTS[self._dialect_name or self.find_dialect()]
            own: Dict[str, Any] = {}
            for key in ("submit", "delete", "signal", "status"):
                if self.options.get(f"{key}_command"):
                    own[key] = tuple(self.options[f"{key}_command"])
            for key in ("delete", "signal"):  # IPython Parallel's form has no place for the ids
                if key in own and not any("{id" in word or word == "IDS" for word in own[key]):
                    own[key] += (("{signal}", "IDS") if key == "signal" and "{signal}" not in own[key] else ("IDS",))
            self._dialect = row._replace(**own)
        return self._dialect

    def find_dialect(self) -> str:
        """The row of `batch.DIALECTS` to go by."""
        return self.dialect_name

    def _command(self) -> List[str]:
        raise NotImplementedError

    def find_args(self) -> List[str]:
        """What the job runs."""
        return self._command() + self._common_args() + self.extra_args

    def _sizes(self) -> List[Tuple[int, int, int]]:
        """(engines, nodes, engines per node) of each job."""
        return [(1, 1, 1)]

    def _job(self, number: int, size: Tuple[int, int, int]) -> batch.Job:
        """One of the jobs, as it would be submitted."""
        option = self.options.get
        work_dir = option("work_dir") or os.getcwd()
        name = "-".join(filter(None, (f"ip{self.role}", self.cluster_id)))
        unique = f"{name}-job{self.tag}.{number}"
        file_name = option("batch_file_name")
        script = Path(self.profile_dir, "batch", unique + self.dialect.suffix)
        if file_name:
            script = Path(work_dir, file_name if number == 0 else f"{file_name}.{number}")
        environment_names = ("IPP_CLUSTER_ID", "IPP_PROFILE_DIR", "PYTHONPATH", *option("environment", {}))
        env = self.get_env()
        settings: Dict[str, Any] = {key: option(key) for key in (
            "queue", "account", "qos", "timelimit", "memory", "gpus", "constraint", "parallel_environment", "options",
            "prologue", "namespace") if option(key)}
        return batch.Job(
            role=self.role, command=self.find_args() + self._more_args(number), profile_dir=os.fspath(self.profile_dir),
            cluster_id=self.cluster_id, n=size[0], nodes=size[1], engines_per_node=size[2],
            name=re.sub(r"[^\w.-]", "-", name)[:15], script=os.fspath(script),
            output_file=option("output_file") or os.fspath(Path(self.profile_dir, "log", unique + ".log")),
            work_dir=work_dir, must_enter=bool(option("work_dir")), template=self._template(),
            environment={key: env[key] for key in dict.fromkeys(environment_names) if key in env}, **settings)

    def _more_args(self, number: int) -> List[str]:
        return []

    def _template(self) -> str:
        """The user's template, or "" for ours."""
        text: str = self.options.get("batch_template", "")
        file = self.options.get("batch_template_file", "")
        if not text and file:
            paths = [Path(os.path.expanduser(file)), Path(self.profile_dir, file)]
            path = next((path for path in paths if path.is_file()), None)
            try:
                text = (path or paths[0]).read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as e:
                raise ConfigError(f"The batch template {file} can't be read ({getattr(e, 'strerror', None) or e}); "
                                  "batch_template_file is looked for here and in the profile.") from None
        if not text and not self.dialect.lines:
            raise ConfigError("For a batch system that is not known here, set submit_command, delete_command and "
                              "batch_template.")
        return text

    def job_script(self) -> str:
        """What `start` would submit: for each job how, and the script. Nothing is written or run."""
        found = []
        for number, size in enumerate(self._sizes()):
            job = self._job(number, size)
            how = shlex.join(self.dialect.submit) + (" < " if self.dialect.by_stdin else " ") + job.script
            more = batch.companion(self.dialect, job)
            found.append(f"# {how}\n{batch.render(self.dialect, job)}" + (f"\n# {job.script}.sh\n{more}" if more else ""))
        return "\n".join(found)

    # ---- the jobs' lives

    def start(self) -> None:
        """Submit the jobs, at most `submit_rate` in a second; what was submitted is cancelled if one is refused."""
        sizes = self._sizes()
        prepared = [self._job(number, size) for number, size in enumerate(sizes)]
        texts = [batch.render(self.dialect, job) for job in prepared]  # before anything is submitted
        if not self.dialect.submit:
            raise ConfigError("submit_command is not set, so that nothing can be submitted.")
        batch.check_regexp(self.options.get("job_id_regexp", ""), self.options.get("job_id_regexp_group", 0))
        begun = time.monotonic()
        try:
            for number, (job, text) in enumerate(zip(prepared, texts)):
                time.sleep(max(0.0, begun + number / self.options.get("submit_rate", 10.0) - time.monotonic()))
                with held_back():
                    self._submit(number, job, text)
        except BaseException:
            self.stop()
            raise
        config.log("launchers").info("Submitted %s", ", ".join(f"{self.dialect.title} job {job.id}" for job in self.jobs))

    def _submit(self, number: int, job: batch.Job, text: str) -> None:
        script, option = Path(job.script), self.options.get
        more = batch.companion(self.dialect, job)
        config.write_text(script, text, 0o700)
        if more:
            config.write_text(f"{script}.sh", more, 0o700)
        if not option("output_file"):  # a place of the user's may be there on the nodes only
            Path(job.output_file).parent.mkdir(parents=True, exist_ok=True)
            tasks = batch.fields_of(self.dialect, job)["tasks"] if self.dialect.companion else 0
            for name in [f"{job.output_file}.{task}" for task in range(tasks)] or [job.output_file]:
                os.close(os.open(name, os.O_WRONLY | os.O_CREAT, 0o600))  # before others make it with another mode
        env = self.get_env()
        if not job.template:
            env.pop("IPP_CONNECTION_INFO", None)  # it is in the script, which only we can read
        try:
            job_id = self.scheduler.submit(self.dialect.submit, job.script, text, env, option("work_dir") or None,
                                           option("job_id_regexp", ""), option("job_id_regexp_group", 0))
        except BaseException:
            self._remove_scripts(job.script)
            raise
        record = jobs.Record(job_id, job.n, job.script, job.output_file, f"{self.tag}.{number}")
        self.jobs.append(record)
        if self.state == "before":
            self.notify_start({"job_id": job_id})
        self.noted()
        self.scheduler.watch(record, self._on_change)

    @property
    def scheduler(self) -> jobs.Scheduler:
        """The batch system, which this process knows once."""
        found = jobs.Scheduler.of(self.dialect)
        found.poll_s = min(found.poll_s, self.options.get("poll_seconds", 10.0))
        return found

    def _on_change(self, record: jobs.Record) -> None:
        """The scheduler says something new of a job."""
        log = config.log("launchers")
        if not record.ended:
            log.info("%s job %s is %s%s", self.dialect.title, record.id, record.status.state,
                     f": {record.status.reason}" if record.status.reason else "")
            self.noted()
            return
        with self._gone:
            self._gone.notify_all()
        self.noted()
        self._tell_end(record)

    def _tell_end(self, record: jobs.Record) -> None:
        with self._lock:
            if record.told or self._stopping or self.state == "after":
                return
            record.told = True
        data = {"job_id": record.id, "tag": record.tag, "n": record.n, "state": record.status.state,
                "job": self._words(record), "reason": f"ended: {self._words(record)}",
                "exit_code": 0 if record.status.state == "done" else None}
        if all(job.ended for job in self.jobs):
            worst = next((job for job in self.jobs if job.status.state != "done"), record)
            self.notify_part(data)
            self.notify_stop({**data, "reason": f"ended: {self._words(worst)}",
                              "exit_code": 0 if worst.status.state == "done" else None})
        else:
            self.notify_part(data)

    def _words(self, job: jobs.Record) -> str:
        """How a job ended."""
        how = {"done": "has ended", "failed": "failed", "cancelled": "was cancelled", "lost": "is lost"}
        return (f"{self.dialect.title} job {job.id} {how.get(job.status.state, job.status.state)}"
                + (f" ({job.status.reason})" if job.status.reason else ""))

    def poll(self) -> bool:
        """Does any job run, or wait to?"""
        if self.state == "running" and self.jobs and all(job.ended for job in self.jobs):
            for job in self.jobs:
                self._tell_end(job)
        return self.state == "running"

    def join(self, timeout_s: Optional[float] = None) -> bool:
        """Wait for the end of all jobs."""
        with self._gone:
            self._gone.wait_for(lambda: all(job.ended for job in self.jobs), timeout_s)
        return not self.poll()

    def stop(self) -> None:
        """Cancel the jobs, and wait until the scheduler says that they are gone.

        Raises:
            LauncherError: they are not gone after `stop_timeout`.
        """
        self._stopping = True
        alive = [job for job in self.jobs if not job.ended]
        deadline = time.monotonic() + self.options.get("stop_timeout", 60.0)
        trouble = self.scheduler.tell(self.dialect.delete, [job.id for job in alive], "delete") if alive else ""
        while alive and self.dialect.status:
            try:
                self.scheduler.query(alive)
            except LauncherError as e:  # it is away for a moment
                trouble = str(e)
            alive = [job for job in alive if not job.ended]
            if alive and time.monotonic() > deadline:
                self._stopping = False
                raise LauncherError(f"{self.dialect.title} job {alive[0].id} could not be cancelled, or is not gone yet"
                                    + (f": {trouble}" if trouble else ".") + " Stop the cluster again later.")
            time.sleep(STOP_LOOK_S if alive else 0)
        self._remove_scripts(*(job.script for job in self.jobs))
        with self._gone:
            self._gone.notify_all()
        if self.state == "running":
            last = self.jobs[-1]
            self.notify_stop({"job_id": last.id, "exit_code": 0, "reason": f"ended: {self._words(last)}"})

    @staticmethod
    def _remove_scripts(*scripts: str) -> None:
        for script in scripts:
            for name in (script, script + ".sh"):
                Path(name).unlink(missing_ok=True)

    def signal(self, signum: int) -> None:
        """Have the scheduler deliver a signal to the jobs that run."""
        if not self.dialect.signal:
            raise LauncherError(f"{self.dialect.title} delivers no signals to jobs.")
        running = [job.id for job in self.jobs if job.status.state == "running"]
        trouble = self.scheduler.tell(self.dialect.signal, running, "signal", signal=str(int(signum))) if running else ""
        if trouble:
            raise LauncherError(trouble)

    def status(self) -> Dict[str, Any]:
        """The state of the jobs together and one by one, as far as it is known."""
        rows = [{"id": job.id, "n": job.n, **job.status._asdict()} for job in self.jobs]
        if not rows:
            return {**super().status(), "jobs": []}
        together = batch.combined(job.status for job in self.jobs)
        if self.state == "after":
            together = batch.Status(together.state, str(self.stop_data.get("reason", "")))
        return {"state": together.state, "reason": together.reason, "jobs": rows}

    def held(self) -> str:
        """What keeps the jobs from ever starting by themselves, or ""."""
        stuck = [job for job in self.jobs if job.status.reason.startswith(batch.HELD)]
        if not stuck or any(job.status.state == "running" for job in self.jobs):
            return ""
        advice = self.dialect.release.replace("{id}", stuck[0].id)
        return f"wait in {self.dialect.title} job {stuck[0].id}, which is {stuck[0].status.reason}; `{advice}` releases it"

    def get_output(self, lines: Optional[int] = None) -> str:
        """The last lines of the output of each job; of those only that ended before their time, if some have."""
        failed = [job for job in self.jobs if job.ended and job.status.state != "done"]
        tails = []
        for job in failed or self.jobs:
            path = Path(re.sub(r"%[jJA]|\$JOB_ID", job.id, job.output_file))
            for file in [path] if path.is_file() else sorted(path.parent.glob(f"{path.name}.*")):
                with contextlib.suppress(OSError):
                    text = tail_of(file, lines or self.options.get("output_limit", 100))
                    several = len(failed or self.jobs) > 1
                    tails.append(f"[{job.id}] " + text.replace("\n", f"\n[{job.id}] ") if several else text)
        return "\n".join(filter(None, tails))

    def to_dict(self) -> Dict[str, Any]:
        """What `from_dict` needs."""
        return {**super().to_dict(), "dialect": self.dialect.name, "tag": self.tag,
                "jobs": [job.to_dict() for job in self.jobs]}

    @classmethod
    def from_dict(cls, state: Dict[str, Any], options: Optional[Dict[str, Any]] = None) -> "BatchSystemLauncher":
        """The launcher of jobs that another process submitted."""
        more = {"n": state["n"]} if "n" in state else {}
        self = cls(profile_dir=state["profile_dir"], cluster_id=state["cluster_id"], options=options, owned=False, **more)
        self.tag, self._dialect_name = state["tag"], state["dialect"]
        self.jobs = [jobs.Record.from_dict(job) for job in state["jobs"]]
        self.scheduler.query(self.jobs)
        if all(job.ended for job in self.jobs):
            worst = next((job for job in self.jobs if job.status.state != "done"), self.jobs[-1])
            last = (self.get_output().splitlines() or [""])[-1]
            raise NotRunning(f"{self._words(worst)}. {last}".rstrip())
        self.notify_start({"job_id": self.jobs[0].id})
        for job in self.jobs:
            if not job.ended:
                self.scheduler.watch(job, self._on_change, at_once=False)
        return self

    def __repr__(self) -> str:
        ids = ", ".join(job.id for job in self.jobs)
        return f"<{type(self).__name__}({ids}, {self.status()['state']})>"


def foresee_jobs(states: Iterable[Dict[str, Any]]) -> None:
    """Have each batch system asked once for all jobs in `states`, from which launchers will be made."""
    ids: Dict[str, List[str]] = {}
    for state in states:
        if state.get("dialect") in batch.DIALECTS:
            ids.setdefault(state["dialect"], []).extend(job["id"] for job in state["jobs"] if job["state"] not in batch.ENDED)
    for name, several in ids.items():
        jobs.Scheduler.of(batch.DIALECTS[name]).foresee(several)


class BatchControllerLauncher(BatchSystemLauncher, ControllerLauncher):
    """A controller as a job. It writes the connection files when it starts, where we must be able to see them."""

    before = ""  # run id of the connection file that was there before

    def _command(self) -> List[str]:
        command: List[str] = self.options.get("controller_cmd") or [sys.executable, "-m", f"{__package__}.controller"]
        more: List[str] = self.options.get("controller_args", [])
        return command + more

    def start(self) -> None:
        """Submit it."""
        with contextlib.suppress(ConnectionFileError):
            path = config.connection_file(self.profile_dir, self.cluster_id, "client")
            self.before = config.read_connection(path)["run_id"]
        super().start()

    def wrote(self, info: Dict[str, Any]) -> bool:
        """It is not the file that was there before."""
        return bool(info["run_id"] != self.before)

    def to_dict(self) -> Dict[str, Any]:
        """What `from_dict` needs."""
        return {**super().to_dict(), "before": self.before}

    @classmethod
    def from_dict(cls, state: Dict[str, Any], options: Optional[Dict[str, Any]] = None) -> "BatchControllerLauncher":
        """The launcher of a job that another process submitted."""
        self = super().from_dict(state, options)
        assert isinstance(self, BatchControllerLauncher)
        self.before = state["before"]
        return self


class BatchEngineSetLauncher(BatchSystemLauncher, EngineLauncher):
    """Engines in one job, or in several (`engines_per_job`, `engines_per_node`), usable as each of these starts.

    On each node an agent forks the engines there. The name of the set, `tag`, and the number of the job in it go with
    the engines, so that signals and bad news find them.
    """

    def _command(self) -> List[str]:
        command: List[str] = self.options.get("engine_cmd") or [sys.executable, "-m", f"{__package__}.engine"]
        more: List[str] = self.options.get("engine_args", [])
        return command + more

    def _more_args(self, number: int) -> List[str]:
        return [f"--IPEngine.engine_set={self.tag}.{number}"]

    def _sizes(self) -> List[Tuple[int, int, int]]:
        return batch.plan(self.n, self.options.get("engines_per_job", 0), self.options.get("engines_per_node", 0))


class PBSLauncher(BatchSystemLauncher):
    """PBS Pro, OpenPBS and Torque, told apart by what `qstat --version` says."""

    dialect_name = "pbs"

    def find_dialect(self) -> str:
        """Torque has other words for sizes."""
        try:
            said = jobs.run(["qstat", "--version"], "watch")
        except LauncherError:
            return self.dialect_name
        return "pbs" if "pbs_version" in (said.stdout + said.stderr).lower() else "torque"


class PBSControllerLauncher(PBSLauncher, BatchControllerLauncher):
    """A controller as a PBS job."""


class PBSEngineSetLauncher(PBSLauncher, BatchEngineSetLauncher):
    """Engines in PBS jobs."""


class SGELauncher(BatchSystemLauncher):
    """Grid Engine. A job is an array: one engine in each task, or `engines_per_node` by `parallel_environment`."""

    dialect_name = "sge"


class SGEControllerLauncher(SGELauncher, BatchControllerLauncher):
    """A controller as a Grid Engine job."""


class SGEEngineSetLauncher(SGELauncher, BatchEngineSetLauncher):
    """Engines in Grid Engine jobs."""


class SlurmLauncher(BatchSystemLauncher):
    """Slurm."""

    dialect_name = "slurm"


class SlurmControllerLauncher(SlurmLauncher, BatchControllerLauncher):
    """A controller as a Slurm job."""


class SlurmEngineSetLauncher(SlurmLauncher, BatchEngineSetLauncher):
    """Engines in Slurm jobs."""


class LSFLauncher(BatchSystemLauncher):
    """LSF."""

    dialect_name = "lsf"


class LSFControllerLauncher(LSFLauncher, BatchControllerLauncher):
    """A controller as an LSF job."""


class LSFEngineSetLauncher(LSFLauncher, BatchEngineSetLauncher):
    """Engines in LSF jobs."""


class HTCondorLauncher(BatchSystemLauncher):
    """HTCondor. A job is a cluster of processes: one engine in each, or `engines_per_node`."""

    dialect_name = "htcondor"


class HTCondorControllerLauncher(HTCondorLauncher, BatchControllerLauncher):
    """A controller as an HTCondor job."""


class HTCondorEngineSetLauncher(HTCondorLauncher, BatchEngineSetLauncher):
    """Engines in HTCondor jobs."""


LAUNCHERS: Dict[Tuple[str, str], Type[BaseLauncher]] = {
    ("controller", "local"): LocalControllerLauncher,
    ("engine", "local"): LocalEngineSetLauncher,
    ("controller", "ssh"): SSHControllerLauncher,
    ("engine", "ssh"): SSHEngineSetLauncher,
    ("engine", "sshproxy"): SSHProxyEngineSetLauncher,
    ("controller", "mpi"): MPIControllerLauncher,
    ("engine", "mpi"): MPIEngineSetLauncher,
    ("controller", "pbs"): PBSControllerLauncher,
    ("engine", "pbs"): PBSEngineSetLauncher,
    ("controller", "sge"): SGEControllerLauncher,
    ("engine", "sge"): SGEEngineSetLauncher,
    ("controller", "slurm"): SlurmControllerLauncher,
    ("engine", "slurm"): SlurmEngineSetLauncher,
    ("controller", "lsf"): LSFControllerLauncher,
    ("engine", "lsf"): LSFEngineSetLauncher,
    ("controller", "htcondor"): HTCondorControllerLauncher,
    ("engine", "htcondor"): HTCondorEngineSetLauncher,
    ("controller", "batch"): BatchControllerLauncher,
    ("engine", "batch"): BatchEngineSetLauncher,
}
# Short names of launchers that IPython Parallel has and this version has not.
ABSENT = ("windowshpc", "winhpc")


def launcher_name(kind: Type[BaseLauncher]) -> str:
    """What `find_launcher` finds it by: its short name, or its dotted path."""
    short = [name for (_, name), its_class in LAUNCHERS.items() if its_class is kind]
    return short[0] if short else f"{kind.__module__}.{kind.__qualname__}"


def find_launcher(role: str, name: Union[str, Type[BaseLauncher]]) -> Type[BaseLauncher]:
    """The launcher class of a role.

    Args:
        role: "controller" or "engine".
        name: a short name of `LAUNCHERS`, or of an entry point in the group `<program>.engine_launchers` or
            `<program>.controller_launchers`; the name of a class, alone or as a dotted path; or a class.

    Raises:
        ConfigError: there is no such launcher.
    """
    if isinstance(name, type):
        return _checked(role, name, name.__name__)
    short = name.lower() if "." not in name else name.rpartition(".")[2].lower()
    system = re.sub("(engineset|engine|controller)?launcher$", "", short).replace("mpiexec", "mpi")
    for (its_role, its_name), launcher in LAUNCHERS.items() if not _is_elsewhere(name) else ():
        if its_role == role and (short in (its_name, launcher.__name__.lower()) or system == its_name):
            return launcher
    module, _, attribute = name.rpartition(".")
    others = _entry_points(role) if not module else {}
    if short in others:
        return _checked(role, _loaded(role, name, others[short].load), name)
    names = ", ".join([its_name for its_role, its_name in LAUNCHERS if its_role == role] + sorted(others))
    if system in ABSENT and (not module or module.partition(".")[0] == "ipyparallel"):
        raise ConfigError(f"The {role} launcher {name!r} is not in this version; choose from {names}.")
    if not module:
        raise ConfigError(f"There is no {role} launcher {name!r}; choose from {names}, or give a class by its "
                          "dotted path.")
    from importlib import import_module

    return _checked(role, _loaded(role, name, lambda: getattr(import_module(module), attribute)), name)


def _is_elsewhere(name: str) -> bool:
    """Is it the dotted path of a class in a package of somebody else's that is there?"""
    from importlib.util import find_spec

    first = name.partition(".")[0]
    return "." in name and first not in ("ipyparallel", (__package__ or "").partition(".")[0]) and find_spec(first) is not None


def _loaded(role: str, name: str, load: Callable[[], Any]) -> Any:
    try:
        return load()
    except (ImportError, AttributeError) as e:
        raise ConfigError(f"The {role} launcher {name!r} can't be imported: {e}.") from None


def _checked(role: str, found: Any, name: str) -> Type[BaseLauncher]:
    if not (isinstance(found, type) and issubclass(found, BaseLauncher)):
        raise ConfigError(f"The {role} launcher {name!r} is no launcher class.")
    if found.role and found.role != role:
        raise ConfigError(f"{name!r} is a {found.role} launcher, not one for the {role}.")
    return found


def _entry_points(role: str) -> Dict[str, Any]:
    """What other packages have registered, by name."""
    from importlib.metadata import entry_points

    group, found = f"{config.PROGRAM}.{role}_launchers", entry_points()
    points = found.select(group=group) if hasattr(found, "select") else found.get(group, ())
    return {point.name.lower(): point for point in points}
