"""The agent: forks the engines of a host and watches them.

    controller ═══ PING, CONTROL ══► Agent ── fork, waitpid, kill ──► engines
               ◄══ PONG, EXITED ════   └───── socketpair: recall, rejoin ──► their couriers

It imports what engines need, forks them and only then opens its own connection. It answers heartbeats for them, tells
how they end, delivers signals, interrupts tasks that are not to run any longer, and starts engines anew. As a rank of MPI it
has one engine, which speaks to MPI in its stead, and both end together, in the same way.

Rules that hold here: one thread; an engine is its process group, so that what user code started ends with it; what an engine
is running is read from the memory shared with it (`engine.CELL`), never asked for.
"""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import gc
import json
import math
import mmap
import os
import re
import resource
import select
import signal
import socket
import sys
import time
import traceback
from pathlib import Path
from typing import Any, Callable, Optional

from . import config, net, pack, wire
from .allocation import available_cpus, gpus_of, job_end, job_name, thread_limits, visible_gpus
from .engine import CELL, CELL_ID, CELL_ITEM, CELL_ITEM_AT, CELL_SIZE, REJOIN_S, WORN, Engine, tunnel_name
from .errors import ConfigError, ConnectError, ConnectionFileError, ProtocolError, UserError
from .mpi import cpus_of_host, from_environment, leave, local_from_environment, setup_of

GRACE_S = 5.0  # between asking an engine to end and killing it ...
RANK_GRACE_S = 0.5  # ... if whoever started this rank wants it to end: mpiexec kills us after a second
INTERRUPT_GRACE_S = 2.0  # between interrupting a task and killing its engine
WATCH_S = 0.25  # between two looks at the engines
KILL_S = 1.0  # engines that still run then are killed so long before their job is
STABLE_S = 60.0  # an engine that has lived so long did not crash because of how it was started
RESTART_S, RESTART_MAX_S = 1.0, 30.0  # before the second new engine in a row, twice as long before each further one, at most
LEAVE_S = 5.0  # the engines leave so long before their job ends
PREEMPTION = ("SIGUSR1", "SIGUSR2", "SIGXCPU")  # by these batch systems tell that they will end the job soon
TAIL_BYTES = 2000  # of an engine's log that explain its end
PR_SET_PDEATHSIG = 1


