"""Who talks to the controller, and what it keeps for each until that is safe on the other side.

    Peer ─┬─ ClientPeer   Mail: RESULTS that it has not confirmed yet, sent again when it comes back
          ├─ EnginePeer   how many sections of results came from it
          └─ AgentPeer

Records only: the controller decides.
"""

from __future__ import annotations

import math
from collections import deque
from typing import Any, Iterator

from .db import Function, size_of

MAIL_MAX = 64 * 1024 * 1024  # bytes of unconfirmed results that are kept per client; beyond them its records are asked
VERSION_MAX = 20  # characters
NAME_MAX = 64  # characters of what an engine calls its set, or its MPI world


class Peer:
    """Someone who said HELLO: where to send, and who it is."""

    __slots__ = ("sock", "route", "kind", "name")

    def __init__(self, sock: Any, route: bytes, kind: str, name: str):
        self.sock, self.route, self.kind, self.name = sock, route, kind, name


class Mail:
    """Numbered messages to a client, until it confirms them."""

    __slots__ = ("number", "size", "_messages")

    def __init__(self) -> None:
        self.number = 0  # of the last one
        self.size = 0
        self._messages: deque[tuple[int, list[Any], int]] = deque()

    def add(self, frames: list[Any]) -> None:
        """Number a message, and keep it, however large; the oldest go if there are too many."""
        self.number += 1
        size = size_of(frames)
        self._messages.append((self.number, frames, size))
        self.size += size
        while self.size > MAIL_MAX and len(self._messages) > 1:
            self._drop()

    def confirm(self, number: int) -> None:
        """It has the first `number` messages."""
        while self._messages and self._messages[0][0] <= number:
            self._drop()

    def _drop(self) -> None:
        self.size -= self._messages.popleft()[2]

    @property
    def before(self) -> int:
        """The number of the message before the first that is kept."""
        return self._messages[0][0] - 1 if self._messages else self.number

    def __iter__(self) -> Iterator[list[Any]]:
        return iter([frames for _, frames, _ in self._messages])


class ClientPeer(Peer):
    """`live` counts its unfinished tasks; they run on when it leaves, and keep `functions` alive.

    Attributes:
        gone: there is no connection.
        until: monotonic time up to which a client that is gone may come back.
        received, told: the number after that of the last task that came, and what SAVED told last.
        late: it sends tasks again that it gave to a controller before, and engines are not asked any more whether they have them.
    """

    __slots__ = ("session", "live", "functions", "gone", "until", "mail", "received", "told", "late")

    def __init__(self, sock: Any, route: bytes, name: str, session: bytes):
        super().__init__(sock, route, "client", name)
        self.session, self.live, self.gone, self.until, self.late = session, 0, False, 0.0, False
        self.functions: dict[str, Function] = {}
        self.mail = Mail()
        self.received = self.told = 0


class EnginePeer(Peer):
    """An engine.

    Attributes:
        received, told: sections of results that came on this connection, and what SAVED told last.
        until, move_at, why: monotonic times up to which it may come back when it is away, and when others get what it holds as well;
            and why it is.
    """

    __slots__ = ("id", "uuid", "agent", "info", "known", "received", "told", "until", "move_at", "why")

    def __init__(self, sock: Any, route: bytes, id: int, body: dict[str, Any]):
        super().__init__(sock, route, "engine", f"engine {id}")
        self.id, self.uuid, self.agent = id, body["uuid"], body["agent"]
        self.info = {"id": id, **{k: body.get(k) for k in ("uuid", "host", "pid", "agent")},
                     "python": str(body.get("python", ""))[:VERSION_MAX], **_kinship(body)}
        self.known: set[tuple[bytes, str]] = set()  # functions that it holds
        self.received = self.told = 0
        self.until, self.move_at, self.why = 0.0, math.inf, ""


def _kinship(body: dict[str, Any]) -> dict[str, Any]:
    """What an engine says of the others that belong to it: the name of its set, and its place in an MPI world."""
    found, mpi = {}, body.get("mpi")
    if isinstance(body.get("set"), str):
        found["set"] = body["set"][:NAME_MAX]
    if isinstance(mpi, dict) and [type(mpi.get(key)) for key in ("rank", "size", "tag")] == [int, int, str]:
        found["mpi"] = {"rank": mpi["rank"], "size": mpi["size"], "tag": mpi["tag"][:NAME_MAX]}
    return found


class AgentPeer(Peer):
    """An agent. `local`: on our host; `engines` are those it has said it has, with the task that each was running then."""

    __slots__ = ("uuid", "seen", "local", "engines")

    def __init__(self, sock: Any, route: bytes, uuid: str, host: str, seen: float, local: bool):
        super().__init__(sock, route, "agent", f"agent {uuid[:8]} on {host}")
        self.uuid, self.seen, self.local = uuid, seen, local
        self.engines: dict[str, Any] = {}


class Gather:
    """The results of a call to several engines that are to travel together: their sections, and how many are missing."""

    __slots__ = ("left", "sections")

    def __init__(self, count: int):
        self.left = count
        self.sections: list[Any] = []
