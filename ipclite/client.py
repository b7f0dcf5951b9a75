"""The client: `Client`, its views of the engines and its queries.

    views ──► Connection.submit          Connection ──► _on_message ──► ids, replies

Everything that is sent and received goes through the `Connection`; this file knows what the messages between client and
controller mean, apart from those about a single task.
"""

from __future__ import annotations

import atexit
import itertools
import operator
import os
import signal
import socket
import sys
import threading
import time
import warnings
import weakref
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Iterable, Iterator, Optional, Sequence, Union

from . import config, net, pack, wire
from .connection import Connection
from .errors import ConnectError, ConnectionFileError, ControllerLost, EngineError, NoRecord, ProtocolError, RecordExpired, TunnelError
from .display import ROWS_MAX, progress, table
from .executor import ViewExecutor
from .history import AsyncHubResult, History, Kept, about, kept, outcome_of, purge
from .results import AsyncMapResult, AsyncResult, Selection
from .views import BroadcastView, DirectView, LoadBalancedView

DEPARTED_KEPT = 1000  # engines that have left whose names are known
ON_ITS_WAY_S = 0.1
LONG_QUERY_S = 60.0  # for what may have much to look through
REDIAL_TIMEOUT_S = 5.0
ONCE_ONLY = ("resubmit", "shutdown", "signal")  # what must not be asked for twice
_ERRORS = {  # what a reply may raise
    "ControllerLost": ControllerLost, "NoRecord": NoRecord, "RecordExpired": RecordExpired, "RuntimeError": RuntimeError}

_clients: "weakref.WeakSet[Client]" = weakref.WeakSet()


