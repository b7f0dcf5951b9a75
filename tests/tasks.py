"""What tests run on engines. Engines import this file, so it imports next to nothing itself."""

from __future__ import annotations

import os
import time
from typing import Any

PATIENCE_S = 60


def hold(flag: Any, value: Any = None) -> Any:
    """Return `value` once the file `flag` exists; None instead of a file: at once."""
    deadline = time.monotonic() + PATIENCE_S
    while flag is not None and not os.path.exists(flag):
        if time.monotonic() > deadline:
            raise TimeoutError(f"{flag} never came")
        time.sleep(0.005)
    return value


def report_and_hold(report: Any, flag: Any, value: Any = None) -> Any:
    """Add our pid to the file `report`, then `hold`."""
    with open(report, "a") as f:
        f.write(f"{os.getpid()}\n")
    return hold(flag, value)


def die_at_first(mark: Any, signum: int = 9) -> int:
    """Kill the engine that runs this; when it is tried again return the pid of the one that runs it then."""
    if not os.path.exists(mark):
        open(mark, "w").close()
        os.kill(os.getpid(), signum)
    return os.getpid()


def die(signum: int = 9) -> None:
    os.kill(os.getpid(), signum)


def family() -> tuple[int, int]:
    """(pid of the engine, pid of its agent)"""
    return os.getpid(), os.getppid()


def hold_the_gil(seconds: float) -> int:
    """Sleep in C without letting any other thread of the engine run."""
    import ctypes

    ctypes.PyDLL(None).poll(None, 0, int(seconds * 1000))
    return os.getpid()


def long_match(seconds: float) -> int:
    """One regular expression that takes at least so long; it holds the GIL, too."""
    import re

    for n in range(18, 60):
        started = time.monotonic()
        re.match("(a+)+b", "a" * n)
        if time.monotonic() - started > seconds:
            return os.getpid()
    raise AssertionError("no match took long enough")


def segfault() -> None:
    import ctypes

    ctypes.string_at(0)


def note_and_sleep(folder, i, seconds):
    """Note that task i runs here."""
    fd = os.open(os.path.join(folder, str(os.getpid())), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.write(fd, b"%d\n" % i)
    os.close(fd)
    time.sleep(seconds)
    return i
