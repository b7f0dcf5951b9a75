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
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Tuple, Type, Union

from . import config
from .errors import ConfigError, LauncherError, NotRunning

POLL_S = 0.02  # between two looks at a process that is not our child
TAIL_BYTES = 64 * 1024
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
    remote = False  # may what it starts be on other hosts? Then the controller listens where these can reach it

    def __init__(self, *, profile_dir: config.PathLike, cluster_id: str = "", options: Optional[Dict[str, Any]] = None,
                 args: Optional[List[str]] = None, owned: bool = True):
        self.profile_dir, self.cluster_id = Path(profile_dir), cluster_id
        self.options, self.extra_args, self.owned = options or {}, list(args or ()), owned
        self.state = "before"
        self.start_data: Dict[str, Any] = {}
        self.stop_data: Dict[str, Any] = {}
        self._callbacks: List[StopCallback] = []
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

    def _watch(self) -> None:
        threading.Thread(target=self.join, name=f"watch {self.role}", daemon=True).start()

    def _common_args(self) -> List[str]:
        args = [f"--profile-dir={self.profile_dir}", f"--cluster-id={self.cluster_id}"]
        return args + ([f"--parent={os.getpid()}"] if self.owned else [])

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

    def __init__(self, *, n: int = 1, **common: Any):
        super().__init__(**common)
        self.n = n

    def find_args(self) -> List[str]:
        """The command, as a list."""
        command: List[str] = self.options.get("engine_cmd") or [sys.executable, "-m", f"{__package__}.engine"]
        more: List[str] = self.options.get("engine_args", [])
        return command + ["-n", str(self.n)] + self._common_args() + more + self.extra_args

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
        env = environment({"IPP_CLUSTER_ID": self.cluster_id, "IPP_PROFILE_DIR": self.profile_dir,
                           **self.options.get("environment", {})})
        unnamed = config.log_file(self.profile_dir, f"ip{self.role}", f"{self.cluster_id}-of")
        try:
            unnamed.parent.mkdir(parents=True, exist_ok=True)
            log = open(unnamed, "wb")
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
        """SIGTERM, and SIGKILL to its whole session after `stop_seconds_until_kill`."""
        if self.state != "running":
            return
        self._must_be_here()
        self.process.send(signal.SIGTERM)
        if not self.process.wait(self.options.get("stop_seconds_until_kill", 5.0) + self.patience_s):
            config.log("launchers").warning("Killing the %s, pid %d: it ignores SIGTERM.", self.role, self.process.pid)
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
        try:
            with open(self.output_file, "rb") as log:
                log.seek(max(0, log.seek(0, os.SEEK_END) - TAIL_BYTES))
                text = log.read().decode(errors="replace")
        except FileNotFoundError:
            return ""
        return "\n".join(text.splitlines()[-(lines or self.options.get("output_limit", 100)):])

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


LAUNCHERS: Dict[Tuple[str, str], Type[BaseLauncher]] = {
    ("controller", "local"): LocalControllerLauncher,
    ("engine", "local"): LocalEngineSetLauncher,
}
# Short names of launchers that IPython Parallel has and this version has not.
ABSENT = ("batch", "htcondor", "lsf", "mpi", "pbs", "sge", "slurm", "ssh", "sshproxy", "windowshpc", "winhpc")


def launcher_name(kind: Type[BaseLauncher]) -> str:
    """What `find_launcher` finds it by: its short name, or its dotted path."""
    short = [name for (_, name), its_class in LAUNCHERS.items() if its_class is kind]
    return short[0] if short else f"{kind.__module__}.{kind.__qualname__}"


def find_launcher(role: str, name: Union[str, Type[BaseLauncher]]) -> Type[BaseLauncher]:
    """The launcher class of a role.

    Args:
        role: "controller" or "engine".
        name: a short name of `LAUNCHERS`, the name of a class, alone or as a dotted path, or a class.

    Raises:
        ConfigError: there is no such launcher.
    """
    if isinstance(name, type):
        return name
    short = name.lower() if "." not in name else name.rpartition(".")[2].lower()
    system = re.sub("(engineset|engine|controller)?launcher$", "", short)
    for (its_role, its_name), launcher in LAUNCHERS.items():
        if its_role == role and short in (its_name, launcher.__name__.lower()):
            return launcher
    module, _, attribute = name.rpartition(".")
    names = ", ".join(its_name for its_role, its_name in LAUNCHERS if its_role == role)
    if system in ABSENT and (not module or module.partition(".")[0] == "ipyparallel"):
        raise ConfigError(f"The {role} launcher {name!r} is not in this version; choose from {names}.")
    if not module:
        raise ConfigError(f"There is no {role} launcher {name!r}; choose from {names}, or give a class by its "
                          "dotted path.")
    from importlib import import_module

    try:
        found = getattr(import_module(module), attribute)
    except (ImportError, AttributeError) as e:
        raise ConfigError(f"The {role} launcher {name!r} can't be imported: {e}.") from None
    if not (isinstance(found, type) and issubclass(found, BaseLauncher)):
        raise ConfigError(f"The {role} launcher {name!r} is no launcher class.")
    return found
