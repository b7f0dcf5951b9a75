"""The client's end of the wire: tasks go out in batches, results come in and resolve their futures.

    submit, post ──► outbox ──┐                         ┌──► _arrive of AsyncResults
                              ├── _turn: send, receive ─┤
    socket, monitor ──────────┘                         └──► on_message: everything else

Whoever holds `_lead` takes the turns: the io thread as a rule, but a thread that waits for a result takes over, because
that saves two thread switches on every round trip. The io thread naps meanwhile, and resumes when nobody has led for a while.

When the connection breaks, a thread of its own dials again, and tells the controller what we wait for; until then the outbox
grows, and who waits goes on waiting.

Rules that hold here: the socket is used under `_sock_lock` only; task numbers, `_pending` and the outbox change under `_mutex`;
who holds both took `_sock_lock` first; futures are resolved and callbacks run with neither. A Ctrl-C is held back while
a message is on its way through Python, so that none is torn apart.
"""

from __future__ import annotations

import logging
import os
import select
import socket
import threading
import time
import weakref
from collections import deque
from queue import Empty, SimpleQueue
from typing import Any, Callable, Iterable, Optional, Sequence

from _signal import SIGINT, getsignal, signal  # what the signal module wraps in enums, which cost microseconds

from . import net, wire
from .errors import ControllerLost, PackError, ProtocolError, RecordExpired, UserError
from .futures import Source, TaskFuture
from .results import AsyncResult
from .unsaved import Unsaved

CONFIRM_EACH = 256  # RESULTS messages that are confirmed together, if no heartbeat comes before
FUNCTIONS_KEPT = 256  # functions whose bytes the controller and the engines hold for us
TICK_S = 1.0  # between two looks at the controller's silence
FAR_SILENCE_S = 30.0  # that a controller on another host may keep at least
NAP_S, LONG_NAP_S = 0.02, 0.1  # of the io thread while another thread leads
COMEBACK_S = 120.0  # how long a controller that may come back is dialled
REDIAL_S = 1.0  # at most between two attempts
TAKE = 256  # messages taken in before the outbox gets its turn


FORKED = "this Client was made before the process forked, so that it can not be used in the child: make a new one"

_connections: "weakref.WeakSet[Connection]" = weakref.WeakSet()


def _after_fork() -> None:
    TaskFuture._making = threading.Lock()
    for connection in list(_connections):
        connection._forked()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


class HeldBack:
    """Context manager for the main thread: SIGINT takes effect at the end of the block, or within it while `open`."""

    __slots__ = ("_before", "came", "open")

    def __enter__(self) -> "HeldBack":
        self._before: Any = None
        self.came: Optional[tuple[Any, Any]] = None
        self.open = False
        if threading.current_thread() is threading.main_thread():
            before = getsignal(SIGINT)
            if callable(before):
                signal(SIGINT, self._note)
                self._before = before
        return self

    def _note(self, signum: int, frame: Any) -> None:
        if self.open:
            self._before(signum, frame)
        else:
            self.came = (signum, frame)

    def __exit__(self, *exc: Any) -> None:
        if self._before is not None:
            signal(SIGINT, self._before)
            if self.came is not None:
                self._before(*self.came)


