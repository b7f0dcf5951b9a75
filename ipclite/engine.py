"""The engine runs user code; the agent forks the engines of a host and watches them.

    controller ═══════════════════════════ Agent ── fork, waitpid, kill ──► engines
        ║  PING/PONG, CONTROL, EXITED        └────── socketpair: recall, rejoin ──► Courier (side thread)
        ║                                                                             │ flushes output and results,
        ╚═══ TASKS, FUNCTION / RESULTS, OUTPUT ═══► Engine (main thread) ◄────────────┘ takes tasks back

The agent imports what engines need, forks them and only then opens its own connection. It answers heartbeats for
them, so user code that holds the GIL is busy, not dead. Tasks run in the engine's main thread, because
signals, MPI and GUI code need it; nothing wakes the courier for a plain quick task.

Rules that hold here: the engine's socket belongs to whoever holds `_io`: the main thread while it waits, the courier
while user code runs. A task leaves `_queue` under `_queue_lock`, so that it is either run or given back, never both.
Each engine shares 16 bytes of memory with its agent that name the task it is running, so that a crash can be told.
"""

from __future__ import annotations

import ast
import atexit
import binascii
import builtins
import contextlib
import faulthandler
import gc
import io
import json
import linecache
import mmap
import os
import select
import signal
import socket
import struct
import sys
import threading
import time
import traceback
import types
from collections import deque
from pathlib import Path
from typing import Any, Callable, Optional

from . import config, net, pack, wire
from .errors import ConfigError, ConnectError, ConnectionFileError, ProtocolError, TaskTimeout, UnmetDependency, UserError

FLUSH_S = 0.002  # a result waits at most this long for others to travel with ...
COURIER_S = 0.005  # ... or this long if the task after it is a slow one
LOOK_S = 0.05  # between two looks for tasks that are to be given back and have not arrived
OUTPUT_MAX = 1 << 20  # characters of output kept before the printing task must send them itself
REJOIN_S = 60.0  # how long to try to reach the controller again
GRACE_S = 5.0  # between asking an engine to end and killing it
INTERRUPT_GRACE_S = 2.0  # between interrupting a task and killing its engine
WATCH_S = 0.25  # between two looks of the agent at its engines
TAIL_BYTES = 2000  # of an engine's log that explain its end

REPRS = (("text/html", "_repr_html_"), ("text/markdown", "_repr_markdown_"), ("text/latex", "_repr_latex_"),
         ("image/svg+xml", "_repr_svg_"), ("image/png", "_repr_png_"), ("image/jpeg", "_repr_jpeg_"))
_CELL = struct.Struct("=8sQd")  # session, number + 1 of the running task (0: none), monotonic time by which it must end (0: none)
_CELL_ID = struct.Struct("=q")  # behind it: the engine's id
CELL_SIZE = 64  # one cache line each


class Stop(BaseException):
    """Ends the main thread of an engine, out of user code if need be."""


