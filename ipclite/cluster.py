"""`Cluster` starts, watches and stops a controller and engines; `ipcluster` does so from the shell.

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
import os
import random
import signal
import socket
import string
import sys
import time
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Awaitable, Callable, Dict, Iterable, Iterator, List, NoReturn, Optional, Tuple, Type, Union

from . import config, launchers
from .errors import (EXIT_FAILURE, AlreadyRunning, AlreadyStopped, ConfigError, ConnectionFileError, IPythonError,
                     KernelError, LauncherError, NoCluster, UserError)

POLL_S = 0.005  # between two looks for the controller's connection file
TAIL_LINES = 20
KEPT = ("n", "cluster_id", "profile_dir", "controller_args", "controller_ip", "controller_location", "engine_timeout")
Launcher = Union[str, Type[launchers.BaseLauncher]]


def available_cpus() -> int:
    """The CPUs that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _new_id() -> str:
    return f"{int(time.time())}-{''.join(random.SystemRandom().choices(string.ascii_lowercase + string.digits, k=4))}"


def _label(cluster_id: str) -> str:
    return f"cluster {cluster_id!r}" if cluster_id else "the default cluster"


def _awaitable(method: Callable[..., Any]) -> Callable[..., Awaitable[Any]]:
    """The method as a coroutine, which runs it in a thread."""
    async def run(self: "Cluster", *args: Any, **kwargs: Any) -> Any:
        import asyncio

        return await asyncio.get_running_loop().run_in_executor(None, functools.partial(method, self, *args, **kwargs))

    run.__name__ = method.__name__[: -len("_sync")]
    run.__doc__ = f"`{method.__name__}` as a coroutine."
    return run


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
        profile: name of the profile, created if need be. profile_dir: or its directory.
        cluster_id: tells apart the clusters of a profile (default: a new one; "" is what `ipcluster start` uses).
        cluster_file: where to note what was started (default: in the profile); "" for nowhere.
        shutdown_atexit: stop it when this process ends, however it ends.
        log_level: log to stderr, from this level on; the controller and engines log from it on, too.
        load_profile: take what is not given from the profile's ipcluster_config.py.

    Attributes: `controller` (its launcher, or None), `engines` (`{engine_set_id: launcher}`).
    """

    def __init__(self, *, n: Optional[int] = None, engines: Optional[Launcher] = None,
                 engine_launcher_class: Optional[Launcher] = None, controller: Optional[Launcher] = None,
                 controller_launcher_class: Optional[Launcher] = None, controller_ip: Optional[str] = None,
                 controller_location: Optional[str] = None, controller_args: Optional[List[str]] = None,
                 engine_timeout: Optional[float] = None, profile: Optional[str] = None,
                 profile_dir: Optional[config.PathLike] = None, cluster_id: Optional[str] = None,
                 cluster_file: Optional[config.PathLike] = None, shutdown_atexit: bool = True,
                 log_level: Union[int, str, None] = None, load_profile: bool = True):
        for short, long in (("engines", engine_launcher_class), ("controller", controller_launcher_class)):
            if long is not None and {"engines": engines, "controller": controller}[short] is not None:
                raise TypeError(f"{short} and {short.rstrip('s')}_launcher_class are the same; give one of them")
        given = {"n": n, "engine_launcher_class": engines or engine_launcher_class,
                 "controller_launcher_class": controller or controller_launcher_class, "controller_ip": controller_ip,
                 "controller_location": controller_location, "controller_args": controller_args,
                 "engine_timeout": engine_timeout}
        layer = {f"Cluster.{key}": config.Given(value, key) for key, value in given.items() if value is not None}
        self.profile_dir = config.profile_path(profile, profile_dir)
        self._take(config.load(config.START, self.profile_dir, layer) if load_profile else
                   config.Settings(config.START, self.profile_dir, [layer]))
        self.cluster_id = _new_id() if cluster_id is None else cluster_id
        default_file = config.cluster_file(self.profile_dir, self.cluster_id)
        self.cluster_file = default_file if cluster_file is None else Path(cluster_file) if cluster_file else None
        self.shutdown_atexit, self.log_level = shutdown_atexit, log_level
        if log_level is not None:
            config.setup_logging("cluster", log_level)
        self.log = config.log("cluster")
        self.controller: Optional[launchers.ControllerLauncher] = None
        self.engines: Dict[str, launchers.EngineLauncher] = {}
        self.started: Optional[float] = None
        self.host = socket.gethostname()
        self.reason = ""  # why the controller of a cluster from a file is not running, as its log tells
        self._pid = os.getpid()  # a forked child does not own the cluster
        self._client: Any = None
        self._noted = False  # is the cluster file ours?

    def _take(self, settings: config.Settings) -> None:
        """Take what the command line, the config file and the arguments say."""
        self._settings = settings
        self.n: int = settings["Cluster.n"] or available_cpus()
        self.engine_launcher_class = launchers.find_launcher("engine", settings["Cluster.engine_launcher_class"])
        self.controller_launcher_class = launchers.find_launcher(
            "controller", settings["Cluster.controller_launcher_class"])
        self.controller_ip: str = settings["Cluster.controller_ip"]
        self.controller_location: str = settings["Cluster.controller_location"]
        self.controller_args: List[str] = settings["Cluster.controller_args"]
        self.engine_timeout: float = settings["Cluster.engine_timeout"]

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
            raise AlreadyRunning(f"The controller of {_label(self.cluster_id)} runs already.")
        config.make_profile_dir(self.profile_dir)
        self._clear_the_way()
        self.controller = self._launcher(self.controller_launcher_class, options, self._controller_flags())
        self.controller.start()
        self.started = time.time()
        if self.shutdown_atexit:
            atexit.register(self._at_exit)
        self.write_cluster_file()
        self.log.info("Started the controller %r", self.controller)

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
        launcher = self._launcher(self.engine_launcher_class, options, [f"--timeout={self.engine_timeout:g}"], n=n)
        launcher.start()
        self.engines[engine_set_id] = launcher
        if self.shutdown_atexit:
            atexit.register(self._at_exit)
        self.write_cluster_file()
        self.log.info("Started %d engines %r", n, launcher)
        return engine_set_id

    def start_cluster_sync(self, n: Optional[int] = None) -> "Cluster":
        """Start the controller and `n` engines; returns itself when the controller is ready.

        Raises:
            AlreadyRunning: a cluster with this id runs.
            LauncherError: something ended before it was ready; names the reason. Nothing is left behind.
        """
        self.start_controller_sync()
        with self._all_or_nothing():
            self.start_engines_sync(n)
            self.connection_file()
        return self

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
        if self.controller is None:
            self.start_controller_sync()
        with self._all_or_nothing():
            if not self.engines:
                self.start_engines_sync(n)
            client = self.connect_client_sync()
            try:
                self.wait_for_engines(client, n)
            except BaseException:
                client.close()
                raise
        return client

    @contextlib.contextmanager
    def _all_or_nothing(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self.stop_cluster_sync()
            raise

    def connection_file(self) -> Path:
        """Path of the client's connection file, once the controller that we started has written it.

        Raises:
            LauncherError: the controller or the engines ended, or `engine_timeout` passed.
        """
        path = config.connection_file(self.profile_dir, self.cluster_id, "client")
        deadline = time.monotonic() + self.engine_timeout
        while self.controller is not None:
            try:
                if self.controller.wrote(config.read_connection(path, "client")):
                    break
            except ConnectionFileError as e:
                if time.monotonic() > deadline:
                    raise LauncherError(f"The controller was not ready in {self.engine_timeout:g} s: {e}") from None
            self._check_processes()
            time.sleep(POLL_S)
        return path

    def wait_for_engines(self, client: Any, n: int) -> None:
        """Wait until `n` engines are registered with the controller.

        Raises:
            LauncherError: something ended before, or `engine_timeout` passed.
        """
        try:
            client.wait_for_engines(n, timeout=self.engine_timeout)
        except KernelError:
            self._check_processes()  # tells more
            raise
        except TimeoutError:
            raise LauncherError(f"{len(client.ids)} of {n} engines were ready after {self.engine_timeout:g} s."
                                + self._tails(self.engines.values())) from None

    def _engines_ended(self) -> str:
        """Why one of our engine sets has ended, or ""; `Client.wait_for_engines` asks."""
        ended = [launcher for launcher in self.engines.values() if not launcher.running]
        return str(ended[0].stop_data.get("reason", "ended")) if ended else ""

    def _check_processes(self) -> None:
        everything: List[launchers.BaseLauncher] = [*self.engines.values(), *filter(None, [self.controller])]
        ended = [launcher for launcher in everything if launcher.state != "before" and not launcher.running]
        if ended:
            what = {"controller": "controller", "engine": "engines"}[ended[-1].role]
            reason = ended[-1].stop_data.get("reason", "ended")
            raise LauncherError(f"The {what} of {_label(self.cluster_id)} {reason}." + self._tails(ended[-1:]))

    def _tails(self, ended: Iterable[launchers.BaseLauncher]) -> str:
        tails = [launcher.get_output(TAIL_LINES) for launcher in ended]
        return "".join(f" The last lines of its log:\n{tail}" for tail in tails if tail)

    def _launcher(self, kind: Type[launchers.BaseLauncher], options: Dict[str, Any], args: List[str],
                  **more: Any) -> Any:
        section = self._settings.section(*(c.__name__ for c in reversed(kind.__mro__)))
        if self.log_level is not None:
            args = [f"--log-level={self.log_level}"] + args
        return kind(profile_dir=self.profile_dir, cluster_id=self.cluster_id, options={**section, **options}, args=args,
                    owned=self.shutdown_atexit, **more)

    def _controller_flags(self) -> List[str]:
        flags = [f"--ip={self.controller_ip}"] if self.controller_ip else []
        flags += [f"--location={self.controller_location}"] if self.controller_location else []
        local = all(kind.name == "local" for kind in (self.engine_launcher_class, self.controller_launcher_class))
        asked = [key for layer in config.load("controller", self.profile_dir).layers for key in layer] + [
            arg.partition("=")[0] for arg in self.controller_args + flags]
        network = ("ip", "location", "ports", "transport")
        if local and not any(key.lstrip("-").rpartition(".")[2] in network for key in asked):
            flags.append("--transport=ipc")  # nobody needs a TCP port
        return flags + self.controller_args

    def _clear_the_way(self) -> None:
        """Make sure that no cluster with our id runs, and remove what a dead one left."""
        try:
            found = Cluster.from_file(self.cluster_file) if self.cluster_file else None
        except NoCluster:
            found = None
        except ConnectionFileError as e:
            found = None
            self.log.warning("%s It is replaced.", e)
        if found is not None:
            if found.controller is not None:
                raise AlreadyRunning(f"{_label(self.cluster_id)} is already running in {self.profile_dir}; stop it, or "
                                     "choose another cluster id.")
            self.log.info("%s ended without cleaning up: %s", _label(self.cluster_id), found.reason)
            found.stop_cluster_sync()
        for role in ("client", "engine"):
            path = config.connection_file(self.profile_dir, self.cluster_id, role)
            try:
                info = config.read_connection(path)
            except ConnectionFileError:
                continue
            dead = config.dead_run(info)
            if not dead:
                raise AlreadyRunning(f"A controller (pid {info['pid']} on {info['host']}) already serves "
                                     f"{_label(self.cluster_id)}; stop it, choose another cluster id, or remove {path} "
                                     "if it is gone.")
            config.remove_sockets(info)
            if not info.get("reuse"):
                self.log.info("Removing %s: %s.", path, dead)
                path.unlink()

    # ---------------------------------------------------------------- stopping and signalling

    def stop_engines_sync(self, engine_set_id: Optional[str] = None) -> None:
        """Stop one engine set, or all."""
        for name in list(self.engines) if engine_set_id is None else [engine_set_id]:
            self._engine_set(name).stop()
            del self.engines[name]
            self.write_cluster_file()

    def stop_controller_sync(self) -> None:
        """Stop the controller."""
        if self.controller is not None:
            self.controller.stop()
            self.controller = None
            self.write_cluster_file()

    def stop_cluster_sync(self) -> None:
        """Stop the engines and the controller, and remove the cluster file and what a killed controller left."""
        try:
            self.stop_engines_sync()
        finally:
            owned = self.controller
            self.stop_controller_sync()
            self.remove_cluster_file()
            atexit.unregister(self._at_exit)
            if owned is not None:
                self._remove_connection_files(owned)

    def restart_engines_sync(self, engine_set_id: Optional[str] = None) -> None:
        """Stop one engine set, or all, and start as many engines again."""
        for name in list(self.engines) if engine_set_id is None else [engine_set_id]:
            launcher = self._engine_set(name)
            self.stop_engines_sync(name)
            self.start_engines_sync(launcher.n, name)

    def signal_engines_sync(self, signum: int, engine_set_id: Optional[str] = None) -> None:
        """Send a signal to the engines of one set, or to all; `signal.SIGINT` interrupts what they run."""
        for name in list(self.engines) if engine_set_id is None else [engine_set_id]:
            self._engine_set(name).signal(signum)

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

    def _engine_set(self, name: str) -> launchers.EngineLauncher:
        if name not in self.engines:
            raise KeyError(f"there is no engine set {name!r}; there are {list(self.engines)}")
        return self.engines[name]

    def _remove_connection_files(self, controller: launchers.ControllerLauncher) -> None:
        for role in ("client", "engine"):
            path = config.connection_file(self.profile_dir, self.cluster_id, role)
            try:
                info = config.read_connection(path)
                if controller.wrote(info):
                    config.remove_sockets(info)
                    if not info.get("reuse"):
                        path.unlink()
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

    @property
    def engine_set(self) -> Optional[launchers.EngineLauncher]:
        """The first engine set."""
        return next(iter(self.engines.values()), None)

    @property
    def running(self) -> bool:
        """Does the controller run, or any engine set?"""
        return any(launcher.running for launcher in (self.controller, *self.engines.values()) if launcher is not None)

    def to_dict(self) -> Dict[str, Any]:
        """What the cluster file holds: how it was made, and the state of each launcher. No secrets."""
        how = {**{key: getattr(self, key) for key in KEPT}, "profile_dir": os.fspath(self.profile_dir)}
        found: Dict[str, Any] = {"cluster": {**how, "host": self.host, "started": self.started}}
        if self.controller is not None:
            found["controller"] = {"class": launchers.launcher_name(type(self.controller)),
                                   "state": self.controller.to_dict()}
        if self.engines:
            found["engines"] = {"class": launchers.launcher_name(self.engine_launcher_class), "sets": {
                name: launcher.to_dict() for name, launcher in self.engines.items()}}
        return found

    @classmethod
    def from_dict(cls, state: Dict[str, Any], **kwargs: Any) -> "Cluster":
        """The cluster that `to_dict` described. What has ended since is left out, and `reason` says why."""
        how, engines, controller = state["cluster"], state.get("engines", {}), state.get("controller", {})
        self = cls(**{**{key: how[key] for key in KEPT}, "engines": engines.get("class"),
                      "controller": controller.get("class"), "shutdown_atexit": False, **kwargs})
        self.started, self.host = how["started"], how["host"]
        wanted: List[Tuple[str, Any, Dict[str, Any]]] = [
            (name, self.engine_launcher_class, its_state) for name, its_state in engines.get("sets", {}).items()]
        if controller:
            wanted.append(("", self.controller_launcher_class, controller["state"]))
        for name, kind, its_state in wanted:
            try:
                launcher = kind.from_dict(its_state, self._settings.section(kind.__name__))
            except launchers.NotRunning as e:
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
        if self.cluster_file is None:
            return
        if self.controller is None:
            self.remove_cluster_file()  # engines of someone else's controller are not a cluster
        else:
            config.write_json(self.cluster_file, self.to_dict(), 0o644)
            self._noted = True

    def remove_cluster_file(self) -> None:
        """Remove the cluster file, if this cluster wrote it or came from it."""
        if self.cluster_file is not None and self._noted and self.cluster_file.exists():
            self.cluster_file.unlink()
        self._noted = False

    def __repr__(self) -> str:
        states = [f"controller={self.controller.state if self.controller else 'none'}"]
        states += [f"engines[{name}]={launcher.n} {launcher.state}" for name, launcher in self.engines.items()]
        return f"<Cluster(cluster_id={self.cluster_id!r}, profile_dir={str(self.profile_dir)!r}, {', '.join(states)})>"


# ---------------------------------------------------------------- many clusters


def _profile_dirs(ipython_dir: Optional[config.PathLike] = None) -> List[Path]:
    return sorted(config.profile_path(None, None, ipython_dir).parent.glob("profile_*/"))


def _cluster_files(profile_dirs: Iterable[config.PathLike]) -> List[Path]:
    return [path for folder in profile_dirs for path in sorted(Path(folder, "security").glob("cluster-*.json"))]


class ClusterManager:
    """The clusters of some profiles. Attribute `clusters`: `{"<profile>:<cluster_id>": cluster}`."""

    def __init__(self) -> None:
        self.clusters: Dict[str, Cluster] = {}

    def load_clusters(self, *, profile_dirs: Optional[Iterable[config.PathLike]] = None,
                      profile_dir: Optional[config.PathLike] = None, profiles: Optional[Iterable[str]] = None,
                      profile: Optional[str] = None) -> Dict[str, Cluster]:
        """Load what the cluster files say, of all profiles if none is named; returns what runs."""
        folders = [Path(folder) for folder in profile_dirs or ()]
        folders += [config.find_profile_dir(name) for name in profiles or ()]
        if profile or profile_dir:
            folders.append(config.find_profile_dir(profile, profile_dir))
        self.clusters = {}
        for path in _cluster_files(folders or _profile_dirs()):
            try:
                cluster = Cluster.from_file(path)
            except UserError as e:
                config.log("cluster").warning("%s", e)
                continue
            if cluster.running:
                self.clusters[self._key(cluster)] = cluster
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
        return f"{_profile_name(cluster.profile_dir)}:{cluster.cluster_id}"


def _profile_name(profile_dir: Path) -> str:
    prefix, _, name = profile_dir.name.partition("profile_")
    return name if not prefix and name else os.fspath(profile_dir)


def clean_cluster_files(profile_dirs: Optional[Iterable[config.PathLike]] = None, *, force: bool = False) -> List[Path]:
    """Remove the cluster and connection files of dead clusters, and all logs, of some profiles (default: all).

    Returns:
        What was removed.

    Raises:
        AlreadyRunning: a cluster runs there; with `force` it is stopped.
    """
    folders = [Path(folder) for folder in (_profile_dirs() if profile_dirs is None else profile_dirs)]
    removed = _cluster_files(folders)
    for path in removed:
        try:
            cluster = Cluster.from_file(path)
        except ConnectionFileError as e:
            config.log("cluster").warning("%s", e)
            path.unlink()
            continue
        if cluster.running and not force:
            raise AlreadyRunning(f"{_label(cluster.cluster_id)} runs in {cluster.profile_dir}; stop it or use --force.")
        cluster.stop_cluster_sync()
    for folder in folders:
        files = [*folder.glob("security/ipcontroller*.json"), *folder.glob("log/*.log")]
        busy = _live_controllers(folder)
        for path in files if force or not busy else ():
            path.unlink()
            removed.append(path)
    return removed


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


# ---------------------------------------------------------------- the command line


class Signalled(BaseException):
    """SIGINT, SIGTERM or SIGHUP arrived: stop everything."""


def _on_signal(signum: int, frame: Any) -> NoReturn:
    raise Signalled(signal.Signals(signum))


def _set_signals(handler: Any) -> None:
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        signum = getattr(signal, name, None)
        if signum is not None and signal.getsignal(signum) != signal.SIG_IGN:  # which nohup asks for
            signal.signal(signum, handler)


def _start(settings: config.Settings) -> int:
    def start(cluster: Cluster) -> None:
        cluster.start_and_connect_sync().close()

    return _serve(Cluster.from_settings(settings, shutdown_atexit=not settings["Cluster.daemonize"]), settings, start)


def _engines(settings: config.Settings) -> int:
    def start(cluster: Cluster) -> None:
        with cluster.connect_client_sync() as client:
            before = len(client.ids)
            cluster.start_engines_sync()
            cluster.wait_for_engines(client, before + cluster.n)

    return _serve(Cluster.from_settings(settings, shutdown_atexit=not settings["Cluster.daemonize"], cluster_file=""),
                  settings, start)


def _serve(cluster: Cluster, settings: config.Settings, start: Callable[[Cluster], None]) -> int:
    """Start; then return if we are to daemonize, else stay until something ends or a signal comes."""
    if settings["Application.work_dir"]:
        config.enter_work_dir(settings["Application.work_dir"])
    _set_signals(_on_signal)
    ready = keep = False
    try:
        start(cluster)
        ready = True
        _tell_ready(cluster, settings)
        keep = settings["Cluster.daemonize"]
        return 0 if keep else _stay(cluster)
    except Signalled as e:
        print(f"Got {e.args[0].name}, stopping.", flush=True)
        return 0 if ready else 128 + e.args[0]
    finally:
        _set_signals(signal.SIG_IGN)
        if not keep:
            cluster.stop_cluster_sync()


def _tell_ready(cluster: Cluster, settings: config.Settings) -> None:
    words = {"profile": settings["Application.profile"], "profile_dir": settings["Application.profile_dir"],
             "cluster_id": cluster.cluster_id}
    arguments = ", ".join(f"{key}={value!r}" for key, value in words.items() if value)
    flags = "".join(f" --{key.replace('_', '-')}={value}" for key, value in words.items() if value)
    print(f"{cluster.n} engines are ready. Logs are in {cluster.profile_dir / 'log'}\n"
          f"Connect:  import {__package__} as ipp; rc = ipp.Client({arguments})\n"
          + (f"Stop:     Ctrl-C, or ipcluster stop{flags}" if cluster.shutdown_atexit else
             f"Stop:     ipcluster stop{flags}"), flush=True)


def _stay(cluster: Cluster) -> int:
    """Wait until the controller or the engines have ended; returns the exit code."""
    ends: "SimpleQueue[Tuple[launchers.BaseLauncher, Dict[str, Any]]]" = SimpleQueue()
    watched: List[launchers.BaseLauncher] = [*filter(None, [cluster.controller]), *cluster.engines.values()]
    for launcher in watched:
        launcher.on_stop(functools.partial(lambda launcher, data: ends.put((launcher, data)), launcher))
    launcher, data = ends.get()
    if cluster.controller is not None and not cluster.controller.running:  # the engines end because of that
        launcher, data = cluster.controller, cluster.controller.stop_data
    name = {"controller": "controller", "engine": "engines"}[launcher.role]
    if data.get("exit_code") == 0:
        print(f"The {name} stopped; stopping the rest.", flush=True)
        return 0
    print(f"The {name} {data['reason']}; stopping the rest.{cluster._tails([launcher])}", file=sys.stderr, flush=True)
    return EXIT_FAILURE


def _stop(settings: config.Settings) -> int:
    ids = settings.args or [settings["Application.cluster_id"]]
    if settings["IPClusterStop.all_cluster_ids"]:
        paths = _cluster_files([settings.profile_dir])
        if not paths:
            raise NoCluster(f"There is no cluster in {settings.profile_dir}.")
    else:
        paths = [config.cluster_file(settings.profile_dir, cluster_id) for cluster_id in ids]
    for path in paths:
        cluster = Cluster.from_file(path)
        alive = cluster.running
        cluster.stop_cluster_sync()
        if not alive:
            raise AlreadyStopped(f"{_label(cluster.cluster_id)} is not running any more; its files are removed. "
                                 f"{cluster.reason}".rstrip())
        print(f"Stopped {_label(cluster.cluster_id)}.")
    return 0


def _list(settings: config.Settings) -> int:
    named = settings["Application.profile"] or settings["Application.profile_dir"]
    folders = [settings.profile_dir] if named else _profile_dirs(settings["Application.ipython_dir"])
    rows = [row for row in map(_row, _cluster_files(folders)) if row]
    if settings["IPClusterList.output_format"] == "json":
        import json

        print(json.dumps(rows, indent=2))
        return 0
    table = [("PROFILE", "CLUSTER ID", "STATE", "ENGINES", "LAUNCHER", "HOST", "AGE", "REASON")]
    for row in rows:
        ready = "?" if row["engines_ready"] is None else row["engines_ready"]
        table.append((row["profile"], row["cluster_id"] or "''", row["state"], f"{ready}/{row['engines']}",
                      row["launcher"], row["host"], _age(row["age"]), row["reason"]))
    widths = [max(map(len, column)) for column in zip(*table)]
    for line in table:
        print("  ".join(word.ljust(width) for word, width in zip(line, widths)).rstrip())
    return 0


def _row(path: Path) -> Optional[Dict[str, Any]]:
    """What `list` shows of a cluster file; None if it can't be read."""
    row: Dict[str, Any] = {"state": "running", "engines_ready": None, "reason": "", "file": os.fspath(path)}
    try:
        cluster = Cluster.from_file(path)
    except NoCluster:
        return None  # it has just been stopped
    except ConnectionFileError as e:
        config.log("cluster").warning("%s", e)
        return None
    if cluster.controller is None:
        row.update(state="stopped", reason=cluster.reason, engines_ready=0)
    else:
        try:
            with cluster.connect_client_sync(timeout=2) as client:
                row["engines_ready"] = len(client.ids)
        except IPythonError as e:
            row.update(state="not answering", reason=str(e))
    engines = sum(launcher.n for launcher in cluster.engines.values()) or cluster.n
    return {"profile": _profile_name(cluster.profile_dir), "profile_dir": os.fspath(cluster.profile_dir),
            "cluster_id": cluster.cluster_id, "engines": engines, "host": cluster.host,
            "launcher": launchers.launcher_name(cluster.engine_launcher_class),
            "age": round(time.time() - (cluster.started or time.time())), **row}


