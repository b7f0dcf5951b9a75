"""`Cluster` starts, watches and stops a controller and engines; `ClusterManager` knows several clusters.

    Cluster ──► controller launcher ──► controller ──► connection files ◄── waited for ── engines ◄── engine launchers
       │                                                     └──► Client
       └──► cluster file: what was started, so that `Cluster.from_file` in another process can stop it

Rules that hold here:
- everything starts at once: the engines wait for the connection file, so nobody waits for the controller first;
- whatever goes wrong while starting, nothing is left behind: no process, no file;
- the cluster file holds no secrets; one that can't be read, or of a dead run, is replaced;
- each method `m_sync` is the primitive; `m` is the same as a coroutine.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import os
import random
import socket
import string
import sys
import threading
import time
from pathlib import Path
from typing import Any, Awaitable, Callable, Dict, Iterable, Iterator, List, Optional, Tuple, Type, Union

from . import config, launchers
from .allocation import available_cpus
from .errors import (AlreadyRunning, ConfigError, ConnectionFileError, IPythonError, KernelError, LauncherError, NoCluster,
                     NotRunning, UserError)

POLL_S = 0.005  # between two looks for the controller's connection file ...
QUEUE_POLL_S = 0.2  # ... that a job is to write
LEAVE_S = 1.0  # between asking engines to leave and having them ended
GONE_S = 10.0  # to tell the controller of a job that has ended
TAIL_LINES = 20
QUICK_S = 30.0  # engines that end sooner after their start have failed; they are replaced ever later ...
FAILURES_MAX = 4  # ... and after so many failures in turn not at all
TAKEN = ("controller_ip", "controller_location", "controller_args", "engine_timeout", "delay",
         "send_engines_connection_env", "keep_engines")  # arguments and attributes that are settings of the same name
KEPT = ("n", "cluster_id", "profile_dir", *TAKEN)
Launcher = Union[str, Type[launchers.BaseLauncher]]


def _new_id() -> str:
    return f"{int(time.time())}-{''.join(random.SystemRandom().choices(string.ascii_lowercase + string.digits, k=4))}"


def _own_log(level: Union[int, str, None]) -> Any:
    return config.log("cluster") if level is None else config.setup_logging("cluster", level)


def _members(client: Any, launcher: launchers.EngineLauncher) -> List[int]:
    """The engines of a set that has a tag."""
    known = client.engine_info()
    return [engine_id for engine_id, info in known.items() if str(info.get("set")).partition(".")[0] == launcher.tag]


def label(cluster_id: str) -> str:
    """What sentences call a cluster."""
    return f"cluster {cluster_id!r}" if cluster_id else "the default cluster"


def _awaitable(method: Callable[..., Any]) -> Callable[..., Awaitable[Any]]:
    """The method as a coroutine, which runs it in a thread."""
    async def run(self: "Cluster", *args: Any, **kwargs: Any) -> Any:
        import asyncio

        return await asyncio.get_running_loop().run_in_executor(None, functools.partial(method, self, *args, **kwargs))

    run.__name__ = method.__name__[: -len("_sync")]
    run.__doc__ = f"`{method.__name__}` as a coroutine."
    return run


class Stopwatch:
    """Counts the seconds since it was made, but for those in which `queueing()`; to be called often."""

    def __init__(self, queueing: Callable[[], bool]):
        self._queueing = queueing
        self._seconds, self._last = 0.0, time.monotonic()

    def __call__(self) -> float:
        now = time.monotonic()
        if not self._queueing():
            self._seconds += now - self._last
        self._last = now
        return self._seconds


def _queues(launcher: launchers.BaseLauncher) -> bool:
    """Does a part of what it started wait in a queue?"""
    return launcher.queued and any(job["state"] == "pending" for job in launcher.status().get("jobs", ()))


class Cluster:
    """A controller and its engines.

    `with Cluster(n=4) as rc:` (or `async with`) gives a connected `Client` once all engines are there, and stops
    everything at the end.

    Args:
        n: engines to start (default: the CPUs that we may use).
        engines: their launcher, a short name or a class; also `engine_launcher_class`.
        controller: the controller's launcher; also `controller_launcher_class`.
        controller_ip: where the controller listens, "*" for all addresses (default: no TCP if all is local).
        controller_location: name or address by which others reach the controller.
        controller_args: more arguments for it, as in `["--ping=5000"]`.
        engine_timeout: seconds to wait for the controller and the engines.
        delay: seconds between the start of the controller and that of the engines.
        send_engines_connection_env: wait for the controller, and give engines the content of its connection file in
            `$IPP_CONNECTION_INFO` (default: they wait for the file by themselves).
        keep_engines: start engines anew in place of those whose job or process has ended.
        restart_controller: start the controller anew when it was killed, with the same keys, ports and engines. With `--sqlitedb`
            among `controller_args` nothing is lost.
        profile: name of the profile, created if need be. profile_dir: or its directory.
        cluster_id: tells apart the clusters of a profile (default: a new one; "" is what `ipcluster start` uses).
        cluster_file: where to note what was started (default: in the profile); "" for nowhere.
        shutdown_atexit: stop it when this process ends, however it ends.
        log_level: log to stderr, from this level on; the controller and engines log from it on, too.
        load_profile: take what is not given from the profile's ipcluster_config.py.
        log: a logger in place of ours.
        config: more settings, `{"Section": {"key": value}}`, over the profile's. parent: or an object with such a
            `config`.

    Attributes: `controller` (its launcher, or None), `engines` (`{engine_set_id: launcher}`).
    """

    def __init__(self, *, n: Optional[int] = None, engines: Optional[Launcher] = None,
                 engine_launcher_class: Optional[Launcher] = None, controller: Optional[Launcher] = None,
                 controller_launcher_class: Optional[Launcher] = None, controller_ip: Optional[str] = None,
                 controller_location: Optional[str] = None, controller_args: Optional[List[str]] = None,
                 engine_timeout: Optional[float] = None, delay: Optional[float] = None,
                 send_engines_connection_env: Optional[bool] = None, keep_engines: Optional[bool] = None,
                 restart_controller: Optional[bool] = None, profile: Optional[str] = None,
                 profile_dir: Optional[config.PathLike] = None, cluster_id: Optional[str] = None,
                 cluster_file: Optional[config.PathLike] = None, shutdown_atexit: bool = True,
                 log_level: Union[int, str, None] = None, load_profile: bool = True, log: Any = None,
                 config: Optional[Dict[str, Dict[str, Any]]] = None, parent: Any = None):
        for short, long in (("engines", engine_launcher_class), ("controller", controller_launcher_class)):
            if long is not None and {"engines": engines, "controller": controller}[short] is not None:
                raise TypeError(f"{short} and {short.rstrip('s')}_launcher_class are the same; give one of them")
        more = config if config is not None else getattr(parent, "config", None)
        given = {"n": n, "engine_launcher_class": engines or engine_launcher_class,
                 "controller_launcher_class": controller or controller_launcher_class, "controller_ip": controller_ip,
                 "controller_location": controller_location, "controller_args": controller_args,
                 "engine_timeout": engine_timeout, "delay": delay,
                 "send_engines_connection_env": send_engines_connection_env, "keep_engines": keep_engines,
                 "restart_controller": restart_controller}
        given = {key: value for key, value in given.items() if value is not None}
        self._make(more, given, profile, profile_dir, load_profile)
        self._name(cluster_id, cluster_file)
        self.shutdown_atexit, self.log_level = shutdown_atexit, log_level
        self.log = log or _own_log(log_level)
        self.controller: Optional[launchers.ControllerLauncher] = None
        self.engines: Dict[str, launchers.EngineLauncher] = {}
        self.started: Optional[float] = None
        self.host = socket.gethostname()
        self.reason = ""  # why the controller of a cluster from a file is not running, as its log tells
        self._pid = os.getpid()  # a forked child does not own the cluster
        self._client: Any = None
        self._file_lock = threading.RLock()  # jobs are noted by the thread that watches them, too
        self._noted = False  # is the cluster file ours?
        self._begun: Dict[Any, float] = {}  # when each engine set was started, as long as it is to be kept
        self._failures = 0  # of replacements, in turn
        self._closing = threading.Event()
        self._controller_options: Dict[str, Any] = {}
        self._stopped: Any = None  # the controller that was told to stop
        self._controller_failures = 0

    def _make(self, more: Optional[Dict[str, Dict[str, Any]]], given: Dict[str, Any], profile: Optional[str],
              profile_dir: Optional[config.PathLike], load_profile: bool) -> None:
        layers = [config.layer_of(config.START, more or {}),
                  {f"Cluster.{key}": config.Given(value, key) for key, value in given.items()}]
        self.profile_dir = config.profile_path(profile, profile_dir)
        before = config.load(config.START, self.profile_dir).layers if load_profile else []
        self._take(config.Settings(config.START, self.profile_dir, before + layers))

    def _name(self, cluster_id: Optional[str], cluster_file: Optional[config.PathLike]) -> None:
        self.cluster_id = _new_id() if cluster_id is None else cluster_id
        default_file = config.cluster_file(self.profile_dir, self.cluster_id)
        self.cluster_file = default_file if cluster_file is None else Path(cluster_file) if cluster_file else None

    def _take(self, settings: config.Settings) -> None:
        """Take what the command line, the config file and the arguments say."""
        self._settings = settings
        self.engine_launcher_class = launchers.find_launcher("engine", settings["Cluster.engine_launcher_class"])
        places, cpus = self.engine_launcher_class.places(self._section(self.engine_launcher_class)), available_cpus()
        self.n: int = settings["Cluster.n"] or places or cpus.n
        self._n_source = "" if settings["Cluster.n"] or places else f", as many as {cpus.source} allows"
        self.controller_launcher_class = launchers.find_launcher(
            "controller", settings["Cluster.controller_launcher_class"])
        self.controller_ip: str
        self.controller_location: str
        self.controller_args: List[str]
        self.engine_timeout: float
        self.delay: float
        self.send_engines_connection_env: bool
        self.keep_engines: bool
        self._restarts: bool = settings["Cluster.restart_controller"]
        for key in TAKEN:
            setattr(self, key, settings[f"Cluster.{key}"])

    @classmethod
    def from_settings(cls, settings: config.Settings, **kwargs: Any) -> "Cluster":
        """The cluster that `ipcluster start` or `engines` was asked for."""
        self = cls(profile_dir=settings.profile_dir, cluster_id=settings["Application.cluster_id"], load_profile=False,
                   **kwargs)
        self._take(config.Settings(config.START, settings.profile_dir, settings.layers))
        self.controller_args = self.controller_args + settings.rest
        self.log_level = settings["Application.log_level"]
        return self

    # ---------------------------------------------------------------- starting

    def start_controller_sync(self, **options: Any) -> None:
        """Start the controller; returns when it is started, not when it is ready.

        Args:
            options: for the launcher, over those of the configuration.

        Raises:
            AlreadyRunning: a cluster with this id runs.
            LauncherError: it can't be started.
        """
        if self.controller is not None and self.controller.running:
            raise AlreadyRunning(f"The controller of {label(self.cluster_id)} runs already.")
        self._closing.clear()
        config.make_profile_dir(self.profile_dir)
        lock = self.cluster_file.with_suffix(".lock") if self.cluster_file else None
        with config.locked(lock) if lock else contextlib.nullcontext():  # of several that start at once, one wins
            self._clear_the_way()
            self.controller = self._launcher(self.controller_launcher_class, self._with_file(options),
                                             self._controller_flags())
            with launchers.held_back():
                self.controller.noted = self.write_cluster_file
                self.controller.start()
                self.started, self._noted = time.time(), False
                if self.shutdown_atexit:
                    atexit.register(self._at_exit)
                self.write_cluster_file()
        self.log.info("Started the controller %r", self.controller)
        self._controller_options = options
        if self._restarts:
            self.controller.on_stop(functools.partial(self._on_controller_stop, self.controller, time.monotonic()))

    def _on_controller_stop(self, launcher: launchers.ControllerLauncher, begun: float, data: Dict[str, Any]) -> None:
        """The controller has ended: start it anew, unless it was told to stop."""
        if launcher is not self.controller or launcher is self._stopped or data.get("exit_code") == 0:
            return
        self._controller_failures = self._controller_failures + 1 if time.monotonic() - begun < QUICK_S else 0
        self.log.warning("The controller %s.", data.get("reason", "ended"))
        if self._controller_failures > FAILURES_MAX:
            self.log.error("The controller ended %d times in turn within %g s: it is not started again.", FAILURES_MAX, QUICK_S)
            return
        if self._closing.wait(2.0 ** max(0, self._controller_failures - 2) - 1.0) or launcher is not self.controller:
            return
        try:
            self.controller = None
            self.write_cluster_file()
            self.start_controller_sync(**self._controller_options)
        except UserError as e:
            self.log.error("The controller could not be started anew: %s", e)

    def start_engines_sync(self, n: Optional[int] = None, engine_set_id: Optional[str] = None, **options: Any) -> str:
        """Start a set of engines; returns its id when it is started, not when it is ready.

        Args:
            n: how many (default: the cluster's n).
            engine_set_id: default: the first free number.
            options: for the launcher, over those of the configuration.
        """
        n = self.n if n is None else n
        if n < 1:
            raise ConfigError(f"n needs a whole number above 0, not {n!r}.")
        numbers = (str(number) for number in range(len(self.engines) + 1))
        engine_set_id = engine_set_id or next(number for number in numbers if number not in self.engines)
        config.make_profile_dir(self.profile_dir)
        if self.send_engines_connection_env or self.engine_launcher_class.sends_connection:
            text = json.dumps(config.read_json(self.connection_file("engine")))
            options["environment"] = {**options.get("environment", {}), "IPP_CONNECTION_INFO": text}
        launcher = self._launcher(self.engine_launcher_class, options, [f"--timeout={self.engine_timeout:g}"], n=n)
        launcher.noted = self.write_cluster_file
        launcher.on_part_stop(functools.partial(self._on_part_stop, launcher))
        with contextlib.nullcontext() if launcher.queued else launchers.held_back():  # many jobs hold back each for itself
            self.engines[engine_set_id] = launcher  # before it starts, so that each job is noted once it is submitted
            try:
                launcher.start()
            except BaseException:
                if not launcher.running:
                    del self.engines[engine_set_id]
                raise
            if self.shutdown_atexit:
                atexit.register(self._at_exit)
            self.write_cluster_file()
        if self.keep_engines:
            self._begun[launcher] = time.monotonic()
            launcher.on_stop(lambda data: None if launcher.ended_parts else self._replace(launcher, data))
        self.log.info("Started %d engines%s: %r", launcher.n, self._n_source if n == self.n else "", launcher)
        return engine_set_id

    def start_cluster_sync(self, n: Optional[int] = None) -> "Cluster":
        """Start the controller and `n` engines; returns itself when the controller is ready.

        Raises:
            AlreadyRunning: a cluster with this id runs.
            LauncherError: something ended before it was ready; names the reason. Nothing is left behind.
        """
        with self._all_or_nothing():
            self.start_controller_sync()
            self._before_engines()
            self.start_engines_sync(n)
            self.connection_file()
        return self

    def _before_engines(self) -> None:
        """Wait as long as `delay` says, and until a controller that had to queue is there: engines that were given
        their nodes before would waste them."""
        if self.controller is not None and self.controller.queued:
            self.connection_file()
        time.sleep(self.delay)

    def connect_client_sync(self, **kwargs: Any) -> Any:
        """A `Client` of this cluster; `kwargs` are the client's."""
        from .client import Client

        kwargs.setdefault("timeout", self.engine_timeout)
        return Client(os.fspath(self.connection_file()), cluster=self, **kwargs)

    def start_and_connect_sync(self, n: Optional[int] = None) -> Any:
        """Start everything; returns a connected `Client` when all engines are there.

        Raises:
            AlreadyRunning, LauncherError: as `start_cluster_sync`; nothing is left behind.
        """
        n = self.n if n is None else n
        with self._all_or_nothing():
            if self.controller is None:
                self.start_controller_sync()
                self._before_engines()
            if not self.engines:
                self.start_engines_sync(n)
            client = self.connect_client_sync()
            try:
                self.wait_for_engines(client, min(n, self.size))
            except BaseException:
                client.close()
                raise
        return client

    @contextlib.contextmanager
    def _all_or_nothing(self) -> Iterator[None]:
        try:
            yield
        except AlreadyRunning:
            raise  # it is another's, or was there before
        except BaseException:
            self.stop_cluster_sync()
            raise

    def connection_file(self, role: str = "client") -> Path:
        """Path of the connection file of a role, once the controller that we started has written it.

        Raises:
            LauncherError: the controller or the engines ended, or `engine_timeout` passed.
        """
        path, trouble = config.connection_file(self.profile_dir, self.cluster_id, role), ""
        waited = Stopwatch(lambda: self.controller is not None and _queues(self.controller))
        while self.controller is not None:
            try:
                if self.controller.wrote(config.read_connection(path, role)):
                    break
                trouble = f"{path} is of another one."
            except ConnectionFileError as e:
                trouble = str(e)
            if waited() > self.engine_timeout:
                raise LauncherError(f"The controller was not ready in {self.engine_timeout:g} s: {trouble}"
                                    + self._tails([self.controller]))
            self._check_processes()
            time.sleep(QUEUE_POLL_S if self.controller.queued else POLL_S)
        return path

    def wait_for_engines(self, client: Any, n: int) -> None:
        """Wait until `n` engines are registered with the controller.

        Raises:
            LauncherError: something ended before, or `engine_timeout` passed.
        """
        try:
            client.wait_for_engines(n, timeout=self.engine_timeout)
        except KernelError as e:
            self._check_processes()  # tells more
            raise LauncherError(f"Before {n} engines were ready, {e}.") from None
        except TimeoutError:
            raise LauncherError(f"{len(client.ids)} of {n} engines were ready after {self.engine_timeout:g} s."
                                + self._tails(self.engines.values())) from None

    def _engines_ended(self) -> str:
        """Why engines of ours will never come, or ""; `Client.wait_for_engines` asks."""
        return next((trouble for trouble in map(self._trouble, self.engines.values()) if trouble), "")

    def _trouble(self, launcher: launchers.BaseLauncher) -> str:
        """Why what it started, or a part of it, will never be ready, as the end of a sentence, or ""."""
        if launcher.state == "before" or launcher in self._begun and self._failures <= FAILURES_MAX:
            return ""
        if not launcher.running:
            return str(launcher.stop_data.get("reason", "ended"))
        if launcher.ended_parts:
            return str(launcher.ended_parts[0].get("reason", "ended in part"))
        return launcher.held()

    def _queueing(self) -> bool:
        """Do engines of ours wait in a queue? `Client.wait_for_engines` asks."""
        return any(map(_queues, self.engines.values()))

    def _check_processes(self) -> None:
        everything: List[launchers.BaseLauncher] = [*self.engines.values(), *filter(None, [self.controller])]
        for launcher in reversed(everything):
            trouble = self._trouble(launcher)
            if trouble:
                what = {"controller": "controller", "engine": "engines"}[launcher.role]
                raise LauncherError(f"The {what} of {label(self.cluster_id)} {trouble}." + self._tails([launcher]))

    def _on_part_stop(self, launcher: launchers.EngineLauncher, data: Dict[str, Any]) -> None:
        """A job of an engine set has ended: say so, and have the controller take its engines as gone at once."""
        tail = launcher.get_output(TAIL_LINES) if data.get("exit_code") != 0 else ""
        self.log.warning("%d engines %s.%s", data.get("n", launcher.n), data["reason"],
                         f" The last lines of its output:\n{tail}" if tail else "")
        threading.Thread(target=self._after_part, args=(launcher, data), name="after a job", daemon=True).start()

    def _after_part(self, launcher: launchers.EngineLauncher, data: Dict[str, Any]) -> None:
        if data.get("tag") and self.controller is not None and self.controller.running:
            try:
                with self.connect_client_sync(timeout=GONE_S) as client:
                    client.engines_gone(data["tag"], str(data.get("job", data["reason"])))
            except IPythonError as e:
                self.log.debug("The controller was not told: %s", e)
        self._replace(launcher, data)

    def _replace(self, launcher: launchers.EngineLauncher, data: Dict[str, Any]) -> None:
        """Start as many engines as have ended without having been told to, if they are to be kept."""
        begun = self._begun.get(launcher)
        if begun is None:
            return
        failed = data.get("exit_code") != 0 and time.monotonic() - begun < QUICK_S
        self._failures = self._failures + 1 if failed else 0
        if self._failures > FAILURES_MAX:
            self.log.error("Engines ended %d times in turn within %g s: they are not started again.", FAILURES_MAX, QUICK_S)
            return
        if (self._closing.wait(2.0 ** self._failures - 1.0) or self._told_to_stop() or self.controller is None
                or not self.controller.running):
            return
        lost = data.get("n", launcher.n)
        launcher.n -= lost
        if launcher.n <= 0:
            self.engines = {name: other for name, other in self.engines.items() if other is not launcher}
        self.log.info("Starting %d engines in place of those that are gone: %s", lost, data.get("reason", "they ended"))
        try:
            self.start_engines_sync(lost)
        except UserError as e:
            self.log.error("Engines that are gone could not be replaced: %s", e)

    def _tails(self, ended: Iterable[launchers.BaseLauncher]) -> str:
        tails = [launcher.get_output(TAIL_LINES) for launcher in ended]
        return "".join(f" The last lines of its log:\n{tail}" for tail in tails if tail)

    def _launcher(self, kind: Type[launchers.BaseLauncher], options: Dict[str, Any], args: List[str],
                  **more: Any) -> Any:
        section = self._section(kind)
        if self.log_level is not None:
            args = [f"--log-level={self.log_level}"] + args
        if self._settings["Application.log_url"]:
            args = [f"--log-url={self._settings['Application.log_url']}"] + args
        environment = {**section.get("environment", {}), **options.get("environment", {})}
        return kind(profile_dir=self.profile_dir, cluster_id=self.cluster_id, args=args, owned=self.shutdown_atexit,
                    options={**section, **options, "environment": environment}, **more)

    def _section(self, kind: Type[launchers.BaseLauncher]) -> Dict[str, Any]:
        """What the configuration says to a launcher, and to what it derives from."""
        return self._settings.section(*(c.__name__ for c in reversed(kind.__mro__)))

    def _with_file(self, options: Dict[str, Any]) -> Dict[str, Any]:
        """The controller removes a cluster file in an unusual place, too, if it outlives us."""
        if self.cluster_file in (None, config.cluster_file(self.profile_dir, self.cluster_id)):
            return options
        environment = {**options.get("environment", {}), "IPP_CLUSTER_FILE": os.path.abspath(self.cluster_file or "")}
        return {**options, "environment": environment}

    def _controller_flags(self) -> List[str]:
        flags = [f"--ip={self.controller_ip}"] if self.controller_ip else []
        flags += [f"--location={self.controller_location}"] if self.controller_location else []
        local = not (self.engine_launcher_class.remote or self.controller_launcher_class.remote)
        asked = [key for layer in config.load("controller", self.profile_dir).layers for key in layer] + [
            arg.partition("=")[0] for arg in self.controller_args + flags]
        network = ("ip", "location", "ports", "port", "transport", *(f"{role}_{key}" for role in ("client", "engine")
                                                             for key in ("ip", "ports", "transport")))
        if self.engine_launcher_class.queued or self.keep_engines:
            flags.append("--no-engine-timeout=0")  # others come, when there is room for them
        if local and not any(key.lstrip("-").rpartition(".")[2].replace("-", "_") in network for key in asked):
            flags.append("--transport=ipc")  # nobody needs a TCP port
        if not local and not any(key.lstrip("-").rpartition(".")[2] == "ip" for key in asked):
            flags.append("--ip=*")
        return flags + self.controller_args + (["--reuse"] if self._restarts else [])

    def _clear_the_way(self) -> None:
        """Make sure that no cluster with our id runs, and remove what a dead one left."""
        try:
            found = Cluster.from_file(self.cluster_file) if self.cluster_file else None
        except NoCluster:
            found = None
        except ConnectionFileError as e:
            found = None
            self.log.warning("%s It is replaced.", e)
        if found is not None and found.controller is not None:
            raise AlreadyRunning(f"{label(self.cluster_id)} is already running in {self.profile_dir}; stop it, or "
                                 "choose another cluster id.")
        left: List[Tuple[Path, Dict[str, Any], str]] = []
        for role in ("client", "engine"):
            path = config.connection_file(self.profile_dir, self.cluster_id, role)
            try:
                info = config.read_connection(path)
            except ConnectionFileError:
                continue
            dead = config.dead_run(info)
            if not dead and info.get("reuse") and self.controller_launcher_class.remote and info["host"] != socket.gethostname():
                continue  # a copy; whether its controller still runs is seen on that host
            if not dead:
                raise AlreadyRunning(f"A controller (pid {info['pid']} on {info['host']}) already serves "
                                     f"{label(self.cluster_id)}; stop it, choose another cluster id, or remove {path} "
                                     "if it is gone.")
            left.append((path, info, dead))
        if found is not None:
            self.log.info("%s ended without cleaning up: %s", label(self.cluster_id), found.reason)
            found.stop_cluster_sync()
        for path, info, dead in left:
            config.remove_sockets(info)
            if not info.get("reuse"):
                self.log.info("Removing %s: %s.", path, dead)
                path.unlink(missing_ok=True)

    # ---------------------------------------------------------------- stopping and signalling

    def stop_engines_sync(self, engine_set_id: Optional[str] = None) -> None:
        """Stop one engine set, or all.

        Raises:
            LauncherError: some could not be stopped.
        """
        trouble: Optional[LauncherError] = None
        for name in list(self.engines) if engine_set_id is None else [engine_set_id]:
            launcher = self._engine_set(name)
            self._begun.pop(launcher, None)
            if launcher.tag and not launcher.queued and launcher.stop_signal == launchers.BaseLauncher.stop_signal:
                self._have_leave(launcher)
            try:
                launcher.stop()
            except LauncherError as e:
                trouble = trouble or e  # the others are to stop nevertheless
                continue
            del self.engines[name]
            self.write_cluster_file()
        if trouble is not None:
            raise trouble

    def _have_leave(self, launcher: launchers.EngineLauncher) -> None:
        """Have engines leave that would otherwise be killed, more or less, and the controller know at once that they have."""
        with contextlib.suppress(IPythonError, OSError, RuntimeError):  # no controller, or no new threads, as Python ends
            with self.connect_client_sync(timeout=LEAVE_S) as client:
                client.shutdown(_members(client, launcher))
                launcher.join(LEAVE_S)
                launcher.stop()
                client.engines_gone(launcher.tag, "it was told to stop")

    def stop_controller_sync(self) -> None:
        """Stop the controller."""
        if self.controller is not None:
            self._stopped = self.controller
            self.controller.stop()
            self.controller = None
            self.write_cluster_file()

    def stop_cluster_sync(self) -> None:
        """Stop the engines and the controller, and remove the cluster file and what a killed controller left."""
        self._closing.set()
        if self.keep_engines:
            self.write_cluster_file()  # so that who keeps the engines knows that they are to end
        try:
            self.stop_engines_sync()
        finally:
            owned = self.controller
            self.stop_controller_sync()
            self.write_cluster_file()  # which goes, unless there are jobs that could not be cancelled
            atexit.unregister(self._at_exit)
            self._remove_connection_files(owned)

    def restart_engines_sync(self, engine_set_id: Optional[str] = None) -> None:
        """Stop one engine set, or all, and start as many engines again."""
        for name in list(self.engines) if engine_set_id is None else [engine_set_id]:
            launcher = self._engine_set(name)
            self.stop_engines_sync(name)
            self.start_engines_sync(launcher.asked, name)

    def signal_engines_sync(self, signum: int, engine_set_id: Optional[str] = None) -> None:
        """Send a signal to the engines of one set, or to all; `signal.SIGINT` interrupts what they run."""
        for name in list(self.engines) if engine_set_id is None else [engine_set_id]:
            launcher = self._engine_set(name)
            if not launcher.tag:
                launcher.signal(signum)
                continue
            with self.connect_client_sync() as client:
                ids = _members(client, launcher)
                if ids or not launcher.queued:
                    client.send_signal(signum, ids)
                else:  # a template of the user's did not hand the name of the set on
                    launcher.signal(signum)

    def restart_controller_sync(self) -> None:
        """Stop the controller and start it again; returns when it is ready.

        With `--reuse` among `controller_args`, or `restart_controller=True`, the engines come back to it, with what they hold;
        otherwise as many are started anew. Unfinished tasks are lost, unless `--reuse` goes with records that last
        (`--sqlitedb`): then they go on, and clients come back by themselves.
        """
        args, info = list(self.controller_args), config.read_json(self.connection_file())
        keep = bool(info.get("reuse"))
        sets = {} if keep else {name: launcher.asked for name, launcher in self.engines.items()}
        for name in sets:
            self.stop_engines_sync(name)
        self.stop_controller_sync()
        self.start_controller_sync()
        for name, n in sets.items():
            self.start_engines_sync(n, name)
        self.connection_file()
        self.controller_args = args

    def stop_engine_sync(self, engine_id: int) -> None:
        """Stop one engine; returns when it has left.

        Raises:
            IndexError: there is no such engine.
        """
        with self.connect_client_sync() as client:
            client.shutdown(engine_id)
            deadline = time.monotonic() + self.engine_timeout
            while engine_id in client.ids:
                if time.monotonic() > deadline:
                    raise LauncherError(f"Engine {engine_id} has not stopped in {self.engine_timeout:g} s.")
                time.sleep(POLL_S)

    def restart_engine_sync(self, engine_id: int) -> None:
        """Put a new engine in the place of one, with its id and an empty namespace; returns when it is there.

        Raises:
            IndexError: there is no such engine.
        """
        with self.connect_client_sync() as client:
            client.shutdown(engine_id, restart=True, block=True)

    def signal_engine_sync(self, signum: int, engine_id: int) -> None:
        """Send a signal to one engine; `signal.SIGINT` interrupts what it runs.

        Raises:
            IndexError: there is no such engine.
        """
        with self.connect_client_sync() as client:
            client.send_signal(signum, engine_id)

    start_controller = _awaitable(start_controller_sync)
    start_engines = _awaitable(start_engines_sync)
    start_cluster = _awaitable(start_cluster_sync)
    start_and_connect = _awaitable(start_and_connect_sync)
    connect_client = _awaitable(connect_client_sync)
    stop_engines = _awaitable(stop_engines_sync)
    stop_controller = _awaitable(stop_controller_sync)
    stop_cluster = _awaitable(stop_cluster_sync)
    restart_engines = _awaitable(restart_engines_sync)
    signal_engines = _awaitable(signal_engines_sync)
    restart_controller = _awaitable(restart_controller_sync)
    stop_engine = _awaitable(stop_engine_sync)
    restart_engine = _awaitable(restart_engine_sync)
    signal_engine = _awaitable(signal_engine_sync)

    def _engine_set(self, name: str) -> launchers.EngineLauncher:
        if name not in self.engines:
            raise KeyError(f"there is no engine set {name!r}; there are {list(self.engines)}")
        return self.engines[name]

    def _remove_connection_files(self, controller: Optional[launchers.ControllerLauncher]) -> None:
        for role in ("client", "engine"):
            path = config.connection_file(self.profile_dir, self.cluster_id, role)
            try:
                info = config.read_connection(path)
                if config.dead_run(info) or controller is not None and controller.wrote(info):
                    config.remove_sockets(info)
                    if not info.get("reuse") or self._restarts and not {"--reuse", "--restore"} & set(self.controller_args):
                        path.unlink(missing_ok=True)
                        config.connection_file(self.profile_dir, self.cluster_id, "peers").with_suffix("").unlink(missing_ok=True)
            except ConnectionFileError:
                pass  # it is not there, or not ours

    def _at_exit(self) -> None:
        if os.getpid() == self._pid:
            self.stop_cluster_sync()

    def __enter__(self) -> Any:
        self._client = self.start_and_connect_sync()
        return self._client

    def __exit__(self, *exc: Any) -> None:
        client, self._client = self._client, None
        try:
            if client is not None:
                client.close()
        finally:
            self.stop_cluster_sync()

    async def __aenter__(self) -> Any:
        self._client = await self.start_and_connect()
        return self._client

    async def __aexit__(self, *exc: Any) -> None:
        import asyncio

        await asyncio.get_running_loop().run_in_executor(None, self.__exit__)

    # ---------------------------------------------------------------- state and cluster file

    def status(self) -> Dict[str, Any]:
        """How the controller and each engine set are: `{"controller": ..., "engines": {engine_set_id: ...}}`, each with
        `state`, `reason`, and `jobs` if it consists of batch jobs."""
        return {"controller": self.controller.status() if self.controller is not None else None,
                "engines": {name: launcher.status() for name, launcher in self.engines.items()}}

    def job_script(self, role: str = "engine", n: Optional[int] = None) -> str:
        """What would be submitted to a batch system, or run, for the `role` of engine or controller; nothing is."""
        if role == "controller":
            launcher = self._launcher(self.controller_launcher_class, {}, self._controller_flags())
        else:
            launcher = self._launcher(self.engine_launcher_class, {}, [f"--timeout={self.engine_timeout:g}"],
                                      n=self.n if n is None else n)
        return str(launcher.job_script())

    @property
    def engine_set(self) -> Optional[launchers.EngineLauncher]:
        """The first engine set."""
        return next(iter(self.engines.values()), None)

    @property
    def size(self) -> int:
        """How many engines were started."""
        return sum(launcher.n for launcher in self.engines.values())

    @property
    def running(self) -> bool:
        """Does the controller run, or any engine set?"""
        return any(launcher.running for launcher in (self.controller, *self.engines.values()) if launcher is not None)

    def to_dict(self) -> Dict[str, Any]:
        """What the cluster file holds: how it was made, and the state of each launcher. No secrets."""
        how = {**{key: getattr(self, key) for key in KEPT}, "profile_dir": os.fspath(self.profile_dir)}
        kind = type(self)
        more = {} if kind is Cluster else {"class": f"{kind.__module__}.{kind.__qualname__}"}
        found: Dict[str, Any] = {"cluster": {**how, "host": self.host, "started": self.started, **more,
                                             "stopping": self._closing.is_set()}}
        if self.controller is not None:
            found["controller"] = {"class": launchers.launcher_name(type(self.controller)),
                                   "state": self.controller.to_dict()}
        if self.engines:
            found["engines"] = {"class": launchers.launcher_name(self.engine_launcher_class), "sets": {
                name: {"class": launchers.launcher_name(type(launcher)), **launcher.to_dict()}
                for name, launcher in self.engines.items()}}
        return found

    @classmethod
    def from_dict(cls, state: Dict[str, Any], **kwargs: Any) -> "Cluster":
        """The cluster that `to_dict` described, of the class it had. What has ended since is left out; `reason` says
        why."""
        name = state["cluster"].get("class")
        if name and cls is Cluster:
            cls = _import_class(name)
        how, engines, controller = state["cluster"], state.get("engines", {}), state.get("controller", {})
        self = cls(**{**{key: how[key] for key in KEPT}, "engines": engines.get("class"),
                      "controller": controller.get("class"), "shutdown_atexit": False, **kwargs})
        self.started, self.host = how["started"], how["host"]
        wanted: List[Tuple[str, Any, Dict[str, Any]]] = [
            (name, launchers.find_launcher("engine", its_state.get("class", self.engine_launcher_class)), its_state)
            for name, its_state in engines.get("sets", {}).items()]
        if controller:
            wanted.append(("", self.controller_launcher_class, controller["state"]))
        for name, kind, its_state in wanted:
            try:
                launcher = kind.from_dict(its_state, self._settings.section(kind.__name__))
            except NotRunning as e:
                self.reason = str(e)
                continue
            if name:
                self.engines[name] = launcher
            else:
                self.controller = launcher
        return self

    @classmethod
    def from_file(cls, cluster_file: Optional[config.PathLike] = None, *, profile: Optional[str] = None,
                  profile_dir: Optional[config.PathLike] = None, cluster_id: str = "", **kwargs: Any) -> "Cluster":
        """The cluster that another process started; without arguments, the one of `ipcluster start`.

        Raises:
            NoCluster: there is no such cluster file.
            ConnectionFileError: it can't be read.
        """
        path = Path(cluster_file or config.cluster_file(config.find_profile_dir(profile, profile_dir), cluster_id))
        if not path.exists():
            raise NoCluster(f"There is no cluster file {path}; `ipcluster list` shows what runs, `ipcluster start` "
                            "starts a cluster.")
        try:
            self = cls.from_dict(config.read_json(path), **{"cluster_file": path, **kwargs})
        except (KeyError, TypeError, AttributeError, ValueError) as e:
            raise ConnectionFileError(f"{path} is no cluster file ({type(e).__name__}: {e}).") from None
        self._noted = True
        return self

    def write_cluster_file(self) -> None:
        """Note in the cluster file what runs; remove the file when nothing does."""
        with self._file_lock:
            self._write_cluster_file()

    def _write_cluster_file(self) -> None:
        if self.cluster_file is None or (self._noted and not self._still_noted()):
            return
        left = any(launcher.queued and launcher.running for launcher in self.engines.values())
        if self.controller is None and not left:
            self.remove_cluster_file()  # engines of someone else's controller are not a cluster
        else:
            config.write_json(self.cluster_file, self.to_dict(), 0o644)
            self._noted = True

    def note_engines(self) -> None:
        """Note our engines in the cluster file of the controller that they belong to, whoever started that, so that
        they are found when it is stopped."""
        path = config.cluster_file(self.profile_dir, self.cluster_id)
        with config.locked(path.with_suffix(".lock")):
            try:
                found = Cluster.from_file(path)
            except (NoCluster, ConnectionFileError):
                found = self
            if not found.running:
                found = self
            if found is self:
                self.started = time.time()
            else:
                numbers = map(str, range(len(found.engines) + len(self.engines)))
                free = [number for number in numbers if number not in found.engines]
                found.engines.update(zip(free, self.engines.values()))
            config.write_json(path, found.to_dict(), 0o644)

    def remove_cluster_file(self) -> None:
        """Remove the cluster file, if this cluster wrote it or came from it."""
        if self.cluster_file is not None and self._noted and self._still_noted():
            self.cluster_file.unlink(missing_ok=True)
        self._noted = False

    def _told_to_stop(self) -> bool:
        """Is somebody stopping this cluster by its file?"""
        try:
            return self.cluster_file is not None and bool(config.read_json(self.cluster_file)["cluster"].get("stopping"))
        except (ConnectionFileError, KeyError):
            return True

    def _still_noted(self) -> bool:
        """Does the cluster file speak of this run? Who stopped it removed it; a new run may have its own."""
        try:
            return bool(config.read_json(self.cluster_file or "")["cluster"]["started"] == self.started)
        except (ConnectionFileError, KeyError, TypeError):
            return False

    def __repr__(self) -> str:
        states = [f"controller={self.controller.state if self.controller else 'none'}"]
        states += [f"engines[{name}]={launcher.n} {launcher.state}" for name, launcher in self.engines.items()]
        return f"<Cluster(cluster_id={self.cluster_id!r}, profile_dir={str(self.profile_dir)!r}, {', '.join(states)})>"


def _import_class(name: str) -> Type[Cluster]:
    """The subclass of `Cluster` with this dotted path.

    Raises:
        ConfigError: there is none.
    """
    from importlib import import_module

    module, _, attribute = name.rpartition(".")
    try:
        found = getattr(import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as e:
        raise ConfigError(f"The cluster's class {name!r} can't be imported: {e}.") from None
    if not (isinstance(found, type) and issubclass(found, Cluster)):
        raise ConfigError(f"The cluster's class {name!r} is no Cluster.")
    return found


# ---------------------------------------------------------------- many clusters


def all_profile_dirs(ipython_dir: Optional[config.PathLike] = None) -> List[Path]:
    """The directories of all profiles."""
    return sorted(config.profile_path(None, None, ipython_dir).parent.glob("profile_*/"))


def cluster_files(folders: Iterable[config.PathLike]) -> List[Path]:
    """The cluster files of some profile directories."""
    return [path for folder in folders for path in sorted(Path(folder, "security").glob("cluster-*.json"))]


class ClusterManager:
    """The clusters of some profiles. Attribute `clusters`: `{"<profile>:<cluster_id>": cluster}`."""

    def __init__(self) -> None:
        self.clusters: Dict[str, Cluster] = {}

    def load_clusters(self, *, profile_dirs: Optional[Iterable[config.PathLike]] = None,
                      profile_dir: Optional[config.PathLike] = None, profiles: Optional[Iterable[str]] = None,
                      profile: Optional[str] = None, init_default_clusters: bool = False) -> Dict[str, Cluster]:
        """Load what the cluster files say, of all profiles if none is named; returns what runs, and with
        `init_default_clusters` a cluster, not started, for each profile in which none runs."""
        folders = [Path(folder) for folder in profile_dirs or ()]
        folders += [config.find_profile_dir(name) for name in profiles or ()]
        if profile or profile_dir:
            folders.append(config.find_profile_dir(profile, profile_dir))
        self.clusters = {}
        for path in cluster_files(folders or all_profile_dirs()):
            try:
                cluster = Cluster.from_file(path)
            except UserError as e:
                config.log("cluster").warning("%s", e)
                continue
            if cluster.running:
                self.clusters[self._key(cluster)] = cluster
        busy = {cluster.profile_dir for cluster in self.clusters.values()}
        for folder in folders or all_profile_dirs() if init_default_clusters else ():
            if folder not in busy:
                self.new_cluster(profile_dir=folder, cluster_id="", shutdown_atexit=False)
        return self.clusters

    def new_cluster(self, **kwargs: Any) -> Tuple[str, Cluster]:
        """A new cluster, not yet started, and its key; `kwargs` are those of `Cluster`.

        Raises:
            KeyError: there is one with this key.
        """
        cluster = Cluster(**kwargs)
        key = self._key(cluster)
        if key in self.clusters:
            raise KeyError(f"there is a cluster {key!r} already")
        self.clusters[key] = cluster
        return key, cluster

    def get_cluster(self, key: str) -> Cluster:
        """The cluster of a key. Raises KeyError if there is none."""
        return self.clusters[key]

    def remove_cluster(self, key: str) -> None:
        """Forget a cluster; it is not stopped."""
        del self.clusters[key]

    @staticmethod
    def _key(cluster: Cluster) -> str:
        return f"{profile_name(cluster.profile_dir)}:{cluster.cluster_id}"


def profile_name(profile_dir: Path) -> str:
    """The name of a profile, or its path if it has none."""
    prefix, _, name = profile_dir.name.partition("profile_")
    return name if not prefix and name else os.fspath(profile_dir)


def clean_cluster_files(profile_dirs: Optional[Iterable[config.PathLike]] = None, *, log: Any = None,
                        force: bool = False) -> List[Path]:
    """Remove the cluster and connection files of dead clusters, and all logs, of some profiles (default: all).

    Returns:
        What was removed.

    Raises:
        AlreadyRunning: a cluster runs there; with `force` it is stopped.
    """
    folders = [Path(folder) for folder in (all_profile_dirs() if profile_dirs is None else profile_dirs)]
    removed = cluster_files(folders)
    for path in removed:
        try:
            cluster = Cluster.from_file(path)
        except ConnectionFileError as e:
            (log or config.log("cluster")).warning("%s", e)
            path.unlink()
            continue
        if cluster.running and not force:
            raise AlreadyRunning(f"{label(cluster.cluster_id)} runs in {cluster.profile_dir}; stop it or use --force.")
        cluster.stop_cluster_sync()
    for folder in folders:
        files = [*folder.glob("security/*.lock"), *folder.glob("security/ipcontroller*-lock")]
        busy = [] if force else _live_controllers(folder)
        files += folder.glob("security/ipcontroller*-peers") if not busy else []
        for path in folder.glob("security/ipcontroller*.json"):
            if path not in busy:
                _remove_sockets_of(path)
                files.append(path)
        files += folder.glob("log/*.log") if not busy else config.clean_logs(folder)
        for path in files:
            path.unlink(missing_ok=True)
            removed.append(path)
    return removed


def _remove_sockets_of(path: Path) -> None:
    with contextlib.suppress(ConnectionFileError):  # it is not ours, or garbage
        config.remove_sockets(config.read_connection(path))


def _live_controllers(profile_dir: Path) -> List[Path]:
    """Connection files of controllers that run, or may."""
    alive = []
    for path in profile_dir.glob("security/ipcontroller*.json"):
        try:
            if not config.dead_run(config.read_connection(path)):
                alive.append(path)
        except ConnectionFileError as e:
            config.log("cluster").warning("%s", e)
    return alive


def main(argv: Optional[List[str]] = None) -> int:
    """`ipcluster`: the command line. It builds on this file, so that it is looked up when asked for."""
    from importlib import import_module

    return int(import_module(".ipcluster", __package__).main(argv))


if __name__ == "__main__":
    sys.exit(main())
