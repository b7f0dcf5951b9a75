"""What a client has sent and keeps until the controller says that it is safe.

    TASKS, FUNCTION ──► Unsaved ──► the same again, for a controller that does not have them
    SAVED ──────────────────┘

Rule that holds here: a task is sent again only if the controller says that it does not know it.
"""

from __future__ import annotations

import json
from collections import deque
from typing import Any, Iterable, Iterator

from . import wire


class Unsaved:
    """Messages with tasks, oldest first, and all functions."""

    def __init__(self) -> None:
        self.functions: dict[bytes, list[Any]] = {}  # digest -> FUNCTION message
        self._messages: deque[tuple[int, list[Any]]] = deque()  # number after that of the last task, message

    def __len__(self) -> int:
        return len(self._messages)

    def add(self, end: int, message: list[Any]) -> None:
        """A TASKS message was sent, whose tasks have numbers below `end`."""
        self._messages.append((end, message))

    def saved(self, below: int) -> None:
        """The tasks below this number are safe."""
        while self._messages and self._messages[0][0] <= below:
            self._messages.popleft()

    def numbers(self) -> set[int]:
        """The tasks that are kept."""
        return {n for _, message in list(self._messages) for _, _, tasks in wire.decode_tasks(message) for task in tasks
                for n in _numbers(task)}

    def again(self, session: bytes, numbers: Iterable[int]) -> Iterator[tuple[list[Any], list[int]]]:
        """(TASKS message, numbers of its tasks) of those of the numbers that are kept."""
        wanted = set(numbers)
        for _, message in list(self._messages) if wanted else ():
            sections: list[Any] = []
            sent: list[int] = []
            for spec, _, tasks in wire.decode_tasks(message):
                whole = [task for task in tasks if wanted.issuperset(_numbers(task))]
                if whole:
                    sections += wire.encode_tasks(spec, session, whole)
                    sent += [n for task in whole for n in _numbers(task)]
                for seq, count, payload in tasks:
                    part = [n for n in range(seq, seq + count) if n in wanted] if count > 1 else []
                    if part and len(part) < count:  # a call to several engines of which some have done it
                        body = json.loads(spec)
                        for n in part:
                            one = json.dumps({**body, "targets": [body["targets"][n - seq]]}, separators=(",", ":")).encode()
                            sections += wire.encode_tasks(one, session, [(n, 1, payload)])
                        sent += part
            if sent:
                yield [wire.TASKS, *sections], sent


def _numbers(task: Any) -> range:
    return range(task[0], task[0] + max(1, task[1]))