class Client:
    """A connection to a running cluster.

    Args:
        connection_info: path of a client connection file, or its content as a dict. By default the file is looked up by
            profile and cluster id.
        profile, profile_dir, ipython_dir: where the profile is; by default `default` below $IPYTHONDIR or ~/.ipython.
        cluster_id: which cluster of the profile.
        sshserver: reach the controller through this ssh server, "[user@]host[:port]" or a name in ~/.ssh/config; by default
            what the connection file says.
        sshkey: path of the private key to try first.
        password: for the ssh server, or of the key; otherwise it is asked for on a terminal.
        paramiko: tunnels are made by it in any case, so that no ssh program is needed; accepted for the sake of old scripts.
        timeout: s to wait for the connection file and the controller.
        cluster: the `Cluster` that made this client, if one did.

    Raises:
        ConnectionFileError: there is no usable connection file.
        ConnectError: the controller can't be reached; says which step failed.
        TunnelError: there is no ssh tunnel to it; says which step failed.
    """

    def __init__(self, connection_info: Union[str, "os.PathLike[str]", dict[str, Any], None] = None, *, profile: Optional[str] = None,
                 profile_dir: Optional[str] = None, ipython_dir: Optional[str] = None, cluster_id: Optional[str] = None,
                 sshserver: Optional[str] = None, sshkey: Optional[str] = None, password: Optional[str] = None,
                 paramiko: Optional[bool] = None, timeout: float = 10.0, cluster: Any = None, **old: Any):
        if old:
            connection_info = _old_arguments(old, connection_info)
        if paramiko is False:
            _has_no_effect("Client's paramiko=False")
        self.block = False
        self.cluster = cluster
        self.profile = profile
        self.session = os.urandom(wire.SESSION_SIZE)
        self._engines: dict[int, dict[str, Any]] = {}
        self._warned = False  # of engines with another Python
        self._uuids: dict[int, str] = {}
        self._history_from = 1
        self._condition = threading.Condition()
        self._numbers = itertools.count(1)
        self._replies: dict[int, Any] = {}  # of queries: None until they come
        self._questions: dict[int, tuple[str, list[Any]]] = {}  # what was asked, and the message, until then
        self._path_of_info: Optional[Path] = None
        self._closed = False
        self._dask: Any = None
        self._sshserver = sshserver or ""
        self._tunnel: Any = None
        self._ssh_secrets = (os.fspath(sshkey) if sshkey else "", password)
        context = net.Context()
        try:
            link, welcome = self._connect(context, connection_info, profile, profile_dir, ipython_dir, cluster_id, timeout)
        except BaseException:
            context.term()
            self._close_tunnel()
            raise
        self.cluster_id: str = welcome["cluster_id"]
        self._on_engines({"joined": welcome.get("engines", ())})
        self._sys_path: tuple[str, ...] = ()
        self._folders: tuple[str, ...] = ()
        on_message, on_lost = weakref.WeakMethod(self._on_message), weakref.WeakMethod(self._on_lost)
        dial, on_back = weakref.WeakMethod(self._dial_again), weakref.WeakMethod(self._on_back)
        ask_missed = weakref.WeakMethod(self._ask_missed)
        self._context = context
        self._connection = Connection(context, link, welcome, self.session, lambda frames: _call(on_message, frames),
                                      lambda: _call(on_lost), lambda resume: _call(dial, resume), lambda welcome: _call(on_back, welcome),
                                      lambda runs: _call(ask_missed, runs))
        _clients.add(self)

    def _connect(self, context: Any, given: Any, profile: Optional[str], profile_dir: Optional[str], ipython_dir: Optional[str],
                 cluster_id: Optional[str], timeout_s: float) -> tuple[net.Link, dict[str, Any]]:
        deadline = time.monotonic() + timeout_s
        hello = self._hello = {"role": "client", "protocol": wire.VERSION, "session": self.session.hex(), "pid": os.getpid(),
                               "host": socket.gethostname(), "python": sys.version.split()[0]}
        if isinstance(given, dict):
            info = config.check_connection(given, "the connection information", "client", wire.VERSION)
            return self._greet(context, info, hello, timeout_s)
        path = self._path_of_info = Path(given) if given is not None else config.connection_file(
            config.find_profile_dir(profile, profile_dir, ipython_dir), cluster_id or "", "client")
        while True:
            try:
                info = config.read_connection(path, "client", wire.VERSION)
                dead = "" if self._sshserver else net.ended_run(info)
                if dead:
                    raise ConnectionFileError(f"{path} is of a run that has ended ({dead}); start a cluster with "
                                              "'ipcluster start -n 4'")
                return self._greet(context, info, hello, max(0.1, deadline - time.monotonic()))
            except TunnelError:  # the next try would ask for the password again, or be counted as an attack
                raise
            except (ConnectionFileError, ConnectError):
                # A file may be about to appear or to be replaced by a new run's; what is wrong with it then counts.
                if given is not None and not path.exists() and time.monotonic() > deadline - timeout_s + 1.0:
                    raise
                if time.monotonic() + 0.1 > deadline:
                    raise
                time.sleep(0.05)

    def _greet(self, context: Any, info: dict[str, Any], hello: dict[str, Any], timeout_s: float) -> tuple[net.Link, dict[str, Any]]:
        if self._sshserver:
            info = net.through_ssh(info, self._sshserver)
        if net.needs_tunnel(info) and self._tunnel is None:
            from .tunnel import Tunnel

            self._tunnel = Tunnel(f"{os.getpid()}-{self.session.hex()}", *self._ssh_secrets)
        return net.greet(context, info, hello, timeout_s, self._tunnel)

    def _dial_again(self, resume: dict[str, Any]) -> tuple[net.Link, dict[str, Any]]:
        """Connect again after the connection broke, in a thread of its own.

        Raises:
            ControllerLost: the controller is gone for good; with a text if that tells more than why the connection broke.
            UserError: it can't be reached now.
        """
        connection = self._connection
        old, info = connection.link_info, connection.link_info
        returns = connection.durable and bool(old.get("reuse"))  # it may be started again
        if self._path_of_info is not None:
            try:
                info = config.read_connection(self._path_of_info, "client", wire.VERSION)
            except ConnectionFileError as e:
                if not returns:
                    raise ControllerLost("") from None
                raise ConnectError(str(e)) from None
        same = info["run_id"] == old["run_id"]
        gone = same and (connection.ended or not self._sshserver and (net.controller_gone(info) or net.refuses(info)))
        if not returns and (gone or not same):
            raise ControllerLost("" if same else "another controller has taken its place, which does not know of what was unfinished")
        if gone:
            raise ConnectError("it has not been started again yet")
        return self._greet(self._context, info, {**self._hello, "resume": resume}, REDIAL_TIMEOUT_S)

    def _ask_missed(self, runs: list[list[int]]) -> Any:
        """What of these tasks can't be had any more; see Connection."""
        number = next(self._numbers)
        self._replies[number] = None
        try:
            self._connection.tell(wire.encode_query(wire.QUERY, {"id": number, "what": "missed", "runs": runs}))
            deadline = time.monotonic() + LONG_QUERY_S
            while self._replies[number] is None and self._connection.up and time.monotonic() < deadline:
                with self._condition:
                    self._condition.wait(0.05)  # of a connection that breaks again nobody tells
            reply = self._replies[number]
            return None if reply is None or "value" not in reply else reply["value"]
        finally:
            del self._replies[number]

    def _on_back(self, welcome: dict[str, Any]) -> None:
        """There is a connection again: with its WELCOME, and then, with nothing, when it is known what became of our tasks."""
        if welcome:
            ids = {engine["id"] for engine in welcome.get("engines", ())}
            self._on_engines({"joined": welcome.get("engines", ()), "left": [i for i in self._engines if i not in ids]})
            return
        for number, (what, frames) in list(self._questions.items()):
            if self._connection.unsent(frames):
                continue
            if what in ONCE_ONLY:
                self._on_reply({"id": number, "ename": "ControllerLost",
                                "error": f"the connection broke while the controller was asked for {what!r}: it may be done, or not"})
            else:
                self._connection.post(frames)
        for key in self._connection.asked():
            try:
                self._ask("fetch", [key])
            except NoRecord as e:
                self._connection.give_up_asked(key, e)

    def _close_tunnel(self) -> None:
        if self._tunnel is not None:
            self._tunnel.close()

    # --- engines

    @property
    def ids(self) -> list[int]:
        """The ids of the engines that are there now."""
        return sorted(self._engines)

    def engine_info(self) -> dict[int, dict[str, Any]]:
        """{engine id: its "uuid", "host" and "pid"} of the engines that are there now."""
        return {id: dict(info) for id, info in self._engines.items()}

    def __len__(self) -> int:
        return len(self._engines)

    def __iter__(self) -> Iterator[DirectView]:
        return (self.direct_view(i) for i in self.ids)

    def __getitem__(self, key: Union[int, slice, Sequence[int]]) -> DirectView:
        """A DirectView of one engine (int; negative counts from the end) or several (slice or list of ids)."""
        if isinstance(key, str) or not hasattr(key, "__index__") and not isinstance(key, (slice, Iterable)):
            raise TypeError(f"index a Client by int, slice or list of engine ids, not {type(key).__name__}")
        return self.direct_view(key)

    def __reduce__(self) -> Any:
        raise TypeError(f"{self!r} can not leave this process: a task that is to submit others needs a Client of its own")

    def __repr__(self) -> str:
        lost = self._connection.lost
        state = "closed" if self._closed else f"lost: {lost}" if lost else f"{len(self)} engines"
        return f"<Client({self.cluster_id!r}): {state}>"

    def _repr_html_(self) -> str:
        return self._engines_table(repr(self), self.ids)

    def _engines_table(self, title: str, ids: Sequence[int]) -> str:
        engines = [self._engines.get(i, {}) for i in ids[:ROWS_MAX]]
        rows = [(i, engine.get("host", ""), engine.get("pid", "")) for i, engine in zip(ids, engines)]
        return table(title.strip("<>"), ("engine", "host", "pid"), rows, len(ids))

    def _targets(self, targets: Any) -> tuple[list[int], bool]:
        """Engine ids for a `targets` argument, and whether it names a single engine."""
        ids = self.ids
        if isinstance(targets, bool):
            raise TypeError("targets are engine ids, not booleans")
        if targets is None or isinstance(targets, str):
            if targets not in (None, "all"):
                raise TypeError(f"targets must be 'all', an engine id or a list of them, not {targets!r}")
            return ids, False
        if hasattr(targets, "__index__") and not getattr(targets, "shape", ()):  # also numpy's integers
            targets = operator.index(targets)
            if targets < 0:
                if -targets > len(ids):
                    raise self._trouble() or IndexError(f"there is no engine [{targets}]: {_count(ids)}")
                return [ids[targets]], True
            if targets not in self._engines:
                raise self._trouble() or IndexError(f"there is no engine {targets}: {_count(ids)}")
            return [targets], True
        if isinstance(targets, slice):
            return ids[targets], False
        if not isinstance(targets, Iterable):
            raise TypeError(f"targets must be 'all', an engine id or a list of them, not {targets!r}")
        chosen = list(targets)
        for target in chosen:
            if not hasattr(target, "__index__"):
                raise TypeError(f"a list of targets holds engine ids, not {target!r}")
        return [self._targets(t)[0][0] for t in chosen], False

    def direct_view(self, targets: Any = "all", **flags: Any) -> DirectView:
        """A view that addresses each of the engines `targets`: 'all' (whichever are there at each call), an id, a list of
        ids or a slice of `ids`. `flags` are set on the view."""
        return DirectView(self, self._frozen(targets), **flags)

    def broadcast_view(self, targets: Any = "all", is_coalescing: bool = False, **flags: Any) -> BroadcastView:
        """A DirectView whose calls are one message each, and with `is_coalescing` have one message for an answer."""
        return BroadcastView(self, self._frozen(targets), is_coalescing=is_coalescing, **flags)

    def _frozen(self, targets: Any) -> Any:
        if targets is None or (isinstance(targets, str) and targets == "all"):
            return "all"
        chosen, single = self._targets(targets)
        return chosen[0] if single else chosen

    def load_balanced_view(self, targets: Any = None, **flags: Any) -> LoadBalancedView:
        """A view that gives each task to the engine with the least to do, of `targets` or of all."""
        return LoadBalancedView(self, targets, **flags)

    def activate(self, targets: Any = "all", suffix: str = "") -> DirectView:
        """A DirectView of `targets`; see `DirectView.activate`."""
        return self.direct_view(targets).activate(suffix)

    def clear(self, targets: Any = "all", block: Optional[bool] = None) -> Any:
        """Empty the namespaces of engines; see `DirectView.clear`."""
        return self.direct_view(targets).clear(block=block)

    def executor(self, targets: Any = None) -> ViewExecutor:
        """A standard `concurrent.futures.Executor` whose calls go to the engine with the least to do, of `targets` or all."""
        return ViewExecutor(self.load_balanced_view(targets))

    def wait_for_engines(self, n: Optional[int] = None, *, timeout: Optional[float] = None, block: bool = True,
                         interactive: Optional[bool] = None, widget: Optional[bool] = None) -> Any:
        """Wait until at least n engines are there.

        Args:
            n: how many; by default as many as the cluster that made this client starts, or 1.
            timeout: s to wait at most, not counting those in which jobs of our cluster wait in a queue; None or
                negative: for ever.
            block: False: return a Future at once.
            interactive: show the progress on stderr; by default on a terminal that has waited for a second.
            widget: whether tqdm's bar is a notebook widget; None: in notebooks.

        Raises:
            TimeoutError: they did not all come in time.
            EngineError: the engines ended meanwhile, so that they never will.
            ControllerLost: the controller ended.
        """
        if not block:
            return _in_thread(lambda: self.wait_for_engines(n, timeout=timeout, interactive=interactive or False, widget=widget))
        n = n if n is not None else getattr(self.cluster, "n", None) or 1
        started = last = time.monotonic()
        waited = 0.0
        show: Any = None
        try:
            while True:
                with self._condition:
                    if len(self._engines) >= n:
                        return None
                    self._condition.wait(0.1)
                if self._connection.lost:
                    raise self._connection.lost.with_traceback(None)
                waited += 0.0 if self.cluster is not None and self.cluster._queueing() else time.monotonic() - last
                last = time.monotonic()
                if timeout is not None and 0 <= timeout < waited and len(self._engines) < n:
                    raise TimeoutError(f"{n} engines are not ready after {timeout:g} s; {_count(self.ids)}")
                trouble = self.cluster._engines_ended() if self.cluster is not None else ""
                if trouble:
                    raise EngineError(f"the engines ended before all {n} were ready: {trouble}")
                if interactive or (interactive is None and last - started > 1.0 and sys.stderr.isatty()):
                    show = show or progress(n, "engines", sys.stderr, widget)
                    show(len(self._engines))
        finally:
            if show:
                show(min(n, len(self._engines)), end=True)

    def _trouble(self) -> Optional[Exception]:
        """Why there is no connection any more, to be raised, as often as need be; None: there is one."""
        lost = self._connection.lost
        return None if lost is None else lost.with_traceback(None)

    def _engine_uuid(self, engine_id: int) -> Optional[str]:
        return self._uuids.get(engine_id)

    # --- messages

    def _path(self) -> tuple[str, ...]:
        """The folders that engines may import from what runs here; a later `sys.path.insert` counts, too."""
        if self._sys_path != tuple(sys.path):
            self._sys_path, self._folders = tuple(sys.path), tuple(_import_path())
        return self._folders

    def _function(self, f: Any) -> str:
        """The name that the controller knows a function by; it is sent if need be."""
        return self._connection.function(*pack.pack_function(f))

    def _on_message(self, frames: list[Any]) -> None:
        kind = frames[0]
        if kind == wire.ENGINES:
            try:
                self._on_engines(wire.decode_dict(frames))
            except (KeyError, TypeError, ValueError) as e:
                raise ProtocolError(f"engines that are none: {type(e).__name__}: {e}") from None
        elif kind == wire.REPLY:
            self._on_reply(wire.decode_query(frames))

    def _on_reply(self, body: dict[str, Any]) -> None:
        with self._condition:
            if type(body.get("id")) is int and body["id"] in self._replies:
                self._replies[body["id"]] = body
                self._condition.notify_all()

    def _on_engines(self, news: dict[str, Any]) -> None:
        if news.get("durable") is False:
            self._connection.durable = False
        with self._condition:
            engines = dict(self._engines)
            for engine in news.get("joined", ()):
                engines[engine["id"]] = engine
                self._uuids[engine["id"]] = engine["uuid"]
                self._compare_python(engine)
            for id in news.get("left", ()):
                engines.pop(int(id), None)
            self._engines = engines
            if len(self._uuids) > len(engines) + DEPARTED_KEPT:
                for id in [i for i in self._uuids if i not in engines][: DEPARTED_KEPT // 2]:
                    del self._uuids[id]
            self._condition.notify_all()

    def _compare_python(self, engine: dict[str, Any]) -> None:
        """Functions that travel by value are byte code, which another Python does not understand."""
        theirs, ours = str(engine.get("python", "")).split("."), [str(part) for part in sys.version_info[:2]]
        if len(theirs) > 1 and theirs[:2] != ours and not self._warned:
            self._warned = True
            warnings.warn(f"engine {engine['id']} runs Python {'.'.join(theirs)} and this is Python {'.'.join(ours)}: functions of "
                          "scripts and notebooks may fail there; start the engines with this Python", stacklevel=2)

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
            frames = wire.encode_query(wire.QUERY, {"id": number, "what": what, **arguments})
            self._questions[number] = (what, frames)
            self._connection.post(frames)
            if not self._connection.wait(lambda: self._replies[number] or self._connection.lost, self, timeout):
                away = self._connection.away
                raise TimeoutError(f"the controller did not answer {what!r} in {timeout:g} s{away and f': {away}' or ''}")
            reply = self._replies[number]
        finally:
            del self._replies[number]
            self._questions.pop(number, None)
        if reply is None:
            raise self._trouble() or ControllerLost("the connection was closed")
        if "error" in reply:
            raise _ERRORS.get(reply.get("ename"), ValueError)(reply["error"])
        return reply.get("value")

    def queue_status(self, targets: Any = "all", verbose: bool = False) -> dict[Any, Any]:
        """What each engine has to do: {engine id: {"queue": waiting for it alone, "tasks": sent to it, "completed": done},
        "unassigned": tasks that wait for any engine}.

        Args:
            verbose: lists of task ids instead of numbers; of the completed ones those that are on record.
        """
        status: dict[str, Any] = self._query("queue_status", targets=self._targets(targets)[0], verbose=verbose)
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

    def engines_gone(self, engine_set: str, reason: str) -> None:
        """Tell the controller that a set of engines has ended, which somebody else found out: their batch job has.

        Args:
            engine_set: what they were told to call their set.
            reason: what their tasks fail with if no other engine can run them.
        """
        self._query("gone", set=engine_set, reason=reason)

    def shutdown(self, targets: Any = "all", restart: bool = False, hub: bool = False, block: Optional[bool] = None) -> None:
        """End engines, or (`hub=True`) the controller and all engines.

        Args:
            restart: start new engines in their place, with the same ids and empty namespaces.
            block: with `restart`, wait until the new ones are there.

        Raises:
            ValueError: they are some ranks of an MPI world, which begins and ends as a whole.
        """
        uuids = {i: self._uuids.get(i) for i in self._targets(targets)[0]}
        if not hub:
            self._keep_worlds_whole(list(uuids), restart)
        try:
            self._query("shutdown", targets=None if hub else list(uuids), hub=hub, restart=restart)
            if restart and block and not hub:
                self._connection.wait(lambda: self._connection.lost or all(
                    i in self._engines and self._engines[i]["uuid"] != uuid for i, uuid in uuids.items()), self)
        except ControllerLost:
            if not hub:
                raise

    def _keep_worlds_whole(self, ids: list[int], restart: bool) -> None:
        worlds = {i: info["mpi"]["tag"] for i, info in self._engines.items() if "mpi" in info}
        ranks = [i for i in ids if i in worlds]
        if ranks and restart:
            raise ValueError(f"engine {ranks[0]} is a rank of MPI, and a new one would not belong to the others: start all of them anew, "
                             "with Cluster.restart_engines")
        left = [i for i, tag in worlds.items() if tag and i not in ids and tag in {worlds[rank] for rank in ranks}]
        if left:
            raise ValueError(f"the engines {sorted(ranks + left)} are the ranks of one MPI world, which ends as a whole: name all of them")

    def abort(self, jobs: Any = None, targets: Any = None, block: Optional[bool] = None, *, interrupt: bool = False) -> None:
        """Take back tasks that have not started, wherever they wait; they fail with `TaskAborted`.

        Args:
            jobs: as in `get_result`; None: all of this client's. Other clients' tasks are left alone.
            targets: only the tasks that these engines hold (with `jobs`: those of them); None: wherever they are.
            block: return when the controller has the order, rather than at once; by default as `Client.block` says.
            interrupt: also interrupt those that run: they get SIGINT (KeyboardInterrupt), and if they do not end within
                2 s their engine is killed and replaced by a new one with the same id and an empty namespace.
        """
        pending = self._connection.unfinished
        numbers: Iterable[int] = pending
        if jobs is not None:
            keys = [wire.task_key(msg_id) for msg_id in self._msg_ids(jobs)]
            numbers = [number for session, number in keys if session == self.session and number in pending]
        if targets is not None:
            held = self.queue_status(targets, verbose=True)
            there = {msg_id for engine in held.values() if isinstance(engine, dict) for msg_id in (*engine["queue"], *engine["tasks"])}
            numbers = [number for number in numbers if wire.msg_id((self.session, number)) in there]
        if numbers and self._connection.lost is None:
            self._connection.post(wire.encode_ids(wire.ABORT, self.session, [(n, int(interrupt)) for n in numbers]))
            if self.block if block is None else block:
                self._query("queue_status", targets=[], verbose=False)

    def wait(self, jobs: Any = None, timeout: Optional[float] = None) -> bool:
        """Wait for AsyncResults, task ids or places in the history (None: everything that this client has submitted).

        Args:
            timeout: s to wait at most; None or negative: for ever.

        Returns:
            Whether all have ended.
        """
        deadline = None if timeout is None or timeout < 0 else time.monotonic() + timeout
        futures = self._futures(jobs)
        ended = [ar.wait(None if deadline is None else max(0.0, deadline - time.monotonic())) for ar in futures]
        return all(ended)

    def _futures(self, jobs: Any) -> list[AsyncResult]:
        if jobs is None:
            return list({id(ar): ar for ar, _ in self._connection.unfinished.values()}.values())
        return [job if isinstance(job, AsyncResult) else self.get_result(job, block=False)
                for job in (jobs if isinstance(jobs, (list, tuple, set)) else [jobs])]

    def wait_interactive(self, jobs: Any = None, interval: float = 1.0, timeout: Optional[float] = None) -> bool:
        """`wait`, and show the progress on stderr; see `AsyncResult.wait_interactive`."""
        futures = self._futures(jobs)
        return AsyncResult.join(*futures).wait_interactive(interval, timeout) if futures else True

    @property
    def outstanding(self) -> set[str]:
        """The ids of the tasks that have not ended."""
        return {wire.msg_id((self.session, seq)) for seq in self._connection.unfinished}

    # --- tasks of the past, and of others

    @property
    def history(self) -> History:
        """The ids of all tasks that this client has submitted, in that order; a sequence that takes no room."""
        return History(self.session, self._history_from, self._connection.next_number)

    @property
    def results(self) -> Kept:
        """{task id: value} of this client's tasks that have ended and whose AsyncResults are still alive: a client itself keeps
        no results. Others are had by `get_result`, while they are on record."""
        return Kept(self, lambda ar, i: ar._value(i))

    @property
    def metadata(self) -> Kept:
        """{task id: metadata}, for the same tasks as `results`."""
        return Kept(self, lambda ar, i: ar._metadata_of(i))

    def _msg_ids(self, jobs: Any) -> list[str]:
        """The task ids that AsyncResults, ids, places in the history, or lists of these, stand for."""
        if isinstance(jobs, AsyncResult):
            return jobs.msg_ids
        if isinstance(jobs, str):
            return [wire.msg_id(wire.task_key(jobs))]
        if isinstance(jobs, int) and not isinstance(jobs, bool):
            return [self.history[jobs]]
        if isinstance(jobs, slice):
            return self.history[jobs]  # type: ignore[no-any-return]
        if isinstance(jobs, (list, tuple, set, frozenset, range, History)):
            return [msg_id for job in jobs for msg_id in self._msg_ids(job)]
        raise TypeError(f"tasks are named by ids, places in the history, AsyncResults or lists of these, not by {jobs!r}")

    def get_result(self, ids: Any = None, block: Optional[bool] = None, owner: bool = True) -> AsyncResult:
        """The results of tasks by their ids, also of other clients' tasks, ended or not.

        Args:
            ids: a task id, a place in the history, an AsyncResult, or a list of these, for which the result is a list, too; None:
                the last task.
            block: wait until they have ended; by default as `Client.block` says.
            owner: while the tasks run, give the AsyncResult of the call that submitted them, if that was here and they are all of it.

        Raises:
            NoRecord: there never was such a task.
            RecordExpired: it ended, and the controller has dropped its record.
        """
        keys = [wire.task_key(m) for m in self._msg_ids(-1 if ids is None else ids)]
        ar: Optional[AsyncResult] = self._connection.future_of(keys) if owner else None
        single = ids._single if isinstance(ids, AsyncResult) else ids is None or isinstance(ids, (str, int))
        if ar is None:
            ar = self._hub_result(keys, single)
        elif ar._single is not single and not isinstance(ar, AsyncMapResult):
            ar = Selection(ar._places(), single)
        if self.block if block is None else block:
            ar.wait()
        return ar

    def _hub_result(self, keys: list[wire.TaskKey], single: bool) -> AsyncHubResult:
        """A new future over tasks: the controller is asked for their results, or what is left of them here is used."""
        try:
            try:
                tasks = self._ask("tasks", keys)
            except RecordExpired:
                raise
            except NoRecord:  # another client's task may be on its way to the controller yet
                self._connection.wait(lambda: self._connection.lost, self, ON_ITS_WAY_S)
                tasks = self._ask("tasks", keys)
            ar = AsyncHubResult(self, keys, tasks, single)
            self._connection.ask(ar, [(key, i) for i, key in enumerate(keys)])
            try:
                self._ask("fetch", keys)
            except BaseException:
                self._connection.unask(ar)
                raise
        except (ControllerLost, NoRecord):
            here = kept(self) if all(session == self.session for session, _ in keys) else {}
            places = [here.get(number) for _, number in keys]
            outcomes = [place and outcome_of(*place) for place in places]
            if None in outcomes:
                raise
            ar = AsyncHubResult(self, keys, [about(*place) for place in places if place is not None], single)
            for i, outcome in enumerate(outcomes):
                ar._arrive(i, outcome)  # type: ignore[arg-type]
        if not keys:
            ar._finish()
        return ar

    def _ask(self, what: str, keys: list[wire.TaskKey]) -> Any:
        return self._query(what, LONG_QUERY_S, ids=[wire.msg_id(key) for key in keys]) if keys else []

    def result_status(self, msg_ids: Any, status_only: bool = True) -> dict[str, Any]:
        """Which tasks have ended: {"pending": [ids], "completed": [ids]}.

        Args:
            msg_ids: as in `get_result`.
            status_only: False: also {id: value} of those that have ended, with exceptions in place of the values of failed ones.
        """
        wanted = self._msg_ids(msg_ids)
        told = self._ask("tasks", [wire.task_key(m) for m in wanted])
        ended = [m for m, task in zip(wanted, told) if task["done"]]
        status: dict[str, Any] = {"pending": [m for m, task in zip(wanted, told) if not task["done"]], "completed": ended}
        if ended and not status_only:
            values = self.get_result(ended, block=False, owner=False).get(return_exceptions=True)
            status.update(zip(ended, values))
        return status

    def hub_history(self) -> list[str]:
        """The ids of all tasks on record, of all clients, in the order of submission."""
        return self._query("history", LONG_QUERY_S)  # type: ignore[no-any-return]

    def db_query(self, query: dict[str, Any], keys: Optional[Iterable[str]] = None) -> list[dict[str, Any]]:
        """The records of tasks that meet a query.

        Args:
            query: {key: value or {operator: operand}}, where all must hold; operators are $eq $ne $in $nin $lt $lte (or $le) $gt
                $gte $glob $all $mod $exists. None is "not set"; dates are datetimes or ISO text.
            keys: of the records to return; `msg_id` always is. None: all but `buffers`, `result_buffers` and `function`.

        Raises:
            ValueError: an unknown key or operator, or an operand of the wrong kind.

        Example:
            >>> rc.load_balanced_view().apply_async(abs, -1).get()
            1
            >>> rc.db_query({"completed": None, "op": {"$in": ["apply", "map"]}}, keys=["submitted"])
            []
        """
        wanted = keys if keys is None or isinstance(keys, str) else list(keys)
        return self._query("db_query", LONG_QUERY_S, query=query, keys=wanted)  # type: ignore[no-any-return]

    def db_stats(self) -> dict[str, Any]:
        """Which database the controller has, where it is, how many tasks are on record, and the limits."""
        return self._query("db_stats", LONG_QUERY_S)  # type: ignore[no-any-return]

    def db_vacuum(self) -> dict[str, Any]:
        """Have the database give back the room of records that were dropped; returns `db_stats`."""
        return self._query("db_vacuum", LONG_QUERY_S)  # type: ignore[no-any-return]

    def resubmit(self, ids: Any = None, metadata: Optional[dict[str, Any]] = None, block: Optional[bool] = None) -> AsyncHubResult:
        """Run tasks again that have ended, whoever submitted them, under new ids and without waiting for what they depended on.

        They go to the engines they were meant for, or to any if these are gone.

        Args:
            ids: as in `get_result`; None: the last task.
            metadata: {"label": text} labels the new tasks.
            block: wait until they have ended; by default as `Client.block` says.

        Raises:
            RuntimeError: a task has not ended.
            NoRecord, RecordExpired: the controller has no record of it (any more).
        """
        label = dict(metadata or {}).pop("label", None)
        if set(metadata or {}) - {"label"} or not isinstance(label, (str, type(None))):
            raise ValueError(f"metadata of resubmitted tasks is {{'label': text}}, not {metadata!r}")
        old = [wire.task_key(m) for m in self._msg_ids(-1 if ids is None else ids)]
        tasks = self._ask("tasks", old)
        for task in tasks:
            task.update(submitted=None, stdout="", stderr="", engine_uuid=None, label=label or task["label"])
        ar = AsyncHubResult(self, old, tasks, isinstance(ids, (str, int)) or ids is None, "resubmit")
        if not old:
            ar._finish()
            return ar
        first = self._connection.expect(ar, len(old), [bytes.fromhex(t["fn"]) for t in tasks if t["fn"]])
        try:
            self._query("resubmit", LONG_QUERY_S, ids=[wire.msg_id(key) for key in old], first=first, label=label)
        except BaseException:
            self._connection.unexpect(first, len(old))
            raise
        if self.block if block is None else block:
            ar.wait()
        return ar

    def purge_local_results(self, jobs: Any = (), targets: Any = ()) -> None:
        """Free what the AsyncResults of tasks hold; asked again, they raise RecordExpired.

        Args:
            jobs: as in `get_result`, or "all".
            targets: also the tasks that ran on these engines.

        Raises:
            RuntimeError: a task has not ended; nothing is purged then.
        """
        wanted, engines = self._to_purge(jobs, targets)
        for number, (ar, i) in kept(self).items():
            outcome = ar._outcomes[i]
            if outcome is not None and (wanted is None or outcome[0].engine_id in engines
                                        or wire.msg_id((self.session, number)) in wanted):
                purge(ar, i)

    def purge_hub_results(self, jobs: Any = (), targets: Any = ()) -> None:
        """Have the controller forget tasks that have ended; see `purge_local_results`. "all" means those of all clients."""
        wanted, engines = self._to_purge(jobs, targets)
        self._query("purge", LONG_QUERY_S, ids=sorted(wanted or ()), targets=engines, all=wanted is None)

    def purge_results(self, jobs: Any = (), targets: Any = ()) -> None:
        """`purge_local_results` and `purge_hub_results`."""
        self.purge_local_results(jobs, targets)
        self.purge_hub_results(jobs, targets)

    def purge_everything(self) -> None:
        """Forget all tasks here and in the controller; the history begins anew."""
        self.purge_results("all")
        self._history_from = self._connection.next_number

    def _to_purge(self, jobs: Any, targets: Any) -> tuple[Optional[set[str]], list[int]]:
        """(task ids, or None for all; engine ids) of what is to be purged."""
        everything = isinstance(jobs, str) and jobs == "all"
        wanted = None if everything else set(self._msg_ids(jobs))
        engines = list(self._targets(targets)[0]) if not isinstance(targets, (list, tuple)) or targets else []
        if not everything and not wanted and not engines:
            raise ValueError("say what to purge: jobs, targets, or 'all'")
        outstanding = self.outstanding
        unfinished = sorted(outstanding if wanted is None else outstanding & wanted)
        if unfinished:
            raise RuntimeError(f"tasks that have not ended can not be purged: {', '.join(unfinished[:5])}"
                               + (f" and {len(unfinished) - 5} more" if len(unfinished) > 5 else ""))
        return wanted, engines

    # --- others' ways

    def become_dask(self, targets: Any = "all", port: int = 0, nanny: bool = False,
                    scheduler_args: Optional[dict[str, Any]] = None, **worker_args: Any) -> Any:
        """Make the engines workers of dask, too; returns a `distributed.Client`. See `integrations.start_dask`."""
        from .integrations import start_dask

        return start_dask(self, targets, port, nanny, scheduler_args, worker_args)

    def stop_dask(self, targets: Any = "all") -> None:
        """End dask's workers on engines, and its scheduler when no worker is left."""
        from .integrations import stop_dask

        stop_dask(self, targets)

    become_distributed, stop_distributed = become_dask, stop_dask

    def spin(self) -> None:
        """Deprecated: messages are received without it."""
        _has_no_effect("Client.spin()")

    def spin_thread(self, interval: float = 1.0) -> None:
        """Deprecated: messages are received without it."""
        _has_no_effect("Client.spin_thread()")

    def stop_spin_thread(self) -> None:
        """Deprecated: messages are received without it."""
        _has_no_effect("Client.stop_spin_thread()")

    # --- the end

    def close(self, linger: Optional[float] = None) -> None:
        """Close the connection. Tasks go on; results that have not arrived are lost to this client.

        Args:
            linger: accepted for the sake of old scripts: what was submitted is always sent, for at most a second.
        """
        self._closed = True
        self._connection.close()
        self._close_tunnel()

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *exc: Any) -> None:
        self.close()

    def __del__(self) -> None:
        if not getattr(self, "_closed", True) and hasattr(self, "_connection") and not sys.is_finalizing():
            self.close()


