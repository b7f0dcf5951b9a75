"""The client: `Client`, its views of the engines and its queries.

    views ──► Connection.submit          Connection ──► _on_message ──► ids, replies

Everything that is sent and received goes through the `Connection`; this file knows what the messages between client and
controller mean, apart from those about a single task.
"""

from __future__ import annotations

import atexit
import itertools
import os
import signal
import socket
import sys
import threading
import time
import weakref
from pathlib import Path
from typing import Any, Iterable, Iterator, Optional, Sequence, Union

from . import config, net, pack, wire
from .connection import Connection
from .errors import ConnectError, ConnectionFileError, ControllerLost, EngineError
from .results import AsyncResult, progress
from .views import DirectView, LoadBalancedView

_clients: "weakref.WeakSet[Client]" = weakref.WeakSet()


class Client:
    """A connection to a running cluster.

    Args:
        connection_info: path of a client connection file, or its content as a dict. By default the file is looked up by
            profile and cluster id.
        profile, profile_dir, ipython_dir: where the profile is; by default `default` below $IPYTHONDIR or ~/.ipython.
        cluster_id: which cluster of the profile.
        timeout: s to wait for the connection file and the controller.
        cluster: the `Cluster` that made this client, if one did.

    Raises:
        ConnectionFileError: there is no usable connection file.
        ConnectError: the controller can't be reached; says which step failed.
    """

    def __init__(self, connection_info: Union[str, "os.PathLike[str]", dict[str, Any], None] = None, *, profile: Optional[str] = None,
                 profile_dir: Optional[str] = None, ipython_dir: Optional[str] = None, cluster_id: Optional[str] = None,
                 timeout: float = 10.0, cluster: Any = None):
        self.block = False
        self.cluster = cluster
        self.session = os.urandom(wire.SESSION_SIZE)
        self._engines: dict[int, dict[str, Any]] = {}
        self._uuids: dict[int, str] = {}
        self._condition = threading.Condition()
        self._numbers = itertools.count(1)
        self._replies: dict[int, Any] = {}  # of queries: None until they come
        self._closed = False
        context = net.Context()
        try:
            link, welcome = self._connect(context, connection_info, profile, profile_dir, ipython_dir, cluster_id, timeout)
        except BaseException:
            context.term()
            raise
        self.cluster_id: str = welcome["cluster_id"]
        self._on_engines({"joined": welcome["engines"]})
        self._path = _import_path()
        on_message, on_lost = weakref.WeakMethod(self._on_message), weakref.WeakMethod(self._on_lost)
        self._connection = Connection(context, link, welcome, self.session, lambda frames: _call(on_message, frames),
                                      lambda: _call(on_lost))
        _clients.add(self)

    def _connect(self, context: Any, given: Any, profile: Optional[str], profile_dir: Optional[str], ipython_dir: Optional[str],
                 cluster_id: Optional[str], timeout_s: float) -> tuple[net.Link, dict[str, Any]]:
        deadline = time.monotonic() + timeout_s
        hello = {"role": "client", "protocol": wire.VERSION, "session": self.session.hex(), "pid": os.getpid(),
                 "host": socket.gethostname(), "python": sys.version.split()[0]}
        if isinstance(given, dict):
            info = config.check_connection(given, "the connection information", "client", wire.VERSION)
            return net.greet(context, info, hello, timeout_s)
        path = Path(given) if given is not None else config.connection_file(
            config.find_profile_dir(profile, profile_dir, ipython_dir), cluster_id or "", "client")
        while True:
            try:
                info = config.read_connection(path, "client", wire.VERSION)
                dead = config.dead_run(info)
                if dead:
                    raise ConnectionFileError(f"{path} is of a run that has ended ({dead}); start a cluster with "
                                              "'ipcluster start -n 4'")
                return net.greet(context, info, hello, max(0.1, deadline - time.monotonic()))
            except (ConnectionFileError, ConnectError):
                # A file may be about to appear or to be replaced by a new run's; what is wrong with it then counts.
                if given is not None and not path.exists() and time.monotonic() > deadline - timeout_s + 1.0:
                    raise
                if time.monotonic() + 0.1 > deadline:
                    raise
                time.sleep(0.05)

    # --- engines

    @property
    def ids(self) -> list[int]:
        """The ids of the engines that are there now."""
        return sorted(self._engines)

    def __len__(self) -> int:
        return len(self._engines)

    def __iter__(self) -> Iterator[DirectView]:
        return (self.direct_view(i) for i in self.ids)

    def __getitem__(self, key: Union[int, slice, Sequence[int]]) -> DirectView:
        """A DirectView of one engine (int; negative counts from the end) or several (slice or list of ids)."""
        if not isinstance(key, (int, slice, tuple, list, set, range)):
            raise TypeError(f"index a Client by int, slice or list of engine ids, not {type(key).__name__}")
        return self.direct_view(key)

    def __repr__(self) -> str:
        lost = self._connection.lost
        state = "closed" if self._closed else f"lost: {lost}" if lost else f"{len(self)} engines"
        return f"<Client({self.cluster_id!r}): {state}>"

    def _targets(self, targets: Any) -> tuple[list[int], bool]:
        """Engine ids for a `targets` argument, and whether it names a single engine."""
        ids = self.ids
        if isinstance(targets, bool):
            raise TypeError("targets are engine ids, not booleans")
        if targets is None or isinstance(targets, str):
            if targets not in (None, "all"):
                raise TypeError(f"targets must be 'all', an engine id or a list of them, not {targets!r}")
            return ids, False
        if isinstance(targets, int):
            if targets < 0:
                if -targets > len(ids):
                    raise IndexError(f"there is no engine [{targets}]: {_count(ids)}")
                return [ids[targets]], True
            if targets not in self._engines:
                raise IndexError(f"there is no engine {targets}: {_count(ids)}")
            return [targets], True
        if isinstance(targets, slice):
            return ids[targets], False
        chosen = [self._targets(t)[0][0] for t in targets]
        return chosen, False

    def direct_view(self, targets: Any = "all", **flags: Any) -> DirectView:
        """A view that addresses each of the engines `targets`: 'all' (whichever are there at each call), an id, a list of
        ids or a slice of `ids`. `flags` are set on the view."""
        if targets not in ("all", None) if isinstance(targets, (str, type(None))) else True:
            chosen, single = self._targets(targets)
            targets = chosen[0] if single else chosen
        return DirectView(self, targets if targets is not None else "all", **flags)

    def load_balanced_view(self, targets: Any = None, **flags: Any) -> LoadBalancedView:
        """A view that gives each task to the engine with the least to do, of `targets` or of all."""
        if targets is not None and targets != "all":
            targets = self._targets(targets)[0]
        return LoadBalancedView(self, None if targets == "all" else targets, **flags)

    def wait_for_engines(self, n: Optional[int] = None, *, timeout: Optional[float] = None, interactive: Optional[bool] = None) -> None:
        """Wait until at least n engines are there.

        Args:
            n: how many; by default as many as the cluster that made this client starts, or 1.
            timeout: s to wait at most; None or negative: for ever.
            interactive: show the progress on stderr; by default on a terminal that has waited for a second.

        Raises:
            TimeoutError: they did not all come in time.
            EngineError: the engines ended meanwhile, so that they never will.
            ControllerLost: the controller ended.
        """
        n = n if n is not None else getattr(self.cluster, "n", None) or 1
        started = time.monotonic()
        show: Any = None
        try:
            while True:
                with self._condition:
                    if len(self._engines) >= n:
                        return
                    self._condition.wait(0.1)
                if self._connection.lost:
                    raise self._connection.lost
                waited = time.monotonic() - started
                if timeout is not None and 0 <= timeout < waited and len(self._engines) < n:
                    raise TimeoutError(f"{n} engines are not ready after {timeout:g} s; {_count(self.ids)}")
                trouble = self.cluster._engines_ended() if self.cluster is not None else ""
                if trouble:
                    raise EngineError(f"the engines ended before all {n} were ready: {trouble}")
                if interactive or (interactive is None and waited > 1.0 and sys.stderr.isatty()):
                    show = show or progress(n, "engines", sys.stderr)
                    show(len(self._engines))
        finally:
            if show:
                show(min(n, len(self._engines)), end=True)

    def _engine_uuid(self, engine_id: int) -> Optional[str]:
        return self._uuids.get(engine_id)

    # --- messages

    def _function(self, f: Any) -> str:
        """The name that the controller knows a function by; it is sent if need be."""
        return self._connection.function(*pack.pack_function(f))

    def _on_message(self, frames: list[Any]) -> None:
        kind = frames[0]
        if kind == wire.ENGINES:
            self._on_engines(wire.decode_dict(frames))
        elif kind == wire.REPLY:
            body = wire.decode_dict(frames)
            with self._condition:
                if body.get("id") in self._replies:
                    self._replies[body["id"]] = body
                    self._condition.notify_all()

    def _on_engines(self, news: dict[str, Any]) -> None:
        with self._condition:
            engines = dict(self._engines)
            for engine in news.get("joined", ()):
                engines[engine["id"]] = engine
                self._uuids[engine["id"]] = engine["uuid"]
            for id in news.get("left", ()):
                engines.pop(int(id), None)
            self._engines = engines
            self._condition.notify_all()

    def _on_lost(self) -> None:
        with self._condition:
            self._engines = {}
            self._condition.notify_all()

    # --- queries and orders

    def _query(self, what: str, timeout: float = 10.0, **arguments: Any) -> Any:
        """Ask the controller.

        Raises:
            TimeoutError: no answer in `timeout` s.
            ControllerLost: it is gone.
        """
        number = next(self._numbers)
        self._replies[number] = None
        try:
            self._connection.post(wire.encode_json(wire.QUERY, {"id": number, "what": what, **arguments}))
            if not self._connection.wait(lambda: self._replies[number] or self._connection.lost, self, timeout):
                raise TimeoutError(f"the controller did not answer {what!r} in {timeout:g} s")
            reply = self._replies[number]
        finally:
            del self._replies[number]
        if reply is None:
            raise self._connection.lost or ControllerLost("the connection was closed")
        if "error" in reply:
            raise ValueError(reply["error"])
        return reply.get("value")

    def queue_status(self, targets: Any = "all") -> dict[Any, Any]:
        """What each engine has to do: {engine id: {"queue": waiting for it alone, "tasks": sent to it, "completed": done},
        "unassigned": tasks that wait for any engine}."""
        status: dict[str, Any] = self._query("queue_status", targets=self._targets(targets)[0])
        return {int(k) if k.isdigit() else k: v for k, v in status.items()}

    def send_signal(self, sig: Union[int, str], targets: Any = "all", block: Optional[bool] = None) -> None:
        """Send a signal to engines; SIGINT interrupts the running task, which fails with KeyboardInterrupt.

        Args:
            sig: number or name ("SIGINT", "INT").
            block: accepted for the sake of old scripts; the call returns when the controller has passed the order on.

        Raises:
            ValueError: there is no such signal.
        """
        if isinstance(sig, str):
            name = sig.upper() if sig.upper().startswith("SIG") else "SIG" + sig.upper()
            if not hasattr(signal, name):
                raise ValueError(f"there is no signal {sig!r}")
            sig = getattr(signal, name)
        self._query("signal", signum=int(signal.Signals(sig)), targets=self._targets(targets)[0])

    def shutdown(self, targets: Any = "all", restart: bool = False, hub: bool = False, block: Optional[bool] = None) -> None:
        """End engines, or (`hub=True`) the controller and all engines.

        Args:
            restart: start new engines in their place, with the same ids and empty namespaces.
            block: with `restart`, wait until the new ones are there.
        """
        uuids = {i: self._uuids.get(i) for i in self._targets(targets)[0]}
        try:
            self._query("shutdown", targets=None if hub else list(uuids), hub=hub, restart=restart)
            if restart and block and not hub:
                self._connection.wait(lambda: self._connection.lost or all(
                    i in self._engines and self._engines[i]["uuid"] != uuid for i, uuid in uuids.items()), self)
        except ControllerLost:
            if not hub:
                raise

    def abort(self, jobs: Any = None, *, interrupt: bool = False) -> None:
        """Take back tasks that have not started, wherever they wait; they fail with `TaskAborted`.

        Args:
            jobs: AsyncResults, message ids or a list of these; None: all of this client's.
            interrupt: also interrupt those that run: they get SIGINT (KeyboardInterrupt), and if they do not end within
                2 s their engine is killed and replaced by a new one with the same id and an empty namespace.
        """
        pending = self._connection.unfinished
        numbers: Iterable[int] = pending
        if jobs is not None:
            numbers = []
            for job in jobs if isinstance(jobs, (list, tuple, set)) else [jobs]:
                mine = range(job._first, job._first + job._count) if isinstance(job, AsyncResult) else [wire.task_key(job)[1]]
                numbers += [n for n in mine if n in pending]
        if numbers and self._connection.lost is None:
            self._connection.post(wire.encode_ids(wire.ABORT, self.session, [(n, int(interrupt)) for n in numbers]))

    def wait(self, jobs: Any = None, timeout: Optional[float] = None) -> bool:
        """Wait for AsyncResults (None: everything that this client has submitted).

        Args:
            timeout: s to wait at most; None or negative: for ever.

        Returns:
            Whether all have ended.
        """
        if jobs is None:
            jobs = list({id(ar): ar for ar, _ in self._connection.unfinished.values()}.values())
        deadline = None if timeout is None or timeout < 0 else time.monotonic() + timeout
        return all([ar.wait(None if deadline is None else max(0.0, deadline - time.monotonic()))
                    for ar in (jobs if isinstance(jobs, (list, tuple, set)) else [jobs])])

    @property
    def outstanding(self) -> set[str]:
        """The ids of the tasks that have not ended."""
        return {wire.msg_id((self.session, seq)) for seq in self._connection.unfinished}

    # --- the end

    def close(self) -> None:
        """Close the connection. Tasks go on; results that have not arrived are lost to this client."""
        self._closed = True
        self._connection.close()

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *exc: Any) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "_connection") and not sys.is_finalizing():
            self.close()


def _call(method: Any, *args: Any) -> None:
    """Call a weakly held method unless its object is gone."""
    bound = method()
    if bound is not None:
        bound(*args)


def _import_path() -> list[str]:
    """The folders that this process imports its own modules from: not the standard library's, not site-packages."""
    own = []
    for entry in [os.getcwd(), *sys.path]:
        folder = os.path.abspath(entry)
        installed = "site-packages" in folder or "dist-packages" in folder or folder.startswith(
            (os.path.join(sys.base_prefix, "lib"), os.path.join(sys.prefix, "lib")))
        if not installed and folder not in own and os.path.isdir(folder):
            own.append(folder)
    return own


def _count(ids: list[int]) -> str:
    return f"the engines are {ids}" if len(ids) <= 20 else f"there are {len(ids)}, from {ids[0]} to {ids[-1]}"


@atexit.register
def _close_all() -> None:
    for client in list(_clients):
        client.close()
