"""Fixtures of all tests: directories of their own, and a check that nothing is left behind."""

from __future__ import annotations

import os
import shutil
import tempfile
import uuid
from pathlib import Path

import pytest
from support import MARK, Leaks, eventually, our_processes

PATIENCE_S = 10  # what a stopped cluster may take to vanish
REAL = {"integration", "schedulers"}  # folders whose tests start processes


@pytest.fixture(scope="session", autouse=True)
def _mark():
    """Every process of this run can be told from others, and all are gone when it ends."""
    os.environ[MARK] = f"{os.getpid()}-{uuid.uuid4().hex}"
    yield
    left = {pid: p.cmdline() for pid, p in our_processes().items()}
    assert not left, f"processes outlive the tests: {left}"


@pytest.fixture
def ipython_dir(monkeypatch):
    """An empty $IPYTHONDIR for the test and all it starts; sockets go to a short path beside it."""
    base = Path(tempfile.mkdtemp(prefix="ipc-"))
    (base / "ipython").mkdir(mode=0o700)
    monkeypatch.setenv("IPYTHONDIR", str(base / "ipython"))
    monkeypatch.setenv("IPCLITE_RUNTIME_DIR", str(base / "run"))
    yield base / "ipython"
    shutil.rmtree(base)


@pytest.fixture(autouse=True)
def _nothing_left_behind(request):
    """Fail a test of real processes that leaves a process, port, socket or connection file."""
    if not REAL & set(request.path.parts):
        yield
        return
    folder = request.getfixturevalue("ipython_dir").parent
    leaks = Leaks(folder, files=request.node.get_closest_marker("keeps_files") is None)
    yield
    try:
        eventually(lambda: not leaks.now(), PATIENCE_S, "nothing left behind")
    except pytest.fail.Exception:
        left = leaks.now()
        leaks.end()
        if left:
            pytest.fail("left behind: " + "; ".join(left))
