"""Client: how it finds its cluster, what it says when it can't, and what it is while connected."""

from __future__ import annotations

import gc
import json
import mmap
import os
import subprocess
import sys
import threading
import weakref
from pathlib import Path

import numpy as np
import psutil
import pytest
import tasks
from support import eventually

import ipclite as ipp

ROOT = Path(__file__).resolve().parents[2]


def client_file(rc):
    return Path(rc.cluster.connection_file())


# --- finding the cluster


def test_by_the_default_profile(start, ipython_dir):
    start(1, cluster_id="")
    with ipp.Client() as rc:
        rc.wait_for_engines(1, timeout=30)
        assert rc[0].apply_sync(abs, -1) == 1
        assert rc.cluster_id == ""


def test_by_profile_directory_and_cluster_id(start, tmp_path, ipython_dir):
    first = start(1, profile="mine", cluster_id="a")
    second = start(1, profile="mine", cluster_id="b")
    pids = {"a": first[0].apply_sync(os.getpid), "b": second[0].apply_sync(os.getpid)}
    folder = ipython_dir / "profile_mine"
    for cluster_id, pid in pids.items():
        by_folders = {"profile": "mine", "ipython_dir": str(ipython_dir)}
        for how in ({"profile": "mine"}, {"profile_dir": str(folder)}, by_folders):
            with ipp.Client(cluster_id=cluster_id, **how) as rc:
                assert rc[0].apply_sync(os.getpid) == pid
    with pytest.raises(ipp.ConnectionFileError):
        ipp.Client(profile="mine", timeout=0.1)


def test_by_connection_file_and_by_its_content(rc):
    path = client_file(rc)
    for given in (str(path), path, json.loads(path.read_text())):
        with ipp.Client(given) as other:
            assert other.ids == rc.ids
            assert other[0].apply_sync(abs, -1) == 1


def test_it_waits_for_the_file(ipython_dir):
    """The client comes first, then the cluster."""
    found = []

    def connect():
        with ipp.Client(cluster_id="later", timeout=60) as rc:
            rc.wait_for_engines(1, timeout=30)
            found.append(rc[0].apply_sync(abs, -1))

    (ipython_dir / "profile_default").mkdir(mode=0o700)
    thread = threading.Thread(target=connect)
    thread.start()
    with ipp.Cluster(n=1, cluster_id="later"):
        thread.join(60)
    assert found == [1]


def test_no_cluster_is_one_sentence(ipython_dir):
    with pytest.raises(ipp.UserError) as caught:
        ipp.Client(timeout=0.1)
    assert isinstance(caught.value, OSError)
    assert "\n" not in str(caught.value)


def test_a_profile_that_is_not_there(ipython_dir):
    with pytest.raises(ipp.UserError, match="nowhere"):
        ipp.Client(profile="nowhere", timeout=0.1)


def test_the_engines_file_is_not_for_clients(rc):
    path = Path(str(client_file(rc)).replace("-client.json", "-engine.json"))
    with pytest.raises(ipp.UserError, match="engine"):
        ipp.Client(path, timeout=1)
    assert rc[0].apply_sync(abs, -1) == 1


def test_the_file_of_a_dead_run(start, tmp_path):
    with ipp.Cluster(n=1) as rc:
        kept = client_file(rc).read_text()
    path = tmp_path / "ipcontroller-client.json"
    path.write_text(kept)
    path.chmod(0o600)
    with pytest.raises(ipp.ConnectionFileError, match="ended"):
        ipp.Client(path, timeout=0.1)


# --- engines


def test_ids_length_and_iteration(rc):
    assert rc.ids == [0, 1] and len(rc) == 2
    assert [view.targets for view in rc] == [0, 1]
    assert isinstance(rc.ids, list)
    rc.ids.clear()
    assert rc.ids == [0, 1]


def test_engines_that_come_are_seen_by_every_client(start):
    rc = start(1)
    with rc.cluster.connect_client_sync() as other:
        rc.cluster.start_engines_sync(2)
        for each in (rc, other):
            each.wait_for_engines(3, timeout=30)
            assert each.ids == [0, 1, 2]


def test_wait_for_engines(rc):
    rc.wait_for_engines()
    rc.wait_for_engines(2, timeout=0)
    with pytest.raises(TimeoutError, match="3 engines"):
        rc.wait_for_engines(3, timeout=0.1)


def test_names_that_scripts_of_ipython_parallel_use(rc):
    assert rc.activate(0) == rc.activate(0) or repr(rc.activate(0)) == "<DirectView 0>"
    assert repr(rc.activate(suffix="_all")) == "<DirectView all>"
    rc[:].push({"x": 1}, block=True)
    assert rc.clear(0).get(30) is None and rc.clear(block=True) == [None, None]
    assert not any(rc[:]["'x' in globals()"])
    assert rc.profile is None
    assert ipp.error.RemoteError is ipp.RemoteError and ipp.error.TimeoutError is TimeoutError
    from ipclite.datapub import publish_data
    from ipclite.error import CompositeError

    assert CompositeError is ipp.CompositeError and publish_data is ipp.publish_data is ipp.datapub.publish_data
    assert ".".join(map(str, ipp.version_info)) == ipp.__version__
    with pytest.raises(AttributeError):
        print(ipp.nonsense)


