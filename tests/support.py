"""What tests of all folders share: waiting for conditions, absent services, and what a test leaves behind."""

from __future__ import annotations

import os
import stat
import time
from pathlib import Path
from typing import Any, Callable

import psutil
import pytest

DESCRIPTORS_MAX = 50  # more than a test may leave open, as some go when objects are collected
MARK = "IPCLITE_TEST_RUN"  # in the environment of every process that a test run starts
QUEUES: dict[str, Any] = {}  # {name: what has `jobs()` that are in a queue, and can `clear()` it}


def eventually(condition: Callable[[], Any], timeout: float = 20, what: str = "") -> Any:
    """Wait until `condition()` is true.

    Args:
        condition: called every 10 ms.
        timeout: deadline in s, after which the test fails.
        what: names the condition in the failure.

    Returns:
        The value of the condition.
    """
    deadline = time.monotonic() + timeout
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > deadline:
            pytest.fail(f"after {timeout} s still not: {what or getattr(condition, '__name__', condition)}")
        time.sleep(0.01)


def need(present: Any, what: str) -> None:
    """Skip the test if `what` is absent from this machine; where $CI is set, as by .ci/run, that is a failure."""
    if not present:
        if os.environ.get("CI", "") not in ("", "0", "false"):
            pytest.fail(f"{what} is absent, and CI must have it")
        pytest.skip(f"{what} is absent")


def our_processes() -> dict[int, psutil.Process]:
    """Processes, other than this one, that descend from it or carry the mark of this test run."""
    here = psutil.Process()
    found = {p.pid: p for p in here.children(recursive=True)}
    mark = os.environ.get(MARK)
    for p in psutil.process_iter():
        try:
            if mark and p.pid not in found and p.environ().get(MARK) == mark:
                found[p.pid] = p
        except psutil.Error:
            continue  # ended, or somebody else's
    found.pop(here.pid, None)
    return {pid: p for pid, p in found.items() if is_running(p) and not _is_pythons_own(p)}


def command_line(process: psutil.Process) -> str:
    """What it was started with; "" if it has just ended."""
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def is_running(process: psutil.Process) -> bool:
    """Neither ended nor ended without its parent having noticed."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _is_pythons_own(process: psutil.Process) -> bool:
    """`multiprocessing` keeps a helper for as long as its parent lives."""
    try:
        return "multiprocessing.resource_tracker" in " ".join(process.cmdline())
    except psutil.Error:
        return False


def our_ports() -> set[int]:
    """TCP ports on which this process or one of ours listens."""
    ports = set()
    for p in [psutil.Process(), *our_processes().values()]:
        try:
            ports |= {c.laddr.port for c in p.net_connections("tcp") if c.status == psutil.CONN_LISTEN}
        except psutil.Error:
            continue
    return ports


def cluster_files(folder: Path) -> set[Path]:
    """Sockets, connection files and records of running clusters below `folder`."""
    found = set()
    for path in folder.rglob("*"):
        try:
            is_socket = stat.S_ISSOCK(path.lstat().st_mode)
        except FileNotFoundError:
            continue
        if is_socket or (path.suffix == ".json" and path.parent.name == "security") or path.parent.name == "pid":
            found.add(path)
    return found


def descriptors() -> int:
    """How many files, pipes and sockets this process has open."""
    return psutil.Process().num_fds()


class Leaks:
    """What exists now that did not when this object was made.

    Args:
        folder: where the test keeps its profiles and sockets.
        files: whether files count.
    """

    def __init__(self, folder: Path, files: bool = True):
        self._folder, self._files = folder, files
        self._processes, self._ports, self._descriptors = set(our_processes()), our_ports(), descriptors()

    def now(self) -> list[str]:
        """One line for each process, port, file and job that was left behind."""
        left = [f"process {_describe(p)}" for pid, p in our_processes().items() if pid not in self._processes]
        left += [f"listening port {port}" for port in our_ports() - self._ports]
        grown = descriptors() - self._descriptors
        left += [f"{grown} descriptors"] if grown > DESCRIPTORS_MAX else []
        left += [f"job {job} of {name}" for name, queue in QUEUES.items() for job in queue.jobs()]
        if self._files:
            left += [f"file {path}" for path in cluster_files(self._folder)]
        return sorted(left)

    def end(self) -> None:
        """End the jobs and kill the processes that were left behind, so that they do not disturb other tests."""
        for queue in QUEUES.values():
            queue.clear()
        for pid, process in our_processes().items():
            if pid not in self._processes:
                try:
                    process.kill()
                except psutil.NoSuchProcess:
                    continue


def _describe(process: psutil.Process) -> str:
    try:
        return f"{process.pid}: {' '.join(process.cmdline())}"
    except psutil.Error:
        return str(process.pid)
