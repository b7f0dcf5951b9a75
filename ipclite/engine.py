"""The engine: runs user code, one task after the other, in its main thread.

    agent ── socketpair: recall, rejoin ──► Courier (side thread)
                                              │ flushes output and results, takes tasks back
                                              ▼
    controller ══ TASKS, FUNCTION, FORGET ══► Engine (main thread) ── job.op ──► Workspace
               ◄══ RESULTS, OUTPUT, RETURNED ══

Tasks run in the main thread, because signals, MPI and GUI code need it. The courier serves what can not wait until user
code returns; nothing wakes it for a plain quick task. The agent (agent.py) forks engines, watches them and answers
heartbeats for them.

Rules that hold here: the socket belongs to whoever holds `_io`: the main thread while it waits, the courier while user code
runs. A task leaves `_queue` under `_queue_lock`, so that it is either run or given back, never both. The engine tells its agent
by shared memory (`CELL`) which task it is running, so that a crash, or a task that runs too long, can be told.
"""

from __future__ import annotations

import binascii
import builtins
import io
import json
import os
import select
import signal
import socket
import struct
import sys
import threading
import time
import traceback
from collections import deque
from typing import Any, Callable, Optional

from . import config, net, pack, wire
from .allocation import job_name
from .errors import ConnectError, ProtocolError, TaskTimeout, UnmetDependency, UserError
from .workspace import Job, Workspace, mime_bundle

FLUSH_S = 0.002  # a result waits at most this long for others to travel with ...
COURIER_S = 0.005  # ... or this long if the task after it is a slow one
LOOK_S = 0.05  # between two looks for tasks that are to be given back and have not arrived
WANTED_S = 10.0  # how long a task that is to be given back may be on its way to us, or have ended unnoticed
OUTPUT_MAX = 1 << 20  # characters of output kept before the printing task must send them itself
REJOIN_S = 120.0  # how long to try to reach the controller again
KEPT_MAX = 64 << 20  # bytes of results that are kept until they are safe

CELL = struct.Struct("=8sQd")  # session, number + 1 of the running task (0: none), monotonic time by which it must end (0: none)
CELL_ID = struct.Struct("=q")  # behind it: the engine's id
CELL_ITEM = struct.Struct("=q")  # behind that: number + 1 of the item of a map's chunk that it is at (0: not told)
CELL_ITEM_AT = CELL.size + CELL_ID.size
CELL_SIZE = 64  # one cache line each
WORN = 85  # exit code: a new process is to take our place


class Stop(BaseException):
    """Ends the main thread of an engine, out of user code if need be."""


class Unsaved:
    """Results that were sent on the present connection and are kept until the controller says that they are safe. Of too many, and of
    large ones that nobody will put on disk, only the names are kept: their payload is None."""

    def __init__(self) -> None:
        self._sections: deque[tuple[bytes, list[wire.Result]]] = deque()
        self._sent = self._size = 0

    def add(self, session: bytes, results: list[wire.Result], frames: list[Any], durable: bool) -> None:
        """A section was sent."""
        if len(frames) > 1:
            keep = _copied if durable else _without_payload  # user code may change what it returned
            results = [keep(r) for r in results]
        self._sections.append((session, results))
        self._sent += 1
        if durable or len(frames) == 1:
            self._size += sum([len(f) if type(f) is bytes else memoryview(f).nbytes for f in frames])
        if self._size > KEPT_MAX:
            self._sections = deque((session, [_without_payload(r) for r in results]) for session, results in self._sections)
            self._size = 0

    def saved(self, number: int) -> None:
        """The first `number` sections are safe."""
        for _ in range(number - self._sent + len(self._sections)):
            if self._sections:
                self._sections.popleft()
        if not self._sections:
            self._size = 0

    def take(self) -> list[tuple[bytes, wire.Result]]:
        """All that is kept, for another connection."""
        found = [(session, r) for session, results in self._sections for r in results]
        self.__init__()  # type: ignore[misc]
        return found


def _copied(result: wire.Result) -> wire.Result:
    payload = result.payload
    return result if type(payload) is bytes else result._replace(payload=[bytes(piece) for piece in payload])


def _without_payload(result: wire.Result) -> wire.Result:
    return result._replace(payload=None)  # type: ignore[arg-type]