def _age(seconds: int) -> str:
    for size, unit in ((86400, "d"), (3600, "h"), (60, "m")):
        if seconds >= size:
            return f"{seconds // size}{unit}"
    return f"{seconds}s"


def _clean(settings: config.Settings) -> int:
    everywhere = settings["IPClusterClean.all_profiles"]
    removed = clean_cluster_files(_profile_dirs(settings["Application.ipython_dir"]) if everywhere else
                                  [settings.profile_dir], force=settings["IPClusterClean.force"])
    print(f"Removed {len(removed)} files.")
    return 0


COMMANDS = {"start": _start, "engines": _engines, "stop": _stop, "list": _list, "clean": _clean}


def _dispatch(argv: List[str]) -> int:
    command = argv[0] if argv else "--help"
    if command == "--version":
        print(config.version())
        return 0
    if command in ("-h", "--help", "--help-all"):
        print("Start, stop and list clusters.\n\nusage: ipcluster <command> [flags]\n")
        for name in COMMANDS:
            print(f"  {name:<10} {config.PROGRAMS['cluster ' + name][1]}")
        print("\nipcluster <command> --help shows its flags.")
        return 0 if argv else EXIT_FAILURE
    if command not in COMMANDS:
        raise ConfigError(f"unknown command {command!r}; choose from {', '.join(COMMANDS)}. See --help")
    settings = config.parse(f"cluster {command}", argv[1:])
    config.setup_logging("ipcluster", settings["Application.log_level"], settings.log_file)
    return COMMANDS[command](settings)


def main(argv: Optional[List[str]] = None) -> int:
    """`ipcluster`: the command line."""
    return config.run_main("ipcluster", _dispatch, argv)


if __name__ == "__main__":
    sys.exit(main())