_OLD = ("context", "debug", "username", "packer", "unpacker", "key", "keyfile", "signature_scheme", "session",
        "metadata", "config", "check_pid", "copy_threshold", "buffer_threshold", "item_threshold", "digest_history_size")


def _old_arguments(old: dict[str, Any], connection_info: Any) -> Any:
    """Deal with keywords of IPython Parallel that have another name or no meaning here; returns the connection information."""
    for name in old:
        if name not in _OLD and name != "url_file":
            raise TypeError(f"Client has no argument {name!r}")
    if "url_file" in old:
        _warn("Client's url_file is called connection_info now", 4)
        connection_info = old["url_file"] if connection_info is None else connection_info
    for name in set(old) & set(_OLD):
        _has_no_effect(f"Client's {name}", 5)
    return connection_info


def _has_no_effect(what: str, depth: int = 4) -> None:
    _warn(f"{what} has no effect and is not needed any more", depth)


def _warn(text: str, depth: int) -> None:
    warnings.warn(text, DeprecationWarning, stacklevel=depth)


def _in_thread(call: Any) -> "Future[Any]":
    future: Future[Any] = Future()

    def run() -> None:
        try:
            future.set_result(call())
        except BaseException as e:
            future.set_exception(e)

    threading.Thread(target=run, name="wait_for_engines", daemon=True).start()
    return future


def _call(method: Any, *args: Any) -> Any:
    """Call a weakly held method unless its object is gone."""
    bound = method()
    if bound is None:
        return None
    return bound(*args)


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
