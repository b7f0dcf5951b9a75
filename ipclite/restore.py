"""Carrying on after a break: what peers keep until it is safe, and how a restarted controller finds its former run.

    Batch, Section ──► Ledger ◄── what the database has on disk          a former run's Roster, unfinished tasks
                         └──► SAVED, to those who keep it                             └──► Restore: waits for
                                                                       engines and clients, up to a grace ──► go on

A client keeps what it submitted, and an engine its results, until SAVED says that they need not: with a database that
lasts when they are on disk, else when they have arrived. Who comes back says what it has, so that what still runs or is done
is not run twice.

Rule that holds here: decisions and files only; the controller sends.
"""

from __future__ import annotations

from collections import deque
from pathlib import Path
from typing import Any, Iterable, Optional

from . import config
from .errors import ConfigError, ConnectionFileError
from .peers import Peer
from .wire import NO_ENGINE, SESSION_SIZE, TaskKey

NOTE_S = 0.2  # after a change the roster of many is written so soon ...
FEW = 64  # ... and that of so few at once
INFO = {"uuid": str, "agent": str, "host": str}


class Ledger:
    """Whom to tell how much is safe, when the database has written something."""

    def __init__(self) -> None:
        self._open: deque[tuple[Any, Optional[Peer], int]] = deque()
        self._known: set[int] = set()  # ids of the items

    def note(self, item: Any, peer: Optional[Peer], number: int) -> None:
        """An item was handed to the database, as each one is. When it is safe, SAVED with this number is true."""
        self._open.append((item, peer, number))
        self._known.add(id(item))

    def safe(self, items: Iterable[Any]) -> dict[Peer, int]:
        """These items, in the order they were noted in, are safe: {peer: number}. Items that nobody noted are none of ours."""
        found: dict[Peer, int] = {}
        for item in items:
            while id(item) in self._known:
                first, peer, number = self._open.popleft()
                self._known.discard(id(first))
                if peer is not None:
                    found[peer] = max(number, found.get(peer, 0))
        return found

    def clear(self) -> None:
        """Nothing will become safe any more."""
        self._open.clear()
        self._known.clear()


class Roster:
    """The file that says which engines and clients a controller has, for the one that may come after it.

    Args:
        path: of the file.
    """

    def __init__(self, path: Path):
        self.path = path
        self.due: Optional[float] = None  # monotonic time when it is to be written
        self._written: Any = None

    def changed(self, now: float, count: int) -> None:
        """Somebody has come or gone; `count` are there."""
        if self.due is None:
            self.due = now if count <= FEW else now + NOTE_S

    def write(self, engines: Iterable[dict[str, Any]], sessions: Iterable[bytes]) -> None:
        """Note who is there."""
        self.due = None
        content = {"engines": list(engines), "clients": [session.hex() for session in sessions]}
        if content != self._written:
            self._written = content
            try:
                config.write_json(self.path, content)
            except ConfigError as e:
                config.log("controller").warning("%s A controller after this one would not know whom to wait for.", e)

    def read(self) -> tuple[dict[str, dict[str, Any]], set[bytes]]:
        """({engine's uuid: what is known of it}, clients' sessions); both empty if there is no such file."""
        try:
            content = config.read_json(self.path)
            engines = {e["uuid"]: e for e in content["engines"]
                       if type(e["id"]) is int and 0 <= e["id"] < NO_ENGINE >> 1
                       and all(isinstance(e[key], kind) for key, kind in INFO.items())}
            clients = {bytes.fromhex(session) for session in content["clients"]}
            return engines, {session for session in clients if len(session) == SESSION_SIZE}
        except (ConnectionFileError, KeyError, TypeError, ValueError):
            return {}, set()


class Restore:
    """A former run that waits for those who were there.

    Args:
        engines, clients: who was, as `Roster.read` tells.
        until: monotonic time when it goes on without those who are not back.

    Attributes:
        settled: tasks that their clients have the results of.
        mail: (handler, engine, frames) of what engines sent meanwhile: it counts when all have said what they hold.
    """

    def __init__(self, engines: dict[str, dict[str, Any]], clients: set[bytes], until: float):
        self.engines, self.clients, self.until = engines, clients, until
        self.settled: set[TaskKey] = set()
        self.mail: list[tuple[Any, Any, list[Any]]] = []
        self._placed: dict[str, list[TaskKey]] = {}

    def placed(self, key: TaskKey, engine_uuid: str) -> None:
        """A task was given to an engine, as far as is known."""
        self._placed.setdefault(engine_uuid, []).append(key)

    def engine_back(self, uuid: str, holds: Iterable[TaskKey]) -> list[TaskKey]:
        """An engine is back; returns the tasks that it was given and does not hold."""
        self.engines.pop(uuid, None)
        held = set(holds)
        return [key for key in self._placed.get(uuid, ()) if key not in held]

    def over(self, now: float) -> bool:
        """Whether it is time to go on."""
        return now >= self.until or not self.engines and not self.clients