class Job:
    """A spec, ready to run: what to do with a payload. Shared by the tasks that came with it."""

    __slots__ = ("op", "session", "fn", "body", "run_timeout")

    def __init__(self, op: Callable[..., Any], session: bytes, fn: Optional[str], body: dict[str, Any]):
        self.op, self.session, self.fn, self.body = op, session, fn, body
        self.run_timeout: Optional[float] = body.get("run_timeout")


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
        startup: code to run before the first task, and after each `clear`: (source, name) pairs.
        log: where to tell what happens.
    """

    def __init__(self, read_info: Callable[[], dict[str, Any]], uuid: str, agent: str, leash: socket.socket,
                 cell: memoryview, startup: list[tuple[str, str]], log: Any):
        self.read_info, self.agent, self.log, self.startup = read_info, agent, log, startup
        self.uuid: str = uuid
        self.id: Optional[int] = None
        self._leash, self._cell = leash, cell
        self._context: Any = None
        self._link: Any = None
        self._tunnel: Any = None
        self._watch: Any = None
        self._io = threading.Lock()
        self._queue: deque[tuple[Job, int, int, Any]] = deque()
        self._queue_lock = threading.Lock()
        self._jobs: dict[bytes, Job] = {}
        self._functions: dict[tuple[bytes, str], Any] = {}
        self._results: list[tuple[bytes, wire.Result]] = []
        self._output: list[tuple[bytes, int, str, str]] = []
        self._output_size = 0
        self._returned: list[tuple[bytes, int, int]] = []
        self._wanted: set[tuple[bytes, int]] = set()  # tasks to give back that are not here (yet)
        self._current: tuple[bytes, int] = (b"", 0)
        self._pid = os.getpid()
        self._in_user_code = False
        self._stopping: Optional[str] = None
        self._must_rejoin = False
        self._flushed = 0.0
        self._bell_armed = False
        self._bell_r, self._bell_w = os.pipe()  # wakes the courier
        self._wake_r, self._wake_w = os.pipe()  # wakes the main thread while it waits for messages
        for fd in (self._bell_w, self._wake_r, self._wake_w):
            os.set_blocking(fd, False)
        self.namespace: dict[str, Any] = {}
        self._executed = 0  # pieces of code, for the numbers that notebooks show
        self._ops: dict[str, Callable[..., Any]] = {
            "apply": self._op_apply, "map": self._op_map, "execute": self._op_execute, "push": self._op_push,
            "pull": self._op_pull, "clear": self._op_clear,
        }

    # --- life

    def run(self) -> str:
        """Serve until told to stop; returns why it ended."""
        main = types.ModuleType("__main__")
        sys.modules["__main__"] = main
        self.namespace = main.__dict__
        self._reset_namespace()
        self._stdout, self._stderr = Stream("stdout", self._emit, 1), Stream("stderr", self._emit, 2)
        sys.stdout, sys.stderr = self._stdout, self._stderr  # type: ignore[assignment]
        pack.on_publish(self._publish)
        signal.signal(signal.SIGINT, self._on_sigint)
        signal.signal(signal.SIGTERM, self._on_sigterm)
        threading.Thread(target=self._courier, name="courier", daemon=True).start()
        self._context = net.Context()
        try:
            self._join_soon(self.read_info()["reuse"])
            self._run_startup()
            while self._stopping is None:
                with self._queue_lock:
                    task = self._queue.popleft() if self._queue else None
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

    def _join(self) -> None:
        """Connect and register; the caller owns the socket."""
        hello = {"role": "engine", "protocol": wire.VERSION, "uuid": self.uuid, "agent": self.agent, "id": self.id,
                 "host": socket.gethostname(), "pid": os.getpid(), "python": sys.version.split()[0]}
        info = self.read_info()
        if net.needs_tunnel(info) and self._tunnel is None:
            from .tunnel import Shared

            self._tunnel = Shared(_tunnel_name(self.agent))
        link, welcome = net.greet(self._context, info, hello, tunnel=self._tunnel)
        self._functions.clear()  # the controller counts on nothing that an earlier connection brought
        self._link, self.id = link, welcome["id"]
        _CELL_ID.pack_into(self._cell, _CELL.size, self.id)
        self._watch = net.Watch([link.sock, link.monitor, self._wake_r])

    def _rejoin(self) -> None:
        """The connection broke, or we were taken for dead: drop what we hold of it and register again."""
        self._must_rejoin = False
        with self._queue_lock:
            self._queue.clear()
        self._results.clear()
        self._link.close()
        self.log.warning("engine %s registers again", self.id)
        self._join_soon(True)

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
        self._stopping = self._stopping or "it was told to stop"
        if self._in_user_code:
            raise Stop
        self._ring(self._wake_w)

    def _reset_namespace(self) -> None:
        self.namespace.clear()
        self.namespace.update({"__name__": "__main__", "__doc__": None, "__builtins__": builtins, "__spec__": None})

    def _run_startup(self) -> None:
        for source, name in self.startup:
            try:
                self._in_user_code = True
                exec(compile(source, name, "exec"), self.namespace)
            except Exception:
                self.log.error("startup code %s failed:\n%s", name, traceback.format_exc())
            finally:
                self._in_user_code = False

    # --- messages

    def _exchange(self) -> None:
        """Send what is due, wait for messages and take them in."""
        with self._io:
            if self._must_rejoin:
                self._rejoin()
            self._flush()
            _CELL.pack_into(self._cell, 0, b"", 0, 0.0)
            self._wanted.clear()  # by engines that are as idle as we are now
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
                    self._functions[key[: wire.SESSION_SIZE], key[wire.SESSION_SIZE:].hex()] = frames[2:]
                elif kind == wire.FORGET:
                    key = bytes(frames[1])
                    self._functions.pop((key[: wire.SESSION_SIZE], key[wire.SESSION_SIZE:].hex()), None)
                elif kind == wire.REFUSED:
                    self._rejoin()
                    return
            except ProtocolError as e:
                self.log.error("dropped a malformed message: %s", e)
            if not net.readable(self._link.sock):
                return

    def _on_tasks(self, frames: list[Any]) -> None:
        batch = []
        for raw, session, tasks in wire.decode_tasks(frames):
            job = self._jobs.get(session + raw)
            if job is None:
                if len(self._jobs) >= 4096:
                    self._jobs.clear()
                job = self._jobs[session + raw] = self._make_job(session, raw)
            for seq, attempt, payload in tasks:
                batch.append((job, seq, attempt, payload))
        with self._queue_lock:
            self._queue.extend(batch)

    def _make_job(self, session: bytes, raw: bytes) -> Job:
        body = json.loads(raw)
        for folder in body.get("path", ()):
            if folder not in sys.path and os.path.isdir(folder):
                sys.path.append(folder)
        return Job(self._ops.get(body.get("op"), self._op_unknown), session, body.get("fn"), body)

    def _flush(self) -> None:
        """Send output, results and returned tasks. The caller owns the socket."""
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
                    message += wire.encode_results(results[start][0], self.id or 0, [r for _, r in results[start:i]])
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
            if mine and mine[-1][0] == seq and mine[-1][1] == name != "data":
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
            wait_s = COURIER_S if self._bell_armed else LOOK_S if self._wanted else None
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
                    self._on_order(json.loads(line))
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
                    self._rejoin()
                if self._link is not None and self._link.lost is None:
                    self._flush()
            finally:
                self._io.release()
        else:
            self._ring(self._wake_w)

    def _on_order(self, order: dict[str, Any]) -> None:
        if order["op"] == "recall":
            self._wanted.update((bytes.fromhex(session), seq) for session, seq in order["tasks"])
        elif order["op"] == "rejoin":
            self._must_rejoin = True

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
        self._wanted.difference_update([(job.session, seq) for job, seq, _, _ in taken])
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

    # --- running tasks: each `_op_` unpacks its payload, does what its name says and returns the packed value

    def _run_task(self, job: Job, seq: int, attempt: int, payload: Any) -> None:
        session = job.session
        self._current = (session, seq)
        limit = 0.0 if job.run_timeout is None else time.monotonic() + job.run_timeout
        _CELL.pack_into(self._cell, 0, session, seq + 1, limit)
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
        if not self._queue or ended - self._flushed > FLUSH_S or type(packed) is not bytes:
            with self._io:
                self._flush()
            self._flushed = ended
        else:
            self._arm_courier()

    def _where(self) -> dict[str, Any]:
        return {"engine_id": self.id, "engine_uuid": self.uuid, "host": socket.gethostname(), "pid": os.getpid()}

    def _function(self, job: Job) -> tuple[Any, dict[str, Any], Optional[dict[str, Any]]]:
        """The function of a job, the names captured with it, and what to lend to the namespace while it runs."""
        key = (job.session, job.fn or "")
        held = self._functions.get(key)
        if held is None:
            raise ProtocolError(f"the function {job.fn} never arrived")
        if type(held) is list:
            names: dict[str, Any] = {}
            payload = held if len(held) > 1 else bytes(held[0])
            held = (pack.unpack(payload, self.namespace, names), names, pack.merged(names) if names else None)
            if not pack.is_live(payload):
                self._functions[key] = held
        return held  # type: ignore[no-any-return]

    def _arguments(self, payload: Any, names: dict[str, Any], extended: Any) -> tuple[Any, Any]:
        """Unpacked arguments, and what to lend while they are used: functions among them may bring names of their own."""
        more: dict[str, Any] = {}
        value = pack.unpack(payload, self.namespace, more)
        return value, pack.merged({**names, **more}) if more else extended

    def _op_apply(self, job: Job, payload: Any) -> Any:
        function, names, extended = self._function(job)
        (args, kwargs), extended = self._arguments(payload, names, extended)
        if extended is None:
            return pack.pack(function(*args, **kwargs))
        with pack.lend(self.namespace, extended):
            return pack.pack(function(*args, **kwargs))

    def _op_map(self, job: Job, payload: Any) -> Any:
        """The value is (values, failures): failures maps the position of an item to its packed error."""
        function, names, extended = self._function(job)
        sequences, extended = self._arguments(payload, names, extended)
        values: list[Any] = []
        failures: dict[int, Any] = {}
        calls = map(function, *sequences)
        with pack.lend(self.namespace, extended):
            if job.body.get("retries"):  # another engine is to try again
                values.extend(calls)
            while True:
                try:
                    values.extend(calls)  # what came before an exception stays in the list
                    if len(values) >= len(sequences[0]):
                        break
                    raise RuntimeError("the function raised StopIteration")  # as PEP 479 has it for generators
                except UnmetDependency:  # the whole chunk goes elsewhere
                    raise
                except Exception as e:
                    failures[len(values)] = bytes(pack.pack_error(e, self._where()))
                    values.append(None)
            return pack.pack((values, failures))

    def _op_execute(self, job: Job, payload: Any) -> Any:
        source, name, show = pack.unpack(payload)
        linecache.cache[name] = (len(source), None, source.splitlines(True), name)
        tree = ast.parse(source, name)
        last = tree.body.pop() if show and tree.body and isinstance(tree.body[-1], ast.Expr) else None
        self._executed += 1
        exec(compile(tree, name, "exec"), self.namespace)
        value = None if last is None else eval(compile(ast.Expression(last.value), name, "eval"), self.namespace)
        if value is not None:
            self.namespace["_"] = value
        return pack.pack((self._executed, _mime_bundle(value)))

    def _op_push(self, job: Job, payload: Any) -> Any:
        names: dict[str, Any] = {}
        for name, value in pack.unpack(payload, self.namespace, names).items():
            owner, _, attribute = name.rpartition(".")
            if owner:
                setattr(eval(owner, self.namespace), attribute, value)
            else:
                self.namespace[name] = value
        for name, value in names.items():  # functions that were pushed stay, and so must what they refer to
            self.namespace.setdefault(name, value)
        return pack.pack(None)

    def _op_pull(self, job: Job, payload: Any) -> Any:
        wanted = pack.unpack(payload)
        values = [eval(compile(w, "<pull>", "eval"), self.namespace) for w in ([wanted] if isinstance(wanted, str) else wanted)]
        return pack.pack(values[0] if isinstance(wanted, str) else values)

    def _op_clear(self, job: Job, payload: Any) -> Any:
        self._reset_namespace()
        self._run_startup()
        return pack.pack(None)

    def _op_unknown(self, job: Job, payload: Any) -> Any:
        raise ProtocolError(f"this engine does not know the operation {job.body.get('op')!r}; is its ipclite older than the client's?")


def _mime_bundle(value: Any) -> dict[str, Any]:
    """What a notebook shows of a value, by MIME type; nothing of None."""
    if value is None:
        return {}
    bundle: dict[str, Any] = {"text/plain": repr(value)}
    for mime, name in REPRS if not isinstance(value, type) else ():
        try:
            shown = getattr(value, name, lambda: None)()
        except Exception:  # as in a notebook: it is told, and the other forms are shown
            traceback.print_exc()
            continue
        if isinstance(shown, (str, bytes)):
            bundle[mime] = binascii.b2a_base64(shown, newline=False).decode() if isinstance(shown, bytes) else shown
    return bundle


def _tunnel_name(agent: str) -> str:
    return agent[:16]


def _end_fork() -> None:
    """User code forked, and the child has come back from it: it must not go on as a second engine."""
    kind = sys.exc_info()[0]
    if kind is not None and kind is not SystemExit:
        traceback.print_exc(file=sys.__stderr__)
        sys.__stderr__.flush()
    os._exit(0 if kind is None else 1)


class Child:
    """What the agent knows of one of its engines."""

    __slots__ = ("uuid", "pid", "leash", "cell", "log_path", "told", "kill_at", "doomed", "victim", "replace", "verdict")

    def __init__(self, uuid: str, pid: int, leash: socket.socket, cell: memoryview, log_path: Path):
        self.uuid, self.pid, self.leash, self.cell, self.log_path = uuid, pid, leash, cell, log_path
        self.told = False  # to end
        self.kill_at: Optional[float] = None
        self.doomed: dict[tuple[bytes, int], float] = {}  # tasks to interrupt if it runs them, and until when that holds
        self.victim: Optional[tuple[bytes, int]] = None  # the task that has been interrupted
        self.replace = False  # by a new engine when it has ended
        self.verdict: Optional[tuple[str, str]] = None  # on the task that it dies with: error class and message

    def running(self) -> tuple[Optional[tuple[bytes, int]], float]:
        """The task it is running, and the monotonic time by which that must end (0: any)."""
        session, number, limit = _CELL.unpack_from(self.cell, 0)
        return (session, number - 1) if number else None, limit

    def engine_id(self) -> int:
        """Its id; negative before it has registered."""
        return int(_CELL_ID.unpack_from(self.cell, _CELL.size)[0])

    def cause(self, status: int) -> tuple[str, bool]:
        """Why it ended, and whether that was a crash."""
        if os.WIFSIGNALED(status):
            signum = os.WTERMSIG(status)
            text = f"killed by signal {signum} ({_signal_name(signum)})"
            if signum == signal.SIGKILL and not self.told:
                text += ", by someone or for want of memory"
            return text, not self.told
        code = os.WEXITSTATUS(status)
        if self.told or code == 0:
            return "it was told to stop" if self.told else "it stopped", False
        return f"exited with code {code}", True

    def tail(self) -> str:
        """The last lines of its log."""
        try:
            with open(self.log_path, "rb") as f:
                f.seek(max(0, os.fstat(f.fileno()).st_size - TAIL_BYTES))
                return f.read().decode("utf-8", "replace").strip()
        except OSError:
            return ""


def _signal_name(signum: int) -> str:
    try:
        return signal.Signals(signum).name
    except ValueError:
        return f"SIG{signum}"


class Agent:
    """Forks the engines of this host, answers heartbeats for them and tells how they end.

    Args:
        settings: what `config.parse("engine", ...)` returned.
        read_info: gives the engine's connection file as it is now.
        log: where to tell what happens.
    """

    def __init__(self, settings: Any, read_info: Callable[[], dict[str, Any]], log: Any):
        self.settings, self.read_info, self.log = settings, read_info, log
        self.uuid = os.urandom(16).hex()
        self.children: dict[int, Child] = {}  # by pid
        self.failed = False
        self._startup = _startup_code(settings)
        self._context: Any = None
        self._link: Any = None
        self._tunnel: Any = None
        self._sources: Any = None
        self._end: Optional[str] = None
        self._heard = 0.0
        self._silence_s = 0.0
        self._wake_r, self._wake_w = os.pipe()
        os.set_blocking(self._wake_r, False)
        os.set_blocking(self._wake_w, False)

    # --- engines

    def fork_engines(self, n: int) -> None:
        """Start n engines."""
        cells = memoryview(mmap.mmap(-1, n * CELL_SIZE))
        for i in range(n):
            self._fork(cells[i * CELL_SIZE : (i + 1) * CELL_SIZE], None)

    def _fork(self, cell: memoryview, wanted_id: Optional[int]) -> None:
        _CELL.pack_into(cell, 0, b"", 0, 0.0)
        _CELL_ID.pack_into(cell, _CELL.size, -1)
        name = os.urandom(16).hex()
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        folder = self.settings.profile_dir
        pid = os.fork()
        if pid:
            theirs.close()
            path = config.log_file(folder, "ipengine", self.settings["Application.cluster_id"], pid)
            self.children[pid] = Child(name, pid, ours, cell, path)
            return
        code = 1
        try:
            ours.close()
            for child in self.children.values():
                child.leash.close()
            code = self._be_engine(name, theirs, cell, wanted_id)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.__stderr__.flush()
            os._exit(code)

    def _be_engine(self, name: str, leash: socket.socket, cell: memoryview, wanted_id: Optional[int]) -> int:
        os.setpgid(0, 0)  # so that what user code starts can be ended with it
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        os.close(self._wake_r)
        os.close(self._wake_w)
        path = config.log_file(self.settings.profile_dir, "ipengine", self.settings["Application.cluster_id"], os.getpid())
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(fd, 1)
        os.dup2(fd, 2)
        os.close(fd)
        faulthandler.enable(2)
        log = config.setup_logging("ipengine", self.settings["Application.log_level"])
        _close_all_but(leash.fileno())  # the agent's connection must not live on in its engines
        engine = Engine(self.read_info, name, self.uuid, leash, cell, self._startup, log)
        engine.id = wanted_id
        log.info("engine ended: %s", engine.run())
        atexit._run_exitfuncs()
        return 0 if engine.id is not None else 1

    def _reap(self) -> None:
        for pid in list(self.children):
            done, status = os.waitpid(pid, os.WNOHANG)
            if not done:
                continue
            child = self.children.pop(pid)
            cause, crashed = child.cause(status)
            if crashed:
                self.failed = True
                tail = child.tail()
                self.log.error("engine process %d ended: %s; the end of %s:\n%s", pid, cause, child.log_path, tail)
            else:
                self.log.info("engine process %d ended: %s", pid, cause)
            if self._link is not None:
                running, _ = child.running()
                net.send(self._link.sock, wire.encode_json(wire.EXITED, {
                    "uuid": child.uuid, "cause": cause, "crashed": crashed, "verdict": child.verdict,
                    "running": running and [running[0].hex(), running[1]]}))
            child.leash.close()
            _signal_group(pid, signal.SIGKILL)  # what its user code left behind
            if child.replace and self._end is None:
                self._fork(child.cell, child.engine_id())
        if not self.children:
            self.stop("all its engines have ended")

    # --- life

    def run(self) -> int:
        """Serve until stopped; returns the exit code."""
        gc.freeze()  # the engines share these pages with us as long as nobody writes to them
        signal.set_wakeup_fd(self._wake_w, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(signum, lambda n, _: self.stop(f"it got {_signal_name(n)}"))
        try:
            self._make_tunnel(self.read_info())
            self.fork_engines(self.settings["IPEngine.n"])
            self._context = net.Context()
            self._first_join()
            while self._end is None:
                self._turn()
        except UserError as e:
            if self._end is not None:  # what was going on was broken off
                return 0
            self.failed = True
            self.stop(str(e))
            raise
        finally:
            self._leave()
        return 1 if self.failed else 0

    def stop(self, reason: str) -> None:
        """Leave the loop soon."""
        self._end = self._end or reason
        if self._link is None and self._tunnel is not None:
            self._tunnel.abandon()

    def _make_tunnel(self, info: dict[str, Any]) -> None:
        """See to it that there is a tunnel, if one is needed, before engines look for it."""
        if not net.needs_tunnel(info):
            return
        from .tunnel import Tunnel

        self._tunnel = Tunnel(_tunnel_name(self.uuid), self.settings["IPEngine.sshkey"])
        net.tunnel_to(info, self._tunnel)

    def _first_join(self) -> None:
        info = self.read_info()
        try:
            self._join()
        except ConnectError as e:
            if not info["reuse"]:
                raise
            self._join_soon(info, str(e))

    def _join(self) -> None:
        self._link, welcome = net.greet(self._context, self.read_info(), {
            "role": "agent", "protocol": wire.VERSION, "uuid": self.uuid, "host": socket.gethostname(), "pid": os.getpid()},
            tunnel=self._tunnel)
        self._heard, self._silence_s = time.monotonic(), welcome["silence_s"]
        self._sources = net.Watch([self._link.sock, self._link.monitor, self._wake_r])

    def _turn(self) -> None:
        self._sources.used.update((self._link.sock, self._link.monitor))
        ready = self._sources.wait(WATCH_S)
        if self._wake_r in ready:
            os.read(self._wake_r, 4096)
        self._reap()
        lost = None
        if self._link.sock in ready:
            self._heard = time.monotonic()
            lost = self._receive()
        if self._link.monitor in ready:
            lost = lost or self._link.check()
        now = time.monotonic()
        if lost is None and now - self._heard > self._silence_s:
            lost = f"the controller said nothing for {now - self._heard:.0f} s"
        parent = self.settings["IPEngine.parent"]
        if parent and os.getppid() != parent:
            self.stop(f"its owner (pid {parent}) is gone")
        elif lost is not None and self._end is None:
            self._rejoin(lost)
        for child in self.children.values():
            self._watch(child, now)

    def _watch(self, child: Child, now: float) -> None:
        """Interrupt a task that is to end or has run too long; kill an engine that did not end what it was to end."""
        running, limit = child.running()
        if child.victim is not None and running != child.victim:
            child.victim = child.kill_at = None
        if child.kill_at is not None and now > child.kill_at:
            child.kill_at = None
            if child.victim is not None:
                child.told = child.replace = True
            _signal_group(child.pid, signal.SIGKILL)
        if running is not None and child.victim is None and not child.told:
            if limit and now > limit:
                child.verdict = ("TaskTimeout", "the task ran longer than its run_timeout, and its engine was killed as it did "
                                                "not react to an interrupt")
                self._interrupt(child, running, now)
            elif now < child.doomed.get(running, 0.0):
                child.verdict = None
                self._interrupt(child, running, now)
        if child.doomed:
            child.doomed = {key: until for key, until in child.doomed.items() if now < until}

    def _interrupt(self, child: Child, running: tuple[bytes, int], now: float) -> None:
        child.victim, child.kill_at = running, now + INTERRUPT_GRACE_S
        os.kill(child.pid, signal.SIGINT)

    def _receive(self) -> Optional[str]:
        """Take in what waits; returns why the connection is to be given up, or None."""
        while net.readable(self._link.sock):
            frames = net.recv(self._link.sock)
            kind = frames[0]
            if kind == wire.PING:
                net.send(self._link.sock, [wire.PONG])
            elif kind == wire.CONTROL:
                self._on_control(wire.decode_dict(frames))
            elif kind == wire.BYE:
                reason = wire.decode_dict(frames).get("reason")
                if not self._link.info["reuse"]:
                    self.stop(f"the controller ended: {reason}")
                return f"the controller ended: {reason}"
            elif kind == wire.REFUSED:
                return str(wire.decode_dict(frames).get("reason"))
        return None

    def _on_control(self, order: dict[str, Any]) -> None:
        child = next((c for c in self.children.values() if c.uuid == order["uuid"]), None)
        if child is None:
            return
        if order["op"] == "signal":
            os.kill(child.pid, order["signum"])
        elif order["op"] == "stop":
            child.replace = bool(order.get("restart"))
            self._end_child(child)
        elif order["op"] == "interrupt":
            until = time.monotonic() + INTERRUPT_GRACE_S
            child.doomed.update({(bytes.fromhex(session), seq): until for session, seq in order["tasks"]})
            self._watch(child, time.monotonic())
        else:
            self._order(child, order)

    def _order(self, child: Child, order: dict[str, Any]) -> None:
        try:
            child.leash.send(json.dumps(order).encode() + b"\n")
        except OSError as e:  # its buffer is full or it is ending; the controller learns either way
            self.log.warning("engine process %d did not take an order: %s", child.pid, e)

    def _end_child(self, child: Child) -> None:
        child.told = True
        child.kill_at = time.monotonic() + GRACE_S
        os.kill(child.pid, signal.SIGTERM)

    def _rejoin(self, why: str) -> None:
        """The connection is gone: come back if the controller does, else end."""
        self.log.warning("%s", why)
        self._link.close()
        info, self._link = self._link.info, None
        self._join_soon(info, why)

    def _join_soon(self, info: dict[str, Any], why: str) -> None:
        """Register with a controller that is away and may come back; `info` is its connection file as it was."""
        deadline = time.monotonic() + REJOIN_S
        while self._end is None:
            if not info["reuse"] and net.controller_gone(info):
                return self.stop(f"the controller is gone: {why}")
            try:
                self._join()
            except (ConnectError, ConnectionFileError) as e:
                if time.monotonic() > deadline or not getattr(e, "passing", True):
                    return self.stop(f"the controller is gone: {e}")
                if select.select([self._wake_r], [], [], 0.2 if self._tunnel is None else 1.0)[0]:
                    os.read(self._wake_r, 4096)
                self._reap()
            else:
                # To the same run we were dead, and so were our engines; from another they part by themselves.
                for child in self.children.values() if self._link.info["run_id"] == info["run_id"] else ():
                    self._order(child, {"op": "rejoin"})
                return None

    def _leave(self) -> None:
        """End the engines, say goodbye."""
        for child in self.children.values():
            self._end_child(child)
        deadline = time.monotonic() + GRACE_S
        while self.children:
            if time.monotonic() > deadline:
                for child in self.children.values():
                    _signal_group(child.pid, signal.SIGKILL)
                deadline = float("inf")
            select.select([self._wake_r], [], [], 0.1)
            try:
                os.read(self._wake_r, 4096)
            except BlockingIOError:
                pass
            self._reap()
        if self._link is not None:
            net.send(self._link.sock, wire.encode_json(wire.BYE, {"reason": self._end}))
            self._link.close(500)
        if self._context is not None:
            self._context.term()
        if self._tunnel is not None:
            self._tunnel.close()
        self.log.info("agent stopped: %s", self._end)


def _close_all_but(kept: int) -> None:
    """Close what a forked process inherited, but for one descriptor and the standard three."""
    for name in os.listdir("/dev/fd"):
        if int(name) > 2 and int(name) != kept:
            with contextlib.suppress(OSError):  # the one that listed them
                os.close(int(name))


def _signal_group(pid: int, signum: int) -> None:
    try:
        os.killpg(pid, signum)
    except ProcessLookupError:
        pass  # nobody left in it


def _startup_code(settings: Any) -> list[tuple[str, str]]:
    code = []
    if settings["IPEngine.startup_script"]:
        path = settings["IPEngine.startup_script"]
        try:
            code.append((Path(path).read_text(encoding="utf-8"), path))
        except OSError as e:
            raise ConfigError(f"can not read the startup script {path}: {e.strerror}") from None
    if settings["IPEngine.startup_command"]:
        code.append((settings["IPEngine.startup_command"], "<startup_command>"))
    return code


class InfoFile:
    """The engine's connection file: waited for once, read again at every reconnection.

    Args:
        path: where it is or will be; `text` is its content instead, when a launcher passed it by environment.
        ssh, location: what the user says instead of the file, or "".
    """

    def __init__(self, path: Path, text: Optional[str], log: Any, ssh: str = "", location: str = ""):
        self.path, self.text, self.log = path, text, log
        self._changes = {**({"ssh": ssh, "ipc": ""} if ssh else {}), **({"location": location} if location else {})}

    def __call__(self) -> dict[str, Any]:
        return {**self._read(), **self._changes}

    def _read(self) -> dict[str, Any]:
        if self.text is not None:
            return config.check_connection(json.loads(self.text), "the connection information in the environment", "engine", wire.VERSION)
        return config.read_connection(self.path, "engine", wire.VERSION)

    def wait(self, timeout_s: float, parent: int) -> None:
        """Wait until it is there and of a live run, or until `parent` (0: nobody) is gone.

        Raises:
            ConnectionFileError: it was not in time; says what was wrong with it last.
        """
        deadline = time.monotonic() + timeout_s
        told = ""
        while True:
            try:
                info = self()
                dead = "" if "ssh" in self._changes else config.dead_run(info)
                if not dead:
                    return
                trouble = f"{self.path} is of a run that has ended ({dead})"
            except ConnectionFileError as e:
                trouble = str(e)
            if parent and os.getppid() != parent:
                raise ConnectionFileError(f"the owner (pid {parent}) is gone")
            if time.monotonic() > deadline:
                raise ConnectionFileError(f"waited {timeout_s:g} s for a controller: {trouble}")
            if trouble != told:
                self.log.info("waiting: %s", trouble)
                told = trouble
            time.sleep(0.01)


def serve(argv: list[str]) -> int:
    """Run an agent and its engines until they end. Returns the exit code."""
    settings = config.parse("engine", argv)
    log = config.setup_logging("ipengine", settings["Application.log_level"], settings.log_file)
    config.raise_file_limit()
    if settings["Application.work_dir"]:
        config.enter_work_dir(settings["Application.work_dir"])
    path = settings["IPEngine.url_file"] or config.connection_file(
        settings.profile_dir, settings["Application.cluster_id"], "engine")
    config.make_profile_dir(settings.profile_dir)
    info = InfoFile(Path(path), os.environ.get("IPP_CONNECTION_INFO"), log, settings["IPEngine.sshserver"],
                    settings["IPEngine.location"])
    pack.pack_function(lambda: None)  # imports what engines need, once for all of them
    info.wait(settings["IPEngine.timeout"], settings["IPEngine.parent"])
    return Agent(settings, info, log).run()


def main(argv: Optional[list[str]] = None) -> int:
    """`ipengine`: the command line."""
    return config.run_main("ipengine", serve, argv)


if __name__ == "__main__":
    sys.exit(main())