class Child:
    """What the agent knows of one of its engines."""

    __slots__ = ("uuid", "pid", "leash", "cell", "log_path", "told", "kill_at", "doomed", "victim", "replace", "verdict",
                 "rank", "why", "born", "crashes")

    def __init__(self, uuid: str, pid: int, leash: socket.socket, cell: memoryview, log_path: Path, rank: int):
        self.uuid, self.pid, self.leash, self.cell, self.log_path = uuid, pid, leash, cell, log_path
        self.rank = rank  # among the engines of this host
        self.born = time.monotonic()
        self.crashes = 0  # of those whose place it has taken, one after the other
        self.told = False  # to end
        self.why = ""  # that we have killed it, as crashed as it then is
        self.kill_at: Optional[float] = None
        self.doomed: dict[tuple[bytes, int], float] = {}  # tasks to interrupt if it runs them, and until when that holds
        self.victim: Optional[tuple[bytes, int]] = None  # the task that has been interrupted
        self.replace = False  # by a new engine when it has ended
        self.verdict: Optional[tuple[str, str]] = None  # on the task that it dies with: error class and message

    def running(self) -> tuple[Optional[tuple[bytes, int]], float]:
        """The task it is running, and the monotonic time by which that must end (0: any)."""
        session, number, limit = CELL.unpack_from(self.cell, 0)
        return (session, number - 1) if number else None, limit

    def engine_id(self) -> int:
        """Its id; negative before it has registered."""
        return int(CELL_ID.unpack_from(self.cell, CELL.size)[0])

    def cause(self, status: int) -> tuple[str, bool]:
        """Why it ended, and whether that was a crash."""
        if self.why:
            return self.why, True
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
        self.status = 0  # how an engine ended that was not to end, as `os.waitpid` has it
        self._mpi = setup_of(settings)
        rank = from_environment(os.environ) if settings["IPEngine.n"] == 1 else None
        told = rank if self._mpi else None
        self._rank = told[0] if told else None  # None: we are no rank of MPI
        self._owner = settings["IPEngine.parent"] or (os.getppid() if told else 0)
        self._inherited = [int(name) for name in os.listdir("/dev/fd")] if rank else []  # some lead to MPI's process manager
        self._startup = _startup_code(settings)
        end = job_end(settings["IPEngine.lifetime"])
        left_s = math.inf if end is None else end - time.time()
        self.end_at = None if end is None else time.monotonic() + left_s  # when our job is killed
        self._drain_s: float = min(settings["IPEngine.drain"], max(0.0, left_s - LEAVE_S) / 2)
        self._gpus = visible_gpus() if settings["IPEngine.gpus"] else []
        self._context: Any = None
        self._link: Any = None
        self._tunnel: Any = None
        self._sources: Any = None
        self._child_name = "engine process" if told is None else f"rank {told[0]}, engine process"
        self._end: Optional[str] = None
        self._signalled = False  # was it a signal that told us to end?
        self._heard = 0.0
        self._silence_s = 0.0
        self._awaited: list[tuple[float, Child]] = []  # when a new engine is to take the place of one that crashed
        self._wake_r, self._wake_w = os.pipe()
        os.set_blocking(self._wake_r, False)
        os.set_blocking(self._wake_w, False)

    # --- engines

    def fork_engines(self, n: int) -> None:
        """Start n engines."""
        cells = memoryview(mmap.mmap(-1, n * CELL_SIZE))
        first = self.settings["IPEngine.id"]
        for i in range(n):
            self._fork(cells[i * CELL_SIZE : (i + 1) * CELL_SIZE], i, None if first is None else first + i)

    def _fork(self, cell: memoryview, rank: int, wanted_id: Optional[int]) -> None:
        CELL.pack_into(cell, 0, b"", 0, 0.0)
        CELL_ID.pack_into(cell, CELL.size, -1)
        CELL_ITEM.pack_into(cell, CELL_ITEM_AT, 0)
        name = os.urandom(16).hex()
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        folder = self.settings.profile_dir
        pid = os.fork()
        if pid:
            theirs.close()
            path = config.log_file(folder, "ipengine", self.settings["Application.cluster_id"], pid)
            self.children[pid] = Child(name, pid, ours, cell, path, rank)
            return
        code = 1
        try:
            ours.close()
            for child in self.children.values():
                child.leash.close()
            os.environ.update(self._share(rank))
            code = self._be_engine(name, theirs, cell, wanted_id)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.__stderr__.flush()
            os._exit(code)

    def _share(self, rank: int) -> dict[str, str]:
        """What the environment of an engine says of its part of this host."""
        n, threads, each = (self.settings[f"IPEngine.{key}"] for key in ("n", "threads", "gpus"))
        cpus = available_cpus({}).n // n
        if self._rank is not None:
            rank, n = local_from_environment(os.environ)
            cpus = min(cpus, cpus_of_host(self._owner) // n)  # mpiexec may have bound us to ours already
        limits = thread_limits(max(1, cpus) if threads is None else threads) if threads != 0 else {}
        return {**limits, **({"CUDA_VISIBLE_DEVICES": gpus_of(rank, each, self._gpus)} if each else {})}

    def _be_engine(self, name: str, leash: socket.socket, cell: memoryview, wanted_id: Optional[int]) -> int:
        os.setpgid(0, 0)  # so that what user code starts can be ended with it
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for signame in PREEMPTION:  # the whole job gets them; the agent acts
            signal.signal(getattr(signal, signame), lambda *_: None)
        os.close(self._wake_r)
        os.close(self._wake_w)
        if self._rank is None:  # what a rank writes, mpiexec collects
            path = config.log_file(self.settings.profile_dir, "ipengine", self.settings["Application.cluster_id"], os.getpid())
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
            os.dup2(fd, 1)
            os.dup2(fd, 2)
            os.close(fd)
        faulthandler.enable(2)
        log = config.setup_logging("ipengine", self.settings["Application.log_level"])
        _close_all_but(leash.fileno(), *self._inherited)  # the agent's connection must not live on in its engines
        if self.settings["Application.log_url"]:
            from .logger import forward

            forward(self.settings, "ipengine")
        if self._rank is not None:
            _die_with_parent()
        engine = Engine(self.read_info, name, self.uuid, leash, cell, self._startup, log)
        engine.id = wanted_id
        if self.end_at is not None:
            engine.until, engine.drain_s = self.end_at - LEAVE_S, self._drain_s
        worn = self.settings["IPEngine.max_tasks"], self.settings["IPEngine.max_rss"] << 20
        engine.wear = worn if any(worn) and self._rank is None else None
        engine.mpi, engine.engine_set = self._mpi, self.settings["IPEngine.engine_set"]
        log.info("engine ended: %s", engine.run())
        atexit._run_exitfuncs()
        leave()
        return WORN if engine.worn else 0 if engine.id is not None else 1

    def _reap(self) -> None:
        for pid in list(self.children):
            done, status = os.waitpid(pid, os.WNOHANG)
            if not done:
                continue
            child = self.children.pop(pid)
            cause, crashed = child.cause(status)
            if os.WIFEXITED(status) and os.WEXITSTATUS(status) == WORN and not child.told:
                cause, crashed, child.replace = "a new process takes its place", False, True
            elif crashed:
                self._may_come_again(child)
            if self._signalled and not crashed:
                cause = self._end or cause  # who ends a batch job signals its engines as well as us
            if crashed:
                self.failed, self.status = True, status
                tail = child.tail()
                self.log.error("%s %d ended: %s%s", self._child_name, pid, cause, tail and f"; the end of {child.log_path}:\n{tail}")
            else:
                self.log.info("%s %d ended: %s", self._child_name, pid, cause)
            if self._link is not None:
                running, _ = child.running()
                net.send(self._link.sock, wire.encode_json(wire.EXITED, {
                    "uuid": child.uuid, "cause": cause, "crashed": crashed,
                    "verdict": child.verdict if running == child.victim else None,  # it is about that task, not about a later one
                    "running": running and [running[0].hex(), running[1]],
                    "replaced": self._end is None and (child.replace or any(c is child for _, c in self._awaited)),
                    "item": CELL_ITEM.unpack_from(child.cell, CELL_ITEM_AT)[0] if running else 0}))
            child.leash.close()
            _signal_group(pid, signal.SIGKILL)  # what its user code left behind
            if child.replace and self._end is None and self._rank is None:  # a new one would not belong to the MPI world
                self._fork(child.cell, child.rank, child.engine_id())
        self._fork_awaited()
        if not self.children and not self._awaited:
            self.stop("all its engines have ended")

    def _may_come_again(self, child: Child) -> None:
        """An engine has crashed: a new one is to take its place, unless too many did so already."""
        if time.monotonic() - child.born > STABLE_S:
            child.crashes = 0
        if child.crashes >= self.settings["IPEngine.restarts"] or self._rank is not None or child.engine_id() < 0:
            return
        wait_s = min(RESTART_MAX_S, RESTART_S * 2 ** (child.crashes - 1)) if child.crashes else 0.0
        child.crashes += 1
        self._awaited.append((time.monotonic() + wait_s, child))

    def _fork_awaited(self) -> None:
        """Start the new engines whose time has come."""
        now = time.monotonic()
        due = [child for at, child in self._awaited if at <= now and self._end is None]
        self._awaited = [entry for entry in self._awaited if entry[1] not in due]
        for child in due:
            before = set(self.children)
            self._fork(child.cell, child.rank, child.engine_id())
            (pid,) = set(self.children) - before
            self.children[pid].crashes = child.crashes
            self.log.warning("engine process %d takes the place of %d, which crashed (%d of at most %d times)", pid, child.pid,
                             child.crashes, self.settings["IPEngine.restarts"])

    # --- life

    def run(self) -> int:
        """Serve until stopped; returns the exit code."""
        gc.freeze()  # the engines share these pages with us as long as nobody writes to them
        signal.set_wakeup_fd(self._wake_w, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            if signal.getsignal(signum) != signal.SIG_IGN:  # as nohup asks for, and job scripts: engines alone are interrupted
                signal.signal(signum, self._on_signal)
        for name in PREEMPTION:
            signal.signal(getattr(signal, name), lambda n, _: self._end_soon(time.monotonic() + self._drain_s))
        try:
            self._make_tunnel(self.read_info())
            self.fork_engines(self.settings["IPEngine.n"])
            self._context = net.Context()
            if self.settings["Application.log_url"]:
                from .logger import open_all

                open_all()
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

    def _on_signal(self, signum: int, frame: Any) -> None:
        self._signalled = True
        job = job_name()
        self.stop(f"it got {_signal_name(signum)}" + (f" in {job}" if job else ""))

    def stop(self, reason: str) -> None:
        """Leave the loop soon."""
        self._end = self._end or reason
        if self._link is None and self._tunnel is not None:
            self._tunnel.abandon()

    def _end_soon(self, end_at: float) -> None:
        """Our job is about to be ended: have the engines leave as soon as they have done what they run."""
        self.log.warning("the job ends in %.0f s: the engines leave", max(0.0, end_at - time.monotonic()))
        self.end_at = None
        for child in self.children.values():
            child.told, child.kill_at = True, end_at - KILL_S
            self._order(child, {"op": "leave", "reason": "its job is about to end"})

    def _make_tunnel(self, info: dict[str, Any]) -> None:
        """See to it that there is a tunnel, if one is needed, before engines look for it."""
        if not net.needs_tunnel(info):
            return
        from .tunnel import Tunnel

        self._tunnel = Tunnel(tunnel_name(self.uuid), self.settings["IPEngine.sshkey"])
        net.tunnel_to(info, self._tunnel)

    def _first_join(self) -> None:
        info = self.read_info()
        try:
            self._join()
        except ConnectError as e:
            there = any(child.engine_id() >= 0 for child in self.children.values())  # it let our engines in
            if not info["reuse"] and not there:
                raise
            self.log.warning("%s", e)
            self._join_soon(info, str(e))

    def _join(self) -> None:
        self._link, welcome = net.greet(self._context, self.read_info(), {
            "role": "agent", "protocol": wire.VERSION, "uuid": self.uuid, "host": socket.gethostname(), "pid": os.getpid(),
            "engines": {child.uuid: running and [running[0].hex(), running[1]] for child in self.children.values()
                        for running in [child.running()[0]]}},
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
        if self._owner and os.getppid() != self._owner:
            self.stop(f"its owner (pid {self._owner}) is gone")
        elif lost is not None and self._end is None:
            self._rejoin(lost)
        if self.end_at is not None and now > self.end_at - LEAVE_S:
            self._end_soon(self.end_at)
        for child in self.children.values():
            self._watch(child, now)

    def _watch(self, child: Child, now: float) -> None:
        """Interrupt a task that is to end or has run too long; kill an engine that did not end what it was to end."""
        running, limit = child.running()
        if child.victim is not None and running != child.victim:
            child.victim = child.kill_at = None
        if child.kill_at is not None and now > child.kill_at:
            child.kill_at = None
            if child.victim is not None and self._rank is None:
                child.told = child.replace = True
            elif child.victim is not None:  # the MPI world ends with it
                child.why = "killed, as the task that it ran did not react to an interrupt"
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
            try:
                lost = self._on_message(net.recv(self._link.sock))
            except (ProtocolError, KeyError, TypeError, ValueError, OverflowError, RecursionError, OSError) as e:
                self.log.error("dropped a malformed message: %s: %s", type(e).__name__, e)
                continue
            if lost is not None:
                return lost
        return None

    def _on_message(self, frames: list[Any]) -> Optional[str]:
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
            self._end_child(child, order.get("grace_s", GRACE_S))
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

    def _end_child(self, child: Child, grace_s: float = GRACE_S) -> None:
        child.told = True
        child.kill_at = time.monotonic() + grace_s
        os.kill(child.pid, signal.SIGTERM)

    def _rejoin(self, why: str) -> None:
        """The connection is gone: come back if the controller does, else end."""
        self.log.warning("%s", why)
        self._link.close()
        info, self._link = self._link.info, None
        self._join_soon(info, why)

    def _join_soon(self, info: dict[str, Any], why: str) -> None:
        """Register with a controller that is away and may come back; `info` is its connection file as it was."""
        began = time.monotonic()
        deadline = began + REJOIN_S
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
                for child in self.children.values():  # they may be busy, or taken for dead as we were
                    self._order(child, {"op": "rejoin", "since": began})
                return None

    def _leave(self) -> None:
        """End the engines, say goodbye."""
        for child in self.children.values():
            self._end_child(child)
        deadline = time.monotonic() + (RANK_GRACE_S if self._rank is not None and self._signalled else GRACE_S)
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
        if self._rank is not None and self.status:
            _end_like(self.status)


def _close_all_but(*kept: int) -> None:
    """Close what a forked process inherited, but for some descriptors and the standard three."""
    for name in os.listdir("/dev/fd"):
        if int(name) > 2 and int(name) not in kept:
            with contextlib.suppress(OSError):  # the one that listed them
                os.close(int(name))


def _die_with_parent() -> None:
    """Have the kernel kill this engine when its agent is gone: mpiexec kills agents without a warning, and the engine may be
    in MPI, from where it would not notice."""
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _end_like(status: int) -> None:
    """End this process as one of its children did, so that mpiexec tells the true cause."""
    if os.WIFSIGNALED(status):
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # that core would be ours, and of no interest
        if os.WTERMSIG(status) != signal.SIGKILL:
            signal.signal(os.WTERMSIG(status), signal.SIG_DFL)
        os.kill(os.getpid(), os.WTERMSIG(status))
    os._exit(os.WEXITSTATUS(status))


def _signal_group(pid: int, signum: int) -> None:
    try:
        os.killpg(pid, signum)
    except ProcessLookupError:
        pass  # nobody left in it


def _startup_code(settings: Any) -> list[tuple[str, str]]:
    files = [settings["IPEngine.startup_script"], *map(config.as_path, settings["IPKernelApp.exec_files"])]
    code = []
    for path in filter(None, files):
        try:
            code.append((Path(path).read_text(encoding="utf-8"), path))
        except (OSError, UnicodeDecodeError) as e:
            raise ConfigError(f"can not read the startup script {path}: {getattr(e, 'strerror', None) or e}") from None
    lines = [settings["IPEngine.startup_command"], *settings["IPKernelApp.exec_lines"]]
    return code + [(str(line), "<startup_command>") for line in lines if line]


class InfoFile:
    """The engine's connection file: waited for once, read again at every reconnection.

    Args:
        path: where it is or will be; `text` is its content instead, when a launcher passed it by environment.
        ssh, location, url: what the user says instead of the file, or "".
    """

    def __init__(self, path: Path, text: Optional[str], log: Any, ssh: str = "", location: str = "", url: str = ""):
        self.path, self.text, self.log = path, text, log
        if url and not re.fullmatch(r"tcp://[^/\s]+:\d{1,5}", url):
            raise ConfigError(f"--url needs the address of a controller, as in tcp://10.0.1.5:10101, not {url!r}.")
        self._ssh = ssh
        self._changes = {**({"url": url, "ipc": "", "location": ""} if url else {}), **({"location": location} if location else {})}

    def __call__(self) -> dict[str, Any]:
        info = {**self._read(), **self._changes}
        return net.through_ssh(info, self._ssh) if self._ssh else info

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
                dead = "" if self._ssh or "url" in self._changes else net.ended_run(info)
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
    if settings["Application.log_url"]:
        from .logger import forward

        forward(settings, "ipengine", False)
    config.raise_file_limit()
    if settings["Application.work_dir"]:
        config.enter_work_dir(settings["Application.work_dir"])
    path = settings["IPEngine.url_file"] or config.connection_file(
        settings.profile_dir, settings["Application.cluster_id"], "engine")
    config.make_profile_dir(settings.profile_dir)
    config.log_start(log, settings)
    _startup_code(settings)  # what can't be read is told at once
    info = InfoFile(Path(path), os.environ.get("IPP_CONNECTION_INFO"), log, settings["IPEngine.sshserver"],
                    settings["IPEngine.location"], settings["IPEngine.registration_url"])
    pack.pack_function(lambda: None)  # imports what engines need, once for all of them
    info.wait(settings["IPEngine.timeout"], settings["IPEngine.parent"])
    return Agent(settings, info, log).run()
