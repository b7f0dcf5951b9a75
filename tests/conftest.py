"""Fixtures of all tests: directories of their own, and a check that nothing is left behind."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import uuid
from pathlib import Path

import pytest
from support import MARK, Leaks, eventually, our_processes

import ipclite as ipp

PATIENCE_S = 10  # what a stopped cluster may take to vanish
REAL = {"integration", "schedulers"}  # folders whose tests start processes


@pytest.fixture(scope="session", autouse=True)
def _mark():
    """Every process of this run can be told from others, and all are gone when it ends."""
    os.environ[MARK] = f"{os.getpid()}-{uuid.uuid4().hex}"
    yield
    left = {pid: p.cmdline() for pid, p in our_processes().items()}
    assert not left, f"processes outlive the tests: {left}"


@contextlib.contextmanager
def _own_folders(monkeypatch):
    base = Path(tempfile.mkdtemp(prefix="ipc-"))
    (base / "ipython").mkdir(mode=0o700)
    monkeypatch.setenv("IPYTHONDIR", str(base / "ipython"))
    monkeypatch.setenv("IPCLITE_RUNTIME_DIR", str(base / "run"))
    yield base / "ipython"
    shutil.rmtree(base)


@pytest.fixture
def ipython_dir(monkeypatch):
    """An empty $IPYTHONDIR for the test and all it starts; sockets go to a short path beside it."""
    with _own_folders(monkeypatch) as folder:
        yield folder


@pytest.fixture(autouse=True)
def _nothing_left_behind(request):
    """Fail a test of real processes that leaves a process, port, socket or connection file."""
    if not REAL & set(request.path.parts):
        yield
        return
    folder = request.getfixturevalue("ipython_dir").parent
    leaks = Leaks(folder, files=request.node.get_closest_marker("keeps_files") is None)
    yield
    _expect_nothing(leaks)


def _expect_nothing(leaks):
    try:
        eventually(lambda: not leaks.now(), PATIENCE_S, "nothing left behind")
    except pytest.fail.Exception:
        left = leaks.now()
        leaks.end()
        if left:
            pytest.fail("left behind: " + "; ".join(left))


@pytest.fixture
def start(ipython_dir):
    """A function that starts a cluster and returns its client; at the end of the test it is stopped."""
    with contextlib.ExitStack() as stack:
        yield lambda n=2, **options: stack.enter_context(ipp.Cluster(n=n, **options))


@pytest.fixture(scope="module")
def cluster_of():
    """A function that starts a cluster of n engines for all tests of a file, and returns its client."""
    with pytest.MonkeyPatch.context() as monkeypatch, _own_folders(monkeypatch) as folder:
        leaks = Leaks(folder.parent)
        with contextlib.ExitStack() as stack:
            yield lambda n, **options: stack.enter_context(ipp.Cluster(n=n, **options))
        _expect_nothing(leaks)


@pytest.fixture(scope="module")
def rc(cluster_of):
    """The client of a cluster of two engines, for all tests of a file. For tests that end nothing."""
    return cluster_of(2)


@pytest.fixture
def balanced(rc):
    """A LoadBalancedView of the shared cluster."""
    return rc.load_balanced_view()


@pytest.fixture
def each(rc):
    """A DirectView of all engines of the shared cluster, with empty namespaces."""
    view = rc[:]
    view.clear(block=True)
    return view