class Stream(io.TextIOBase):
    """sys.stdout or sys.stderr of an engine: text goes to the client of the running task."""

    encoding = "utf-8"
    errors = "replace"

    def __init__(self, name: str, emit: Callable[[str, str], None], fd: int):
        self.name, self._emit, self._fd = name, emit, fd

    def write(self, text: str) -> int:
        """Hand over text; returns the number of its characters."""
        if not isinstance(text, str):
            raise TypeError(f"write() argument must be str, not {type(text).__name__}")
        if text:
            self._emit(self.name, text)
        return len(text)

    def writable(self) -> bool:
        """It takes text."""
        return True

    def fileno(self) -> int:
        """The descriptor that child processes and C code write to: the engine's log."""
        return self._fd

    def isatty(self) -> bool:
        """It is no terminal, wherever it goes."""
        return False


class Engine:
    """Runs tasks one by one in the main thread.

    Args:
        read_info: gives the engine's connection file as it is now.
        uuid, agent: our name and our agent's.
        leash: our end of the agent's socketpair.
        cell: the memory shared with the agent.
        startup: code to run before the first task: (source, name) pairs.
        log: where to tell what happens.
    """

    def __init__(self, read_info: Callable[[], dict[str, Any]], uuid: str, agent: str, leash: socket.socket,
                 cell: memoryview, startup: list[tuple[str, str]], log: Any):
        self.read_info, self.agent, self.log = read_info, agent, log
        self.uuid: str = uuid
        self.id: Optional[int] = None
        self.until: Optional[float] = None  # monotonic time when it takes no more tasks
        self.drain_s = 0.0  # what a task may take of which nobody knows how long it runs
        self.wear: Optional[tuple[int, int]] = None  # tasks and bytes of memory after which we are worn (0: any)
        self.worn = False  # a new process is to take our place
        self._tasks_run = 0
        self.engine_set = ""  # what tells the engines of one set from others
        self.mpi: Any = None  # how to enter MPI (`mpi.Setup`), if at all ...
        self.world: Any = None  # ... and what was found there (`mpi.World`)
        self._leash, self._cell = leash, cell
        self._context: Any = None
        self._link: Any = None
        self._tunnel: Any = None
        self._watch: Any = None
        self._io = threading.Lock()
        self._queue: deque[tuple[Job, int, int, Any]] = deque()
        self._queue_lock = threading.Lock()
        self._jobs: dict[bytes, Job] = {}
        self._running: Optional[tuple[Job, int, int, Any]] = None  # from the queue until its result is in `_results`
        self._results: list[tuple[bytes, wire.Result]] = []
        self._unsaved = Unsaved()
        self._forgotten: list[tuple[bytes, wire.Result]] = []  # that may have been lost on the way, and are not kept
        self._durable = False  # results are to be kept until they are on disk
        self._output: list[tuple[bytes, int, str, str]] = []
        self._output_size = 0
        self._returned: list[tuple[bytes, int, int]] = []
        self._wanted: dict[tuple[bytes, int], float] = {}  # tasks to give back that are not here (yet), since when
        self._current: tuple[bytes, int] = (b"", 0)
        self._pid = os.getpid()
        self._in_user_code = False
        self._stopping: Optional[str] = None
        self._must_rejoin = False
        self._joined = 0.0
        self._flushed = 0.0
        self._bell_armed = False
        self._bell_r, self._bell_w = os.pipe()  # wakes the courier
        self._wake_r, self._wake_w = os.pipe()  # wakes the main thread while it waits for messages
        for fd in (self._bell_w, self._wake_r, self._wake_w):
            os.set_blocking(fd, False)
        self.workspace = Workspace(self._where, startup, log, lambda at: CELL_ITEM.pack_into(cell, CELL_ITEM_AT, at))

    # --- life

    def run(self) -> str:
        """Serve until told to stop; returns why it ended."""
        sys.modules["__main__"] = self.workspace.main
        self._stdout, self._stderr = Stream("stdout", self._emit, 1), Stream("stderr", self._emit, 2)
        sys.stdout, sys.stderr = self._stdout, self._stderr  # type: ignore[assignment]
        pack.on_publish(self._publish)
        pack.on_current_task(self._what_runs)
        builtins.display = self._display  # type: ignore[attr-defined]  # where notebooks have it, too
        signal.signal(signal.SIGINT, self._on_sigint)
        signal.signal(signal.SIGTERM, self._on_sigterm)
        threading.Thread(target=self._courier, name="courier", daemon=True).start()
        self._context = net.Context()
        try:
            if self.mpi is not None:
                self._enter_mpi()
            self._join_soon(self.read_info()["reuse"])
            self._run_startup()
            while self._stopping is None:
                with self._queue_lock:
                    task = self._running = self._queue.popleft() if self._queue else None
                if task is None:
                    self._exchange()
                else:
                    self._run_task(*task)
        except Stop:
            pass
        except UserError as e:
            self._stopping = str(e)
        self._leave()
        return self._stopping or "it was told to stop"

    def _enter_mpi(self) -> None:
        """Set MPI up before we register: our rank is the id that we ask for."""
        from .mpi import enter

        try:
            self._in_user_code = True
            world = enter(self.mpi, self.workspace.namespace, self.log)
        finally:
            self._in_user_code = False
        self.workspace.keep()
        if world.size > 1:
            self.world, self.id = world, (self.id or 0) + world.rank

    def _join(self) -> None:
        """Connect, register, and say what we hold; the caller owns the socket."""
        with self._queue_lock:
            tasks = [*([self._running] if self._running is not None else ()), *self._queue]
        done = [(session, r.seq, r.attempt) for session, r in self._results]
        lost = {(session, r.seq, r.attempt): 1 for session, r in self._forgotten}
        holds = {**lost, **dict.fromkeys(done, 0), **dict.fromkeys(((t[0].session, t[1], t[2]) for t in tasks), 0)}
        hello = {"role": "engine", "protocol": wire.VERSION, "uuid": self.uuid, "agent": self.agent, "id": self.id,
                 "host": socket.gethostname(), "pid": os.getpid(), "python": sys.version.split()[0],
                 "holds": [[session.hex(), seq, attempt, flag] for (session, seq, attempt), flag in holds.items()]}
        if self.until is not None:
            hello.update(left_s=self.until - time.monotonic(), drain_s=self.drain_s)
        if self.engine_set:
            hello["set"] = self.engine_set
        if self.world is not None:
            hello["mpi"] = self.world._asdict()
        info = self.read_info()
        if net.needs_tunnel(info) and self._tunnel is None:
            from .tunnel import Shared

            self._tunnel = Shared(tunnel_name(self.agent))
        link, welcome = net.greet(self._context, info, hello, tunnel=self._tunnel)
        if type(welcome.get("id")) is not int or not 0 <= welcome["id"] < wire.NO_ENGINE:
            link.close()
            raise ConnectError(f"the controller at {link.address} sent a welcome that is malformed (id)")
        needed = {(task[0].session, task[0].fn) for task in tasks}
        for key in [key for key in self.workspace.functions if key not in needed]:
            del self.workspace.functions[key]  # the controller counts on nothing that an earlier connection brought
        self._link, self.id, self._joined, self._durable = link, welcome["id"], time.monotonic(), bool(welcome.get("durable"))
        self._forgotten.clear()
        self._drop({(bytes.fromhex(session), seq): attempt for session, seq, attempt in welcome.get("void", ())})
        CELL_ID.pack_into(self._cell, CELL.size, self.id)
        self._watch = net.Watch([link.sock, link.monitor, self._wake_r])

    def _rejoin(self) -> None:
        """The connection broke, or we were taken for dead: register again, with what we hold."""
        self._part()
        self._join_soon(True)
        self._must_rejoin = False

    def _part(self) -> None:
        """Close the connection; what may have been lost on it is to be sent again."""
        if self._link.sock.closed:
            return
        self._link.close()
        self.log.warning("engine %s registers again", self.id)
        self._returned.clear()
        sent = self._unsaved.take()
        self._results[:0] = [entry for entry in sent if entry[1].payload is not None]
        self._forgotten += [entry for entry in sent if entry[1].payload is None]

    def _drop(self, void: dict[tuple[bytes, int], int]) -> None:
        """Forget tasks that are others' now, {(session, number): attempt}, unless they run. Results that may be void because they are there
        already, and are not on disk yet, stay."""
        with self._queue_lock:
            if any((t[0].session, t[1]) in void for t in self._queue):
                self._queue = deque(t for t in self._queue if void.get((t[0].session, t[1])) != t[2])
        for entry in self._results[:] if void and not self._durable else ():
            if void.get((entry[0], entry[1].seq)) == entry[1].attempt:
                self._results.remove(entry)

    def _join_soon(self, patient: bool) -> None:
        """Connect and register; if `patient`, also with a controller that is away and may come back."""
        deadline = time.monotonic() + REJOIN_S
        while self._stopping is None:
            try:
                return self._join()
            except UserError as e:
                if not patient:
                    raise
                if time.monotonic() > deadline:
                    self._stopping = str(e)
                time.sleep(0.2)

    def _leave(self) -> None:
        with self._io:
            if self._link is not None:
                if self._link.lost is None:
                    self._flush()
                    net.send(self._link.sock, wire.encode_json(wire.BYE, {"reason": self._stopping or "it was told to stop"}))
                self._link.close(500)
            self._context.term()

    def _on_sigint(self, signum: int, frame: Any) -> None:
        if self._in_user_code:
            raise KeyboardInterrupt

    def _on_sigterm(self, signum: int, frame: Any) -> None:
        job = job_name()  # whose end this may be
        self._stopping = self._stopping or "it was told to stop" + (f" in {job}" if job else "")
        if self._in_user_code:
            raise Stop
        self._ring(self._wake_w)

    def _run_startup(self) -> None:
        try:
            self._in_user_code = True
            self.workspace.run_startup()
        finally:
            self._in_user_code = False

    # --- messages

    def _exchange(self) -> None:
        """Send what is due, wait for messages and take them in."""
        with self._io:
            if self._must_rejoin:
                self._rejoin()
            self._flush()
            CELL.pack_into(self._cell, 0, b"", 0, 0.0)
            self._current = (b"", 0)
            self._watch.used.add(self._link.sock)
            ready = self._watch.wait(None)
            if self._wake_r in ready:
                os.read(self._wake_r, 4096)
            if self._link.sock in ready:
                self._receive()
            elif self._link.monitor in ready and self._link.check() and self._stopping is None:
                self._rejoin()

    def _receive(self) -> None:
        while True:
            frames = net.recv(self._link.sock)
            kind = frames[0]
            try:
                if kind == wire.TASKS:
                    self._on_tasks(frames)
                elif kind == wire.FUNCTION:
                    key = bytes(frames[1])
                    self.workspace.functions[key[: wire.SESSION_SIZE], key[wire.SESSION_SIZE :].hex()] = frames[2:]
                elif kind == wire.FORGET:
                    key = bytes(frames[1])
                    self.workspace.functions.pop((key[: wire.SESSION_SIZE], key[wire.SESSION_SIZE :].hex()), None)
                elif kind == wire.SAVED:
                    self._unsaved.saved(wire.decode_number(frames))
                elif kind == wire.ABORT:
                    session, ids = wire.decode_ids(frames)
                    self._drop({(session, seq): attempt for seq, attempt in ids})
                elif kind == wire.REFUSED:
                    self._rejoin()
                    return
            except (ProtocolError, IndexError, TypeError, ValueError, RecursionError) as e:
                self.log.error("dropped a malformed message: %s: %s", type(e).__name__, e)
            if not net.readable(self._link.sock):
                return

    def _on_tasks(self, frames: list[Any]) -> None:
        batch = []
        for raw, session, tasks in wire.decode_tasks(frames):
            job = self._jobs.get(session + raw)
            if job is None:
                if len(self._jobs) >= 4096:
                    self._jobs.clear()
                job = self._jobs[session + raw] = self.workspace.job(session, raw)
            for seq, attempt, payload in tasks:
                batch.append((job, seq, attempt, payload))
        with self._queue_lock:
            self._queue.extend(batch)

    def _flush(self) -> None:
        """Send output, results and returned tasks. The caller owns the socket."""
        if self._link.lost is not None:
            return
        # Others may append meanwhile: take what is there, in one step each, results before the output that belongs to them.
        results = self._results[:]
        del self._results[: len(results)]
        output = self._output[:]
        del self._output[: len(output)]
        self._output_size = 0
        if output:
            self._send_output(output)
        if results:
            message: list[Any] = [wire.RESULTS]
            start = 0
            for i in range(1, len(results) + 1):
                if i == len(results) or results[i][0] != results[start][0]:
                    section = [r for _, r in results[start:i]]
                    frames = wire.encode_results(results[start][0], self.id or 0, section)
                    message += frames
                    self._unsaved.add(results[start][0], section, frames, self._durable)
                    start = i
            net.send(self._link.sock, message)
        if self._returned:
            returned = self._returned[:]
            del self._returned[: len(returned)]
            for session in dict.fromkeys(r[0] for r in returned):
                ids = [(seq, attempt) for owner, seq, attempt in returned if owner == session]
                net.send(self._link.sock, wire.encode_ids(wire.RETURNED, session, ids))

    def _send_output(self, output: list[tuple[bytes, int, str, str]]) -> None:
        pieces: dict[bytes, list[list[Any]]] = {}
        for session, seq, name, text in output:
            mine = pieces.setdefault(session, [])
            if mine and mine[-1][0] == seq and mine[-1][1] == name in wire.PRINTED:
                mine[-1][2].append(text)
            else:
                mine.append([seq, name, [text]])
        for session, mine in pieces.items():
            joined = [[seq, name, "".join(texts)] for seq, name, texts in mine]
            net.send(self._link.sock, wire.encode_output(session, self.id or 0, joined))

    def _ring(self, fd: int) -> None:
        try:
            os.write(fd, b"!")
        except BlockingIOError:
            pass  # it is ringing already

    def _arm_courier(self) -> None:
        """Something waits to be sent while user code runs."""
        if not self._bell_armed:
            self._bell_armed = True
            self._ring(self._bell_w)

    # --- the courier

    def _courier(self) -> None:
        """Side thread: serves what can't wait until the main thread returns from user code."""
        poll = select.poll()
        poll.register(self._leash, select.POLLIN)
        poll.register(self._bell_r, select.POLLIN)
        pending = b""
        while True:
            wait_s = COURIER_S if self._bell_armed else LOOK_S if self._wanted or self._must_rejoin else None
            ready = dict(poll.poll(None if wait_s is None else wait_s * 1000))
            if self._bell_r in ready:
                os.read(self._bell_r, 4096)
                continue  # one beat later, not at once: most often the main thread is quicker
            if self._leash.fileno() in ready:
                data = self._leash.recv(65536)
                if not data:  # the agent is gone, so nobody answers for us any more
                    os._exit(1)
                *lines, pending = (pending + data).split(b"\n")
                for line in lines:
                    try:
                        self._on_order(json.loads(line))
                    except (KeyError, TypeError, ValueError) as e:
                        self.log.error("dropped a malformed order: %s: %s", type(e).__name__, e)
            self._bell_armed = False  # before looking, so that what comes after the look rings again
            if self._wanted:
                self._give_back()
            if self._results or self._output or self._returned or self._must_rejoin:
                self._serve_aside()

    def _serve_aside(self) -> None:
        """Use the socket in the main thread's stead, or, if it is waiting for messages, let it do so itself."""
        if self._io.acquire(blocking=False):
            try:
                if self._must_rejoin:
                    self._part()
                    self._join()
                    self._must_rejoin = False
                if self._link is not None:
                    self._flush()
            except UserError as e:
                self.log.warning("engine %s can not register again yet: %s", self.id, e)
            finally:
                self._io.release()
        else:
            self._ring(self._wake_w)
            self._arm_courier()  # to look again: the main thread may have been on its way from the wait to user code

    def _on_order(self, order: dict[str, Any]) -> None:
        if order["op"] == "recall":
            now = time.monotonic()
            self._wanted.update(((bytes.fromhex(session), seq), now) for session, seq in order["tasks"])
        elif order["op"] == "rejoin":
            self._must_rejoin = self._joined < order["since"]
        elif order["op"] == "leave":  # after the task that runs
            self._stopping = self._stopping or order["reason"]
            self._ring(self._wake_w)

    def _give_back(self) -> None:
        """Give back the tasks that are wanted elsewhere. Some may wait in the socket, or be on their way to it."""
        if self._io.acquire(blocking=False):
            try:
                if self._link is not None and self._link.lost is None and net.readable(self._link.sock):
                    self._receive()
            finally:
                self._io.release()
        with self._queue_lock:
            taken = [t for t in self._queue if (t[0].session, t[1]) in self._wanted]
            if taken:
                self._queue = deque(t for t in self._queue if (t[0].session, t[1]) not in self._wanted)
        found = {(job.session, seq) for job, seq, _, _ in taken}
        patience = time.monotonic() - WANTED_S
        self._wanted = {key: since for key, since in self._wanted.items() if key not in found and since > patience}
        self._returned += [(job.session, seq, attempt) for job, seq, attempt, _ in taken]

    def _emit(self, name: str, text: str) -> None:
        session, seq = self._current
        if not session or os.getpid() != self._pid:  # a process that user code forked can not use our connection
            os.write(1 if name == "stdout" else 2, text.encode("utf-8", "replace"))
            return
        self._output.append((session, seq, name, text))
        self._output_size += len(text)
        if self._output_size > OUTPUT_MAX and self._io.acquire(blocking=False):
            try:
                self._flush()
            finally:
                self._io.release()
        else:
            self._arm_courier()

    def _publish(self, data: dict[str, Any]) -> None:
        """Send data of the running task to its client while it runs."""
        if not self._current[0] or os.getpid() != self._pid:
            raise RuntimeError("only a task can publish data, and not from another process")
        self._emit("data", binascii.b2a_base64(pack.pack_whole(data), newline=False).decode())

    def _display(self, *values: Any, **options: Any) -> None:
        """What user code finds as `display`: shows values richly to the client of the running task."""
        for value in values:
            if not self._current[0] or os.getpid() != self._pid:
                print(repr(value))
            else:
                self._emit("display", json.dumps(mime_bundle(value)))

    # --- running tasks

    def _run_task(self, job: Job, seq: int, attempt: int, payload: Any) -> None:
        session = job.session
        self._current = (session, seq)
        limit = 0.0 if job.run_timeout is None else time.monotonic() + job.run_timeout
        CELL.pack_into(self._cell, 0, session, seq + 1, limit)
        self.workspace.again = attempt > 1
        started = time.time()
        try:
            try:
                self._in_user_code = True
                if self._stopping is not None:  # the signal came a moment before the line above
                    raise Stop
                packed, status = job.op(job, payload), wire.OK
            finally:
                self._in_user_code = False
                if os.getpid() != self._pid:
                    _end_fork()
        except Stop:
            raise
        except BaseException as e:
            if limit and isinstance(e, KeyboardInterrupt) and time.monotonic() > limit:
                e = TaskTimeout(f"the task ran longer than its run_timeout of {job.run_timeout:g} s")
            packed, status = pack.pack_error(e, self._where()), wire.UNMET if type(e) is UnmetDependency else wire.ERROR
        ended = time.time()
        self._results.append((session, wire.Result(seq, started, ended - started, attempt, status, packed)))
        self._running = None
        if self.wear is not None:
            self._look_for_wear(*self.wear)
        if not self._queue or ended - self._flushed > FLUSH_S or type(packed) is not bytes:
            with self._io:
                self._flush()
            self._flushed = ended
        else:
            self._arm_courier()

    def _look_for_wear(self, max_tasks: int, max_bytes: int) -> None:
        self._tasks_run += 1
        why = f"it has run {self._tasks_run} tasks" if max_tasks and self._tasks_run >= max_tasks else ""
        if not why and max_bytes and resident() > max_bytes:
            why = f"it holds {resident() >> 20} MiB of memory"
        if why and self._stopping is None:
            self.worn, self._stopping = True, f"a new process takes its place, as {why}"

    def _what_runs(self) -> Optional[dict[str, Any]]:
        task = self._running
        if task is None or os.getpid() != self._pid or not self._in_user_code:
            return None
        return {"msg_id": wire.msg_id((task[0].session, task[1])), "attempt": task[2], "engine_id": self.id, "engine_uuid": self.uuid}

    def _where(self) -> dict[str, Any]:
        return {"engine_id": self.id, "engine_uuid": self.uuid, "host": socket.gethostname(), "pid": os.getpid()}


def resident() -> int:
    """Bytes of memory that this process holds; on macOS the most that it ever held."""
    try:
        with open("/proc/self/statm") as f:
            return int(f.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except FileNotFoundError:
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def tunnel_name(agent: str) -> str:
    """What the ssh tunnel of an agent and its engines is called."""
    return agent[:16]


def _end_fork() -> None:
    """User code forked, and the child has come back from it: it must not go on as a second engine."""
    kind = sys.exc_info()[0]
    if kind is not None and kind is not SystemExit:
        traceback.print_exc(file=sys.__stderr__)
        sys.__stderr__.flush()
    os._exit(0 if kind is None else 1)


def main(argv: Optional[list[str]] = None) -> int:
    """`ipengine`: the command line."""
    from .agent import serve

    return config.run_main("ipengine", serve, argv)


if __name__ == "__main__":
    sys.exit(main())
