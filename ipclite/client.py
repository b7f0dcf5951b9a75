"""The client's side of the connection: `Client`, its futures and its queries.

    views ── _submit ──► outbox ── _flush ──► socket          the thread that waits for a result sends it itself
    AsyncResult ◄── _arrive ── _on_results ◄── io thread ◄── socket

A daemon thread receives, resolves futures and sends what nobody waits for. Rules that hold here: the socket is used under
`_sock_lock` only; numbers, `_pending` and the outbox change under `_mutex`; who holds both took `_sock_lock` first; futures are
resolved and callbacks run with neither held.
"""

from __future__ import annotations

import atexit
import os
import selectors
import socket
import sys
import threading
import time
import weakref
from pathlib import Path
from typing import Any, Iterator, Optional, Sequence, Union

from . import config, net, pack, wire
from .errors import ConnectError, ConnectionFileError, ControllerLost, EngineError, PackError, ProtocolError
from .results import AsyncResult, Outcome, progress
from .views import DirectView, LoadBalancedView

FUNCTIONS_KEPT = 256  # functions whose bytes the controller and the engines hold for us
TICK_S = 1.0
TAKE = 256  # messages handled before the next look at the outbox

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
        self._changed = threading.Condition()
        self._mutex = threading.Lock()
        self._sock_lock = threading.Lock()
        self._outbox: list[tuple[Optional[bytes], Any]] = []
        self._awake = False
        self._next = 1
        self._sent_up_to = 1
        self._pending: dict[int, tuple[AsyncResult, int]] = {}
        self._functions: dict[bytes, int] = {}  # digest -> number of the last task that uses it
        self._queries: dict[int, list[Any]] = {}
        self._lost: Optional[Exception] = None
        self._closed = False
        self._pid = os.getpid()
        self._context = net.Context()
        try:
            self._link, welcome = self._connect(connection_info, profile, profile_dir, ipython_dir, cluster_id, timeout)
        except BaseException:
            self._context.term()
            raise
        self._max_task_bytes: int = welcome["max_task_bytes"]
        self._silence_s: float = welcome["silence_s"]
        self.cluster_id: str = welcome["cluster_id"]
        self._on_engines({"joined": welcome["engines"]})
        self._path = _import_path()
        self._wake_r, self._wake_w = socket.socketpair()
        self._wake_r.setblocking(False)
        self._wake_w.setblocking(False)
        self._thread = threading.Thread(target=_serve, args=(weakref.ref(self), self._wake_r, self._link), name="ipclite-client",
                                        daemon=True)
        self._thread.start()
        _clients.add(self)

    def _connect(self, given: Any, profile: Optional[str], profile_dir: Optional[str], ipython_dir: Optional[str],
                 cluster_id: Optional[str], timeout_s: float) -> tuple[net.Link, dict[str, Any]]:
        deadline = time.monotonic() + timeout_s
        hello = {"role": "client", "protocol": wire.VERSION, "session": self.session.hex(), "pid": os.getpid(),
                 "host": socket.gethostname(), "python": sys.version.split()[0]}
        if isinstance(given, dict):
            info = config.check_connection(given, "the connection information", "client", wire.VERSION)
            return net.greet(self._context, info, hello, timeout_s)
        path = Path(given) if given is not None else config.connection_file(
            config.find_profile_dir(profile, profile_dir, ipython_dir), cluster_id or "", "client")
        while True:
            try:
                info = config.read_connection(path, "client", wire.VERSION)
                dead = config.dead_run(info)
                if dead:
                    raise ConnectionFileError(f"{path} is of a run that has ended ({dead}); start a cluster with "
                                              "'ipcluster start -n 4'")
                return net.greet(self._context, info, hello, max(0.1, deadline - time.monotonic()))
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
        state = "closed" if self._closed else f"lost: {self._lost}" if self._lost else f"{len(self)} engines"
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
                with self._changed:
                    if len(self._engines) >= n:
                        return
                    self._changed.wait(0.1)
                if self._lost:
                    raise self._lost
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

    # --- submitting

    def _function(self, f: Any) -> str:
        """Make sure that the controller has a function; its name there."""
        digest, payload = pack.pack_function(f)
        if digest not in self._functions:
            self._check_size(payload)
            frames = [wire.FUNCTION, digest, *([payload] if isinstance(payload, bytes) else payload)]
            with self._mutex:
                self._outbox.append((None, frames))
                if len(self._functions) >= FUNCTIONS_KEPT:
                    self._forget_functions()
        self._functions[digest] = self._next
        return digest.hex()

    def _forget_functions(self) -> None:
        """Tell the others to drop the functions that no unfinished task needs, oldest first."""
        oldest = next(iter(self._pending), self._next)
        free = [d for d, last in sorted(self._functions.items(), key=lambda item: item[1]) if last < oldest]
        dropped = free[: FUNCTIONS_KEPT // 2]
        for digest in dropped:
            del self._functions[digest]
        if dropped:
            self._outbox.append((None, [wire.FORGET, *dropped]))

    def _check_size(self, payload: Any) -> None:
        size = len(payload) if isinstance(payload, bytes) else sum(memoryview(piece).nbytes for piece in payload)
        if size > self._max_task_bytes:
            raise PackError(f"the task's data are {size / 2**30:.1f} GiB, and the controller takes {self._max_task_bytes / 2**30:.1f} GiB "
                            "at most (half of its memory); send smaller pieces, or a path to a file")

    def _submit(self, ar: AsyncResult, tasks: Sequence[tuple[bytes, Any, int]], wake: bool = True) -> AsyncResult:
        """Queue the tasks of one call.

        Args:
            ar: their future.
            tasks: (spec, payload, number of engines that it goes to) of each.
            wake: False if the caller is about to wait, and so to flush, by itself.
        """
        for _, payload, _ in tasks:
            if type(payload) is not bytes:
                self._check_size(payload)
        with self._mutex:
            if self._lost is not None:
                raise self._lost
            first = self._next
            total = len(tasks) if len(tasks) == 1 and tasks[0][2] == 1 else sum([count for _, _, count in tasks])
            self._next = first + total
            ar._sent_as(first, total)
            seq = first
            for spec, payload, count in tasks:
                self._outbox.append((spec, (seq, count, payload)))
                seq += count
            for i in range(total):
                self._pending[first + i] = (ar, i)
            wake = wake and not self._awake
            if wake:
                self._awake = True
        if wake:
            self._wake()
        return ar

    def _wake(self) -> None:
        try:
            self._wake_w.send(b"!")
        except (BlockingIOError, OSError):
            pass  # it is awake, or the client is being closed

    def _flush(self) -> None:
        """Send what is in the outbox, in the calling thread."""
        if self._outbox and self._lost is None:
            with self._sock_lock:
                self._send_outbox()
                more = self._lost is None and net.readable(self._link.sock)
            if more:  # our send took the notice of a message that the io thread waits for
                self._wake()

    def _send_outbox(self) -> None:
        """The caller holds `_sock_lock`."""
        if self._pid != os.getpid():
            raise ControllerLost("this Client was made before the process forked and can not be used in the child: make a new one")
        with self._mutex:
            outbox, self._outbox = self._outbox, []
            self._awake = False
            self._sent_up_to = self._next
        if self._lost is not None:
            return
        sock = self._link.sock
        message: list[Any] = [wire.TASKS]
        section: list[Any] = []
        spec: Optional[bytes] = None
        count, size = 0, 0
        for kind, body in outbox:
            if kind is not spec or count >= wire.BATCH_TASKS or size >= wire.BATCH_BYTES:
                if section and spec is not None:
                    message += wire.encode_tasks(spec, self.session, section)
                    section = []
                if kind is None or count >= wire.BATCH_TASKS or size >= wire.BATCH_BYTES:
                    if len(message) > 1:
                        net.send(sock, message)
                        message = [wire.TASKS]
                    count = size = 0
                spec = kind
            if kind is None:
                net.send(sock, body)
            else:
                section.append(body)
                count += 1
                size += len(body[2]) if type(body[2]) is bytes else wire.INLINE_MAX
        if section and spec is not None:
            message += wire.encode_tasks(spec, self.session, section)
        if len(message) > 1:
            net.send(sock, message)

    # --- the io thread

    def _turn(self) -> bool:
        """Send, receive, resolve. Returns whether to look again at once."""
        messages: list[list[Any]] = []
        with self._sock_lock:
            if self._closed:
                return False
            self._send_outbox()
            while len(messages) < TAKE and net.readable(self._link.sock):
                messages.append(net.recv(self._link.sock))
            lost = self._link.check() if not messages else None
        now = time.monotonic()
        if messages:
            self._heard = now
        for frames in messages:
            try:
                self._on_message(frames)
            except ProtocolError as e:
                self._lose(ControllerLost(f"the controller sent a malformed message: {e}"))
        if lost is None and now - self._heard > self._silence_s:
            lost = f"the controller at {self._link.address} said nothing for {now - self._heard:.0f} s"
        if lost is not None and self._lost is None:
            self._lose(ControllerLost(lost))
        return bool(messages)

    _heard = float("inf")

    def _on_message(self, frames: list[Any]) -> None:
        kind = frames[0]
        if kind == wire.RESULTS:
            self._on_results(frames)
        elif kind == wire.OUTPUT:
            _, _, pieces = wire.decode_output(frames)
            for seq, name, text in pieces:
                waiting = self._pending.get(seq)
                if waiting is not None:
                    waiting[0]._write(waiting[1], name, text)
        elif kind == wire.ENGINES:
            self._on_engines(wire.decode_dict(frames))
        elif kind == wire.REPLY:
            body = wire.decode_dict(frames)
            query = self._queries.pop(body.get("id", 0), None)
            if query is not None:
                query[1] = body
                query[0].set()
        elif kind == wire.BYE:
            self._lose(ControllerLost(f"the controller ended: {wire.decode_dict(frames).get('reason')}"))
        elif kind == wire.REFUSED:
            self._lose(ControllerLost(f"the controller refused us: {wire.decode_dict(frames).get('reason')}"))

    def _on_results(self, frames: list[Any]) -> None:
        now = time.time()
        pop = self._pending.pop
        for _, engine_id, records, section in wire.result_sections(frames):
            for seq, started, duration, attempt, status, payload in wire.section_results(records, section):
                waiting = pop(seq, None)
                if waiting is not None:
                    waiting[0]._arrive(waiting[1], Outcome(engine_id, started, duration, attempt, status, payload, now))

    def _on_engines(self, news: dict[str, Any]) -> None:
        with self._changed:
            engines = dict(self._engines)
            for engine in news.get("joined", ()):
                engines[engine["id"]] = engine
                self._uuids[engine["id"]] = engine["uuid"]
            for id in news.get("left", ()):
                engines.pop(int(id), None)
            self._engines = engines
            self._changed.notify_all()

    def _lose(self, error: Exception) -> None:
        """The connection is gone: nothing that waits may wait on."""
        with self._mutex:
            if self._lost is None:
                self._lost = error
            pending, self._pending = self._pending, {}
            queries, self._queries = self._queries, {}
        payload = wire.encode_error({"ename": type(error).__name__, "evalue": str(error), "own": True})
        now = time.time()
        for ar, i in pending.values():
            ar._arrive(i, Outcome(0xFFFFFFFF, now, 0.0, 0, wire.ERROR, payload, now))
        for query in queries.values():
            query[0].set()
        with self._changed:
            self._engines = {}
            self._changed.notify_all()

    # --- queries and orders

    def _query(self, what: str, timeout: float = 10.0, **arguments: Any) -> Any:
        """Ask the controller.

        Raises:
            TimeoutError: no answer in `timeout` s.
            ControllerLost: it is gone.
        """
        event = threading.Event()
        query: list[Any] = [event, None]
        with self._mutex:
            if self._lost is not None:
                raise self._lost
            number = id(query)
            self._queries[number] = query
            self._outbox.append((None, wire.encode_json(wire.QUERY, {"id": number, "what": what, **arguments})))
        self._flush()
        if not event.wait(timeout):
            self._queries.pop(number, None)
            raise TimeoutError(f"the controller did not answer {what!r} in {timeout:g} s")
        if query[1] is None:
            raise self._lost or ControllerLost("the connection was closed")
        if "error" in query[1]:
            raise ValueError(query[1]["error"])
        return query[1].get("value")

    def queue_status(self, targets: Any = "all") -> dict[Any, Any]:
        """What each engine has to do: {engine id: {"queue": waiting for it alone, "tasks": sent to it, "completed": done},
        "unassigned": tasks that wait for any engine}."""
        status: dict[str, Any] = self._query("queue_status", targets=self._targets(targets)[0])
        return {int(k) if k.isdigit() else k: v for k, v in status.items()}

    def send_signal(self, signum: int, targets: Any = "all") -> None:
        """Send a signal to engines; SIGINT interrupts the running task, which fails with KeyboardInterrupt."""
        self._query("signal", signum=int(signum), targets=self._targets(targets)[0])

    def shutdown(self, targets: Any = "all", hub: bool = False) -> None:
        """End engines, or (`hub=True`) the controller and all engines."""
        try:
            self._query("shutdown", targets=None if hub else self._targets(targets)[0], hub=hub)
        except ControllerLost:
            if not hub:
                raise

    def abort(self, jobs: Any = None) -> None:
        """Take back tasks that have not started.

        Args:
            jobs: AsyncResults, message ids or a list of these; None: all of this client's.
        """
        if jobs is None:
            numbers = list(self._pending)
        else:
            numbers = []
            for job in jobs if isinstance(jobs, (list, tuple, set)) else [jobs]:
                numbers += range(job._first, job._first + job._count) if isinstance(job, AsyncResult) else [wire.task_key(job)[1]]
        with self._mutex:
            if self._lost is None:
                self._outbox.append((None, wire.encode_ids(wire.ABORT, self.session, [(n, 0) for n in numbers])))
        self._flush()

    def wait(self, jobs: Any = None, timeout: Optional[float] = None) -> bool:
        """Wait for AsyncResults (None: everything that this client has submitted).

        Args:
            timeout: s to wait at most; None or negative: for ever.

        Returns:
            Whether all have ended.
        """
        if jobs is None:
            jobs = list({id(ar): ar for ar, _ in list(self._pending.values())}.values())
        deadline = None if timeout is None or timeout < 0 else time.monotonic() + timeout
        return all([ar.wait(None if deadline is None else max(0.0, deadline - time.monotonic()))
                    for ar in (jobs if isinstance(jobs, (list, tuple, set)) else [jobs])])

    @property
    def outstanding(self) -> set[str]:
        """The ids of the tasks that have not ended."""
        return {wire.msg_id((self.session, seq)) for seq in list(self._pending)}

    # --- the end

    def close(self) -> None:
        """Close the connection. Tasks go on; results that have not arrived are lost to this client."""
        if self._closed or self._pid != os.getpid():
            return
        with self._sock_lock:
            if self._lost is None:
                self._send_outbox()
                net.send(self._link.sock, [wire.BYE])
            self._closed = True
        self._lose(ControllerLost("this Client was closed"))
        self._wake()
        if threading.current_thread() is not self._thread:
            self._thread.join()
        self._link.close(1000)
        self._context.term()
        self._wake_w.close()
        self._wake_r.close()

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *exc: Any) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_thread", None) is not None and not sys.is_finalizing():
            self.close()


def _serve(reference: "weakref.ref[Client]", wake: socket.socket, link: net.Link) -> None:
    """The io thread. It holds the client only while there is something to do, so that a forgotten one can go."""
    selector = selectors.DefaultSelector()
    fds = [link.sock.get(net.zmq.FD), link.monitor.get(net.zmq.FD)]
    for source in (*fds, wake):
        selector.register(source, selectors.EVENT_READ)
    again = False
    client = reference()
    if client is not None:
        client._heard = time.monotonic()
    del client
    try:
        while True:
            ready = selector.select(0 if again else TICK_S)
            if any(key.fileobj is wake for key, _ in ready):
                try:
                    wake.recv(4096)
                except OSError:
                    return
            client = reference()
            if client is None or client._closed:
                return
            again = client._turn()
            if client._lost is not None and not again:
                selector.unregister(fds[1]) if fds[1] in selector.get_map() else None
            del client
    finally:
        selector.close()


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