@pytest.mark.parametrize("what", ["use_cloudpickle", "use_pickle"])
def test_the_pickler_of_this_process(rc, what):
    try:
        getattr(ipp, what)()
        assert rc[0].apply_sync(lambda x: x + 1, 1) == 2
    finally:
        ipp.use_pickle()


def test_indexing_by_something_else(rc):
    with pytest.raises(TypeError):
        rc["all"]
    with pytest.raises(TypeError):
        rc[None]
    assert rc[range(2)].targets == [0, 1]
    assert rc[5:].targets == []


def test_a_view_of_no_engines_says_so(rc):
    with pytest.raises(ipp.NoEnginesRegistered):
        rc[5:].apply_sync(abs, -1)


# --- several clients


def test_clients_do_not_see_each_others_results(rc):
    others = [rc.cluster.connect_client_sync() for _ in range(4)]
    wrong = []

    def work(k, client):
        view = client.load_balanced_view()
        ars = [view.apply_async(lambda a, b: (a, b), k, i) for i in range(200)]
        wrong.extend(ar for i, ar in enumerate(ars) if ar.get(60) != (k, i))

    threads = [threading.Thread(target=work, args=pair) for pair in enumerate(others)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads) and wrong == []
    for client in others:
        client.close()


def test_a_client_that_leaves_does_not_stop_its_tasks(rc, tmp_path):
    done = tmp_path / "done"
    other = rc.cluster.connect_client_sync()
    ars = [other.load_balanced_view().apply_async(tasks.report_and_hold, done, None) for _ in range(20)]
    other.close()
    assert all(isinstance(ar.exception(30), (ipp.ControllerLost, type(None))) for ar in ars)
    eventually(lambda: done.exists() and len(done.read_text().split()) == 20)
    assert rc[0].apply_sync(abs, -1) == 1


def test_a_killed_client_leaves_the_cluster_in_order(rc, tmp_path):
    code = f"""
import sys, time
sys.path[:0] = {[str(ROOT)]!r}
import ipclite as ipp
rc = ipp.Client({str(client_file(rc))!r})
ars = [rc.load_balanced_view().apply_async(time.sleep, 0.01) for _ in range(50)]
rc.queue_status()
print("ready", flush=True)
time.sleep(600)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "ready\n"
        other.kill()
    assert rc.load_balanced_view().map_sync(abs, range(-100, 0)) == list(range(100, 0, -1))
    assert rc.ids == [0, 1]


def test_many_functions(rc):
    """More than the client, controller and engines keep."""
    view = rc.load_balanced_view()
    functions = [eval(f"lambda x: x + {i}") for i in range(600)]
    for _ in range(2):
        assert [ar.get(60) for ar in [view.apply_async(f, 1) for f in functions]] == [i + 1 for i in range(600)]


# --- the end


def test_close(rc):
    other = rc.cluster.connect_client_sync()
    pending = other[0].apply_async(tasks.hold, None)
    pending.get(30)
    other.close()
    other.close()
    assert other.ids == []
    assert "closed" in repr(other)
    for late in (other.queue_status, other.wait_for_engines, lambda: other.load_balanced_view().apply_async(abs, 1)):
        with pytest.raises(ipp.ControllerLost, match="closed"):
            late()
    assert pending.get() is None


def test_errors_of_a_closed_client_do_not_grow(rc):
    other = rc.cluster.connect_client_sync()
    view = other[0]
    other.close(linger=1)
    depths = set()
    for _ in range(5):
        for call in (view.apply, other.queue_status, lambda: other[0], lambda: other.load_balanced_view().apply_async(abs, 1)):
            with pytest.raises(ipp.ControllerLost) as caught:
                call(*[abs, 1] if call == view.apply else [])
            depths.add(len(caught.traceback))
    assert max(depths) < 12


def test_close_ends_what_waits(rc, tmp_path):
    other = rc.cluster.connect_client_sync()
    ar = other[0].apply_async(tasks.hold, tmp_path / "flag")
    errors = []
    waiting = threading.Thread(target=lambda: errors.append(ar.exception()))
    waiting.start()
    other.close()
    waiting.join(30)
    (tmp_path / "flag").touch()
    assert isinstance(errors[0], ipp.ControllerLost)


def test_a_forgotten_client_goes(rc):
    before = {thread.name for thread in threading.enumerate()}
    other = rc.cluster.connect_client_sync()
    assert other[0].apply_sync(abs, -1) == 1
    gone = weakref.ref(other)
    del other
    gc.collect()
    eventually(lambda: gc.collect() is not None and gone() is None)
    eventually(lambda: {thread.name for thread in threading.enumerate()} <= before)


def test_repr(rc):
    assert "2 engines" in repr(rc)


def test_a_query_that_nobody_knows(rc):
    with pytest.raises(ValueError, match="nonsense"):
        rc._query("nonsense")


def test_a_task_bigger_than_memory_allows(rc):
    size = int(0.6 * psutil.virtual_memory().total)
    pages = mmap.mmap(-1, size)  # none of which is ever touched
    array = np.frombuffer(pages, dtype="u1")
    with pytest.raises(ipp.PackError, match="send smaller pieces"):
        rc.load_balanced_view().apply_async(len, array)
    with pytest.raises(ipp.PackError, match="send smaller pieces"):
        rc[:].push({"array": array})
    assert rc[:].apply_sync(abs, -1) == [1, 1]