class Connection:
    """A connection that has been welcomed by the controller.

    Args:
        context: the zmq context, which this object ends when it closes.
        link, welcome: what `net.greet` returned.
        session: the client's 8 bytes.
        on_message: called with every message that is not about a task's result or output.
        on_lost: called once, when the connection is lost for good or closed.
        dial: called with our part of HELLO when the connection broke; returns what `net.greet` does, raises ControllerLost if there is
            no hope, and other UserErrors if there is.
        on_back: called with WELCOME when there is a connection again, before anything is sent.
        ask_missed: asks the controller for the results of tasks, by ranges of numbers; returns those it can't give as
            {"expired": ranges, "unknown": ranges}, or None if the connection broke again.
    """

    def __init__(self, context: Any, link: net.Link, welcome: dict[str, Any], session: bytes,
                 on_message: Callable[[list[Any]], None], on_lost: Callable[[], None],
                 dial: Callable[[dict[str, Any]], Any], on_back: Callable[[dict[str, Any]], Any],
                 ask_missed: Callable[[list[list[int]]], Any]):
        self.session = session
        self.lost: Optional[Exception] = None  # why nothing can be sent any more
        self.sent_up_to = 1  # the number after that of the last task that has left
        self._context, self._link = context, link
        self._on_message, self._on_lost = on_message, on_lost
        self._dial, self._on_back, self._ask_missed = dial, on_back, ask_missed
        self.away: Optional[str] = None  # why there is no connection, while one is looked for
        self.link_info, self.run_id, self.durable = link.info, welcome["run_id"], bool(welcome.get("durable"))
        self.ended = False  # the controller said goodbye
        self.up = True  # there is a connection
        self._resuming = self._parted = False
        self._redialler: Optional[threading.Thread] = None
        self._unsaved = Unsaved()
        self._taken = self._confirmed = 0  # RESULTS messages of this run of the controller; those we have confirmed
        self._max_task_bytes: int = welcome["max_task_bytes"]
        # On a slow link a large message holds up the controller's signs of life.
        self._silence_s: float = max(welcome["silence_s"], 0.0 if link.local else FAR_SILENCE_S)
        self._heard = time.monotonic()
        self._mutex, self._sock_lock = threading.Lock(), threading.Lock()
        self._outbox: list[tuple[Optional[bytes], Any]] = []
        self._inbox: deque[list[Any]] = deque()
        self._next = 1
        self._pending: dict[int, tuple[AsyncResult, int]] = {}
        self._asked: dict[wire.TaskKey, list[tuple[AsyncResult, int]]] = {}
        self._functions: dict[bytes, int] = {}  # digest -> number of the last task that uses it
        self._awake = False
        self._closed = False
        self._pid = os.getpid()
        self._lead = threading.Lock()
        self._leader = 0  # thread that holds it
        self._led = 0  # how often it was taken by other than the io thread
        self._nap: SimpleQueue[None] = SimpleQueue()  # an interrupted Event may stay locked for ever
        self._napping = False
        self._wake_r, self._wake_w = socket.socketpair()
        self._wake_r.setblocking(False)
        self._wake_w.setblocking(False)
        self._sources = self._sources_of(link)
        self._poll = self._make_poll()  # used by whoever leads
        self._thread = threading.Thread(target=self._serve, name="ipclite-client", daemon=True)
        self._thread.start()
        _connections.add(self)

    def _sources_of(self, link: Optional[net.Link]) -> list[int]:
        """Descriptors of the socket, of its monitor, and of what wakes us."""
        wake = self._wake_r.fileno()
        return [wake, wake, wake] if link is None else [link.sock.get(net.zmq.FD), link.monitor.get(net.zmq.FD), wake]

    def _forked(self) -> None:
        """This is the child of a fork: the connection is the parent's, and threads that are not here may hold its locks."""
        self.lost = ControllerLost(FORKED)
        self._mutex, self._sock_lock, self._lead = threading.Lock(), threading.Lock(), threading.Lock()
        self._poll, self._outbox, self._awake = None, [], True

    @property
    def address(self) -> str:
        """The controller's address."""
        return self._link.address

    # --- what is to be sent

    @property
    def unfinished(self) -> dict[int, tuple[AsyncResult, int]]:
        """The tasks that have not ended: {number: (their future, their place in it)}. A snapshot."""
        return dict(self._pending)

    @property
    def next_number(self) -> int:
        """The number that the next task gets."""
        return self._next

    def submit(self, ar: AsyncResult, tasks: Sequence[tuple[bytes, Any, int]], wake: bool = True) -> AsyncResult:
        """Queue the tasks of one call.

        Args:
            ar: their future.
            tasks: (spec, payload, number of engines that it goes to) of each.
            wake: False if the caller is about to wait, which sends them anyway.

        Raises:
            PackError: the data are larger than the controller takes.
            ControllerLost: there is no connection any more.
        """
        for _, payload, _ in tasks:
            if type(payload) is not bytes:
                self._check_size(payload)
                ar._lent = [*ar._lent, *(weakref.ref(piece) for piece in payload if type(piece) is memoryview)]
        with self._mutex:
            if self.lost is not None:
                raise self.lost.with_traceback(None)  # else it would grow each time
            first = self._next
            if len(tasks) == 1 and tasks[0][2] == 1:
                spec, payload, _ = tasks[0]
                self._next = first + 1
                ar._sent_as(first, 1)
                self._outbox.append((spec, (first, 1, payload)))
                self._pending[first] = (ar, 0)
            else:
                entries, at = [], first
                for spec, payload, count in tasks:
                    entries.append((spec, (at, count, payload)))
                    at += count
                ar._sent_as(first, at - first)
                self._next = at  # in this order, an interrupt leaves at worst tasks whose results nobody awaits
                self._outbox += entries
                self._pending.update([(first + i, (ar, i)) for i in range(at - first)])
        if wake and not self._awake:
            self._wake()
        return ar

    def function(self, digest: bytes, payload: Any) -> str:
        """Make sure that the controller has a function; returns its name there."""
        if digest not in self._functions:
            self._check_size(payload)
            frames = [wire.FUNCTION, digest, *([payload] if isinstance(payload, bytes) else payload)]
            with self._mutex:
                self._outbox.append((None, frames))
                self._unsaved.functions[digest] = frames
                if len(self._functions) >= FUNCTIONS_KEPT:
                    self._forget_functions()
        self._functions[digest] = self._next
        return digest.hex()

    def _forget_functions(self) -> None:
        """Have the functions dropped that no unfinished task needs, oldest first. The caller holds `_mutex`."""
        oldest = next(iter(self._pending), self._next)
        free = [d for d, last in sorted(self._functions.items(), key=lambda item: item[1]) if last < oldest]
        dropped = free[: FUNCTIONS_KEPT // 2]
        for digest in dropped:
            del self._functions[digest]
            self._unsaved.functions.pop(digest, None)
        if dropped:
            self._outbox.append((None, [wire.FORGET, *dropped]))

    def _check_size(self, payload: Any) -> None:
        size = len(payload) if isinstance(payload, bytes) else sum(memoryview(piece).nbytes for piece in payload)
        if size > self._max_task_bytes:
            raise PackError(f"the task's data are {size / 2**30:.1f} GiB, and the controller takes "
                            f"{self._max_task_bytes / 2**30:.1f} GiB at most (half of its memory); send smaller pieces, or a path "
                            "to a file")

    def post(self, frames: list[Any]) -> None:
        """Send a message after everything submitted so far.

        Raises:
            ControllerLost: there is no connection any more.
        """
        with self._mutex:
            if self.lost is not None:
                raise self.lost.with_traceback(None)
            self._outbox.append((None, frames))
        self.flush()

    def flush(self) -> None:
        """Send what is in the outbox, in the calling thread."""
        if self._outbox and self.lost is None and self.up:
            with HeldBack(), self._sock_lock:
                self._send_outbox()
                more = self.lost is None and self.up and net.readable(self._link.sock)
            if more:  # our send took the notice of a message that the leader waits for
                self._wake()

    def _wake(self) -> None:
        self._awake = True
        if self._napping:
            self._nap.put(None)
        try:
            self._wake_w.send(b"!")
        except OSError:
            pass  # it is awake already, or closed

    def _send_outbox(self) -> None:
        """The caller holds `_sock_lock`."""
        if not self.up or self._resuming:
            self._awake = False
            return
        with self._mutex:
            outbox, self._outbox = self._outbox, []
            self._awake = False
            self.sent_up_to = self._next
        if self.lost is not None:
            return
        sock = self._link.sock
        batch: list[Any] = []
        size = 0
        for spec, body in outbox:
            if spec is None:
                self._send_batch(batch)
                net.send(sock, body)
                batch, size = [], 0
                continue
            batch.append((spec, body))
            size += len(body[2]) if type(body[2]) is bytes else wire.INLINE_MAX
            if len(batch) >= wire.BATCH_TASKS or size >= wire.BATCH_BYTES:
                self._send_batch(batch)
                batch, size = [], 0
        self._send_batch(batch)

    def _send_batch(self, batch: list[Any]) -> None:
        message: list[Any] = [wire.TASKS]
        start = sections = 0
        for i in range(1, len(batch) + 1):
            if i == len(batch) or batch[i][0] is not batch[start][0]:
                message += wire.encode_tasks(batch[start][0], self.session, [body for _, body in batch[start:i]])
                start = i
                sections += 1
        if batch:
            net.send(self._link.sock, message)
            if self.durable or len(message) == 1 + sections:  # without records that last, large arguments are not held on to
                seq, count, _ = batch[-1][1]
                self._unsaved.add(seq + max(1, count), message)

    # --- taking turns

    def wait(self, done: Callable[[], Any], waiter: Any, timeout: Optional[float] = None) -> bool:
        """Wait until `done()`, receiving for everybody unless another thread does so already.

        Args:
            done: looks at what arriving messages change.
            waiter: its `_condition` is notified when it may have become true.
            timeout: s to wait at most; None: for ever.

        Returns:
            Whether it is true.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        with HeldBack() as held:  # a leader that was interrupted before it resigns would lead for ever
            leads_already = self._leader == threading.get_ident()  # a callback that waits
            if self._poll is not None and (leads_already or self._lead.acquire(blocking=False)):
                return self._lead_until(done, deadline, leads_already, held)
        if self._pid != os.getpid():
            raise ControllerLost(FORKED)
        self.flush()
        with waiter._condition:
            return bool(waiter._condition.wait_for(done, timeout))

    def _lead_until(self, done: Callable[[], Any], deadline: Optional[float], leads_already: bool,
                    held: HeldBack) -> bool:
        """`wait`, for the one who leads."""
        if not leads_already:
            self._leader = threading.get_ident()
            self._led += 1
        began = time.monotonic()
        try:
            looks = False
            while True:
                self._turn(looks)
                if done():
                    break
                left = TICK_S if deadline is None else min(TICK_S, deadline - time.monotonic())
                if left < 0:
                    break
                held.open = True  # before the look, so that no SIGINT falls between it and the open state
                if held.came is not None:
                    break
                looks = self._listen(left)
                held.open = False
        finally:
            held.open = False
            if not leads_already:
                self._leader = 0
                self._lead.release()
                if time.monotonic() - began > NAP_S:
                    self._nap.put(None)
        return bool(done())

    def _make_poll(self) -> Any:
        if not hasattr(select, "poll"):
            return None
        poll = select.poll()
        for source in self._sources:
            poll.register(source, select.POLLIN)
        return poll

    def _listen(self, timeout_s: float) -> bool:
        """Wait for something to happen; returns whether it is time to look after the connection. The caller leads."""
        if self._poll is not None:
            ready = [fd for fd, _ in self._poll.poll(timeout_s * 1000)]
        else:
            ready = select.select(self._sources, [], [], timeout_s)[0]
        if self._sources[2] in ready:
            try:
                self._wake_r.recv(4096)
            except BlockingIOError:
                pass
        return not ready or self._sources[1] in ready

    def _serve(self) -> None:
        """The io thread: leads whenever nobody else does."""
        led, nap_s = 0, NAP_S
        sources: Any = None
        timeout_s = 0.0  # what came before we listened gives no notice
        while not self._closed:
            if sources is not self._sources:
                sources = self._sources
                poll = self._make_poll()
            try:
                if poll is None:
                    select.select(sources, [], [], timeout_s)
                else:
                    poll.poll(timeout_s * 1000)
            except (OSError, ValueError):
                continue  # somebody has just closed the connection
            timeout_s = TICK_S
            while self._led != led or not self._lead.acquire(blocking=False):
                nap_s = NAP_S if self._led != led else min(2 * nap_s, LONG_NAP_S)
                led = self._led
                self._napping = True
                try:
                    self._nap.get(timeout=nap_s)
                    while True:
                        self._nap.get_nowait()
                except Empty:
                    self._napping = False
                if self._closed:
                    return
            self._leader = threading.get_ident()
            try:
                if not self._closed:
                    looks = self._listen(0)
                    while self._turn(looks):
                        pass
            finally:
                self._leader = 0
                self._lead.release()

    def _turn(self, looks: bool) -> bool:
        """Send, receive, resolve, and with `looks` see whether the connection is still there.

        Returns whether more may be waiting. The caller leads.
        """
        taken = 0
        lost = None
        with self._sock_lock:
            if self._closed or not self.up:
                self._awake = False
                return False
            self._awake = False  # before the look, so that what is queued after it wakes us again
            if self._outbox:
                self._send_outbox()
            while taken < TAKE and net.readable(self._link.sock):
                self._inbox.append(net.recv(self._link.sock))
                taken += 1
            if looks and not taken and self.lost is None:
                lost = self._link.check()
        if taken:
            self._heard = time.monotonic()
        elif looks and lost is None and time.monotonic() - self._heard > self._silence_s:
            lost = f"the controller at {self._link.address} said nothing for {time.monotonic() - self._heard:.0f} s"
        while self._inbox:
            try:
                self._take_in(self._inbox.popleft())
            except ProtocolError as e:
                self.lose(ControllerLost(f"the controller sent a malformed message: {e}"))
        if lost is not None:
            self._break(lost)
        return taken == TAKE

    def _take_in(self, frames: list[Any]) -> None:
        kind = frames[0]
        if kind == wire.RESULTS:
            now = time.time()
            self._taken += 1
            if self._taken - self._confirmed >= CONFIRM_EACH:  # the controller keeps them until then
                self._confirm()
            pop = self._pending.pop
            for session, engine_id, records, section in wire.result_sections(frames):
                source = Source(engine_id, now)
                if self._asked:
                    self._answer(session, [(source, r) for r in wire.section_results(records, section)])
                if session != self.session:
                    continue
                for result in wire.section_results(records, section):
                    waiting = pop(result[0], None)
                    if waiting is not None:
                        waiting[0]._arrive(waiting[1], (source, result))
        elif kind == wire.OUTPUT:
            session, engine_id, pieces = wire.decode_output(frames)
            for seq, name, text in pieces:
                places = self._asked.get((session, seq), ())
                mine = self._pending.get(seq) if session == self.session else None
                for ar, i in (*places, mine) if mine is not None else places:
                    ar._write(i, name, text, engine_id)
        elif kind == wire.PING:
            if self._taken != self._confirmed:
                self._confirm()
        elif kind == wire.SAVED:
            self._unsaved.saved(wire.decode_number(frames))
        elif kind == wire.BYE:
            self.ended = True
            self._break(f"the controller ended: {wire.decode_dict(frames).get('reason')}")
        elif kind == wire.REFUSED:
            self.lose(ControllerLost(f"the controller refused us: {wire.decode_dict(frames).get('reason')}"))
        else:
            self._on_message(frames)

    def _confirm(self) -> None:
        self._confirmed = self._taken
        with self._mutex:
            self._outbox.append((None, wire.encode_number(wire.PONG, self._taken)))

    # --- results that others wait for, or that are asked for again

    def ask(self, ar: AsyncResult, places: Iterable[tuple[wire.TaskKey, int]]) -> None:
        """Have the results of tasks go to a future, too, whenever they come: (task, place in the future) of each."""
        with self._mutex:
            if self.lost is not None:
                raise self.lost.with_traceback(None)
            for key, i in places:
                self._asked.setdefault(key, []).append((ar, i))

    def future_of(self, keys: Sequence[wire.TaskKey]) -> Optional[AsyncResult]:
        """The future that waits for just these tasks, if they are one's that were submitted here and have not ended."""
        waiting = self._pending.get(keys[0][1]) if keys and keys[0][0] == self.session else None
        return waiting[0] if waiting is not None and waiting[0].msg_ids == [wire.msg_id(key) for key in keys] else None

    def unask(self, ar: AsyncResult) -> None:
        """Nothing that a future asked for will come."""
        with self._mutex:
            for key, places in list(self._asked.items()):
                left = [place for place in places if place[0] is not ar]
                if left:
                    self._asked[key] = left
                else:
                    del self._asked[key]

    def _answer(self, session: bytes, outcomes: list[Any]) -> None:
        for outcome in outcomes:
            with self._mutex:
                places = self._asked.pop((session, outcome[1].seq), ())
            for ar, i in places:
                ar._arrive(i, outcome)

    def expect(self, ar: AsyncResult, count: int, digests: Iterable[bytes]) -> int:
        """Number tasks that the controller itself is to queue; returns the first number. Their functions must not be forgotten."""
        with self._mutex:
            if self.lost is not None:
                raise self.lost.with_traceback(None)
            first = self._next
            self._next = first + count
            ar._sent_as(first, count)
            self._pending.update((first + i, (ar, i)) for i in range(count))
            self._functions.update(dict.fromkeys(digests, self._next))
        return first

    def unexpect(self, first: int, count: int) -> None:
        """The controller has not queued them."""
        for number in range(first, first + count):
            self._pending.pop(number, None)

    # --- a connection that breaks

    def _break(self, why: str) -> None:
        """The connection is no more: have another one made."""
        with self._sock_lock:
            if self._closed or self.lost is not None or not self.up:
                return
            self.up, self.away = False, why
            self._link.close()
            self._sources = self._sources_of(None)
            self._poll = self._make_poll()
        self._wake()
        if self._redialler is None:
            self._redialler = threading.Thread(target=self._redial, name="ipclite-redial", daemon=True)
            self._redialler.start()

    def _redial(self) -> None:
        """Dial until there is a connection on which all is as it should be, or no hope."""
        log, began, told = logging.getLogger(f"{__package__}.client"), time.monotonic(), False
        delay_s = 0.02
        while not self._closed and self.lost is None:
            try:
                found = self._dial(self._resumption())
                if found is None:
                    break  # nobody has the client any more
            except (ControllerLost, UserError) as e:
                if isinstance(e, ControllerLost) or not getattr(e, "passing", True):
                    self.lose(ControllerLost(f"{self.away}: {e}") if str(e) else ControllerLost(str(self.away)))
                elif time.monotonic() - began > COMEBACK_S:
                    self.lose(ControllerLost(f"{self.away}, and was not to be had again in {COMEBACK_S:.0f} s: {e}"))
                else:
                    if not told:
                        told = True
                        log.warning("%s; trying for %.0f s to get it back", self.away, COMEBACK_S)
                    time.sleep(delay_s)
                    delay_s = min(REDIAL_S, 1.5 * delay_s)
                continue
            if self._resume(*found):
                log.warning("the connection to the controller at %s was lost, and is back after %.1f s", found[0].address,
                            time.monotonic() - began)
                self._on_back({})
                return
        self._redialler = None
        self._end_context()

    def _resumption(self) -> dict[str, Any]:
        """What we tell the controller of tasks that it may know."""
        with self._mutex:
            pending = sorted(n for n in self._pending if n < self.sent_up_to)
            done = sorted(self._unsaved.numbers().difference(pending)) if self.durable else []
            return {"run": self.run_id, "taken": self._taken, "next": self.sent_up_to, "pending": wire.encode_ranges(pending),
                    "done": wire.encode_ranges(done)}

    def _resume(self, link: net.Link, welcome: dict[str, Any]) -> bool:
        """Go on with a new connection; returns whether it held until all was said."""
        anew = welcome["run_id"] != self.run_id
        with self._sock_lock:
            if self._closed:
                link.close()
                return False
            self._link, self.link_info, self.run_id = link, link.info, welcome["run_id"]
            self.durable, self.ended = bool(welcome.get("durable")), False
            self._taken = self._confirmed = int(welcome.get("taken", 0))
            self._heard = time.monotonic()
            self.up = self._resuming = True
            self._sources = self._sources_of(link)
            self._poll = self._make_poll()
            for message in self._unsaved.functions.values():
                net.send(link.sock, message)
        self._wake()
        self._on_back(welcome)
        absent = welcome.get("absent", [])
        lost = self._ask_missed(absent) if absent else {"expired": [], "unknown": []}
        with self._sock_lock:
            if lost is None or not self.up:
                self._resuming = False
                return False
            unknown = {n for run in wire.decode_ranges(lost["unknown"]) for n in run}
            for message, numbers in self._unsaved.again(self.session, unknown):
                net.send(link.sock, message)
                unknown.difference_update(numbers)
            if anew:
                net.send(link.sock, wire.encode_json(wire.RESUME, {}))
            self._resuming, self._redialler, why, self.away = False, None, self.away, None
        self._give_up(unknown, ControllerLost(f"{why}; the task was lost with it, or ended and was not on record"))
        expired = {n for run in wire.decode_ranges(lost["expired"]) for n in run}
        self._give_up(expired, RecordExpired(f"{why}; the task ended meanwhile, and the controller has dropped its record: raise "
                                             "c.DictDB.record_limit or size_limit in ipcontroller_config.py"))
        self._wake()
        return True

    def _end_context(self) -> None:
        """After the end, whoever is last ends the context: who closed us, or the thread that dials."""
        with self._mutex:
            last, self._parted = self._parted and self._redialler is None, self._parted and self._redialler is not None
        if last:
            self._context.term()

    def tell(self, frames: list[Any]) -> None:
        """Send a message before the outbox gets its turn again. Nobody else does, while we resume."""
        with self._sock_lock:
            if self.up and not self._closed:
                net.send(self._link.sock, frames)
        self._wake()

    def unsent(self, frames: list[Any]) -> bool:
        """Whether a message that was posted is still in the outbox."""
        with self._mutex:
            return any(body is frames for _, body in self._outbox)

    def _give_up(self, numbers: Iterable[int], error: Exception) -> None:
        """These tasks will not end."""
        outcome = _failure(error)
        for number in sorted(numbers):
            waiting = self._pending.pop(number, None)
            if waiting is not None:
                waiting[0]._arrive(waiting[1], outcome)

    def asked(self) -> list[wire.TaskKey]:
        """The tasks whose results were asked for and have not come."""
        with self._mutex:
            return list(self._asked)

    def give_up_asked(self, key: wire.TaskKey, error: Exception) -> None:
        """The result of a task that was asked for will not come."""
        with self._mutex:
            places = self._asked.pop(key, ())
        for ar, i in places:
            ar._arrive(i, _failure(error))

    # --- the end

    def lose(self, error: Exception) -> None:
        """Nothing can arrive any more: nothing that waits may wait on."""
        with self._mutex:
            if self.lost is not None:
                return
            self.lost = error
            pending, self._pending = self._pending, {}
            asked, self._asked = self._asked, {}
        outcome = _failure(error)
        for ar, i in (*pending.values(), *[place for places in asked.values() for place in places]):
            ar._arrive(i, outcome)
        self._on_lost()

    def close(self) -> None:
        """Send what is in the outbox, say goodbye and close. Unfinished tasks go on; their futures fail."""
        if self._closed or self._pid != os.getpid():
            return
        with self._sock_lock:
            if self.lost is None and self.up:
                self._resuming = False
                self._send_outbox()
                net.send(self._link.sock, [wire.BYE])
            self._closed = True
        self.lose(ControllerLost("this Client was closed"))
        self._nap.put(None)
        self._wake()
        if threading.current_thread() is not self._thread:
            self._thread.join()
        with self._lead if self._leader != threading.get_ident() else _nothing():
            self._link.close(1000)
            self._parted = True
            self._end_context()
            self._wake_w.close()
            self._wake_r.close()


def _failure(error: Exception) -> Any:
    """The outcome of a task that no engine has brought about."""
    now = time.time()
    payload = wire.encode_error({"ename": type(error).__name__, "evalue": str(error), "own": True})
    return Source(wire.NO_ENGINE, now), wire.Result(0, now, 0.0, 0, wire.ERROR, payload)


class _nothing:
    def __enter__(self) -> None:
        pass

    def __exit__(self, *exc: Any) -> None:
        pass
