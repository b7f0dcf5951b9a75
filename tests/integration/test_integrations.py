"""joblib, scikit-learn and dask on the engines."""

from __future__ import annotations

import importlib.util
import logging
import multiprocessing
import os
import subprocess
import sys
import threading

import psutil
import pytest
import tasks
from support import eventually, need

import ipclite as ipp

for name in ("joblib", "sklearn", "distributed"):
    need(importlib.util.find_spec(name), name)

import joblib  # noqa: E402


@pytest.fixture
def backend(rc):
    """joblib runs on the shared cluster."""
    rc.load_balanced_view().register_joblib_backend()
    with joblib.parallel_config(backend="ipclite"):
        yield


def square(x):
    return x * x


def pid_of(_):
    return os.getpid()


# --- joblib


def test_joblib(rc, backend):
    assert joblib.Parallel()(joblib.delayed(square)(i) for i in range(500)) == [i * i for i in range(500)]
    assert set(joblib.Parallel()(joblib.delayed(pid_of)(i) for i in range(200))) <= set(rc[:].apply_sync(os.getpid))
    assert joblib.Parallel(n_jobs=1)(joblib.delayed(square)(i) for i in range(3)) == [0, 1, 4]
    y = 7
    assert joblib.Parallel(n_jobs=-1)(joblib.delayed(lambda x: x + y)(i) for i in range(5)) == [7, 8, 9, 10, 11]
    assert joblib.Parallel()([]) == []


def test_its_size_is_the_view_s(rc, backend):
    assert joblib.effective_n_jobs() == joblib.effective_n_jobs(17) == joblib.effective_n_jobs(-1) == 2
    rc[1].executor.view.register_joblib_backend("one")
    with joblib.parallel_config(backend="one"):
        assert joblib.effective_n_jobs() == 1
        assert joblib.Parallel()(joblib.delayed(square)(i) for i in range(4)) == [0, 1, 4, 9]
    with pytest.raises(ValueError, match="n_jobs == 0"):
        joblib.Parallel(n_jobs=0)(joblib.delayed(square)(i) for i in range(3))


def test_old_scripts_ask_for_it_by_its_old_name(rc, backend):
    with joblib.parallel_backend("ipyparallel"):
        assert set(joblib.Parallel()(joblib.delayed(pid_of)(i) for i in range(50))) <= set(rc[:].apply_sync(os.getpid))


def test_make_default(rc):
    before = joblib.parallel.DEFAULT_BACKEND
    rc.load_balanced_view().register_joblib_backend("everywhere", make_default=True)
    try:
        pids = joblib.Parallel(n_jobs=-1)(joblib.delayed(pid_of)(i) for i in range(50))
        assert set(pids) <= set(rc[:].apply_sync(os.getpid))
    finally:
        joblib.parallel.DEFAULT_BACKEND = before


def test_quick_calls_travel_together(rc, backend):
    before = rc._connection.next_number
    assert len(joblib.Parallel()(joblib.delayed(square)(i) for i in range(3000))) == 3000
    assert rc._connection.next_number - before < 1500


def test_an_exception_keeps_its_type_and_ends_the_rest(rc, backend, tmp_path):
    def work(i):
        if i == 3:
            raise KeyError("three")
        if i > 3:
            tasks.hold(None if i < 10 else tmp_path / "flag")
        return i

    with pytest.raises(KeyError, match="three") as caught:
        joblib.Parallel(batch_size=1, pre_dispatch="all")(joblib.delayed(work)(i) for i in range(100))
    assert isinstance(caught.value, ipp.RemoteError) and caught.value.engine_info["engine_id"] in (0, 1)
    eventually(lambda: len(rc.outstanding) <= 2, what="the rest taken back")
    (tmp_path / "flag").touch()
    assert joblib.Parallel()(joblib.delayed(square)(i) for i in range(3)) == [0, 1, 4]


def test_results_as_they_come_and_a_timeout(backend, tmp_path):
    found = joblib.Parallel(return_as="generator")(joblib.delayed(square)(i) for i in range(50))
    assert list(found) == [i * i for i in range(50)]
    with pytest.raises(multiprocessing.TimeoutError):
        joblib.Parallel(timeout=0.2)(joblib.delayed(tasks.hold)(tmp_path / "flag") for _ in range(2))
    (tmp_path / "flag").touch()


def test_a_parallel_within_a_task_has_its_engine_to_itself(backend):
    def outer(i):
        def here(_):
            return os.getpid(), threading.get_ident()

        return set(joblib.Parallel(n_jobs=4)(joblib.delayed(here)(j) for j in range(5))) == {here(0)}

    assert all(joblib.Parallel()(joblib.delayed(outer)(i) for i in range(4)))


def test_a_grid_search_of_scikit_learn(rc, backend):
    from sklearn.datasets import load_iris
    from sklearn.model_selection import GridSearchCV
    from sklearn.svm import SVC

    x, y = load_iris(return_X_y=True)
    grid = {"C": [0.1, 1, 10], "gamma": [0.1, 1]}
    before = rc._connection.next_number
    found = GridSearchCV(SVC(), grid, cv=3).fit(x, y)
    assert rc._connection.next_number > before
    with joblib.parallel_config(backend="sequential"):
        alone = GridSearchCV(SVC(), grid, cv=3).fit(x, y)
    assert found.best_params_ == alone.best_params_
    assert list(found.cv_results_["mean_test_score"]) == list(alone.cv_results_["mean_test_score"])


DEFAULT = """
import joblib, os, ipclite
ipclite.register_joblib_backend()
with joblib.parallel_config(backend='ipclite'):
    pids = set(joblib.Parallel()(joblib.delayed(os.getpid)() for _ in range(50)))
    again = set(joblib.Parallel()(joblib.delayed(os.getpid)() for _ in range(50)))
print(sorted(pids | again))
assert os.getpid() not in pids
"""


def run_default():
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", DEFAULT], env=environ, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    return set(eval(done.stdout))


def test_the_default_cluster_is_used(start):
    rc = start(2, cluster_id="")
    assert run_default() <= set(rc[:].apply_sync(os.getpid))
    assert rc[:].apply_sync(abs, -1) == [1, 1]


def test_a_cluster_is_started_and_stopped_if_there_is_none(ipython_dir):
    pids = run_default()
    assert pids
    eventually(lambda: not any(psutil.pid_exists(pid) for pid in pids), what="the engines gone")


# --- dask


@pytest.fixture
def dask(start):
    """A cluster of two engines that is not used for anything else."""
    rc = start(2)
    yield rc
    rc.stop_dask()
    logging.getLogger("distributed").setLevel(logging.WARNING)


def worker_threads():
    return [thread.name for thread in threading.enumerate() if thread.name == "dask-worker"]


def test_dask(dask, tmp_path):
    rc = dask
    engines = rc[:].apply_sync(os.getpid)
    client = rc.become_dask()
    assert type(client).__module__.startswith("distributed.")
    assert client.submit(lambda x: x + 1, 3).result(timeout=30) == 4
    assert sum(client.gather(client.map(square, range(20)))) == sum(i * i for i in range(20))
    assert set(client.gather(client.map(pid_of, range(50)))) <= set(engines)
    assert sorted(client.run(os.getpid).values()) == sorted(engines)
    assert client.scheduler_info()["address"].startswith("tls://127.0.0.1:")
    held = client.submit(tasks.hold, str(tmp_path / "flag"), "value", pure=False)
    assert rc[:].apply_sync(abs, -1) == [1, 1]  # while dask's tasks run
    (tmp_path / "flag").touch()
    assert held.result(timeout=30) == "value"
    rc.stop_dask()
    assert client.status == "closed"
    assert rc[:].apply_sync(worker_threads) == [[], []]
    assert rc[:].apply_sync(os.getpid) == engines
    rc.stop_dask()


def test_dask_on_some_engines_and_again(dask):
    rc = dask
    first = rc.become_distributed(targets=0, nthreads=3)
    assert list(first.nthreads().values()) == [3]
    second = rc.become_dask(targets=[0, 1])
    assert sorted(second.nthreads().values()) == [1, 3]
    rc.stop_distributed(targets=1)
    eventually(lambda: len(second.nthreads()) == 1)
    assert second.submit(abs, -1).result(timeout=30) == 1
    rc.stop_dask()
    again = rc.become_dask()
    assert again.submit(abs, -2).result(timeout=30) == 2


def test_dask_with_nannies(dask):
    rc = dask
    engines = rc[:].apply_sync(os.getpid)
    client = rc.become_dask(targets=0, nanny=True)
    (worker,) = client.run(os.getpid).values()
    assert worker not in engines and psutil.Process(worker).parent().pid == engines[0]
    rc.stop_dask()
    eventually(lambda: not psutil.pid_exists(worker), what="the worker gone")


def test_dask_when_an_engine_dies(dask):
    rc = dask
    client = rc.become_dask()
    future = client.map(square, range(10))
    assert client.gather(future) == [i * i for i in range(10)]
    rc.send_signal("KILL", targets=0)
    eventually(lambda: rc.ids == [1] or len(client.nthreads()) == 1, what="the engine gone")
    eventually(lambda: len(client.nthreads()) == 1)
    assert client.submit(abs, -3).result(timeout=30) == 3
    rc.stop_dask()


def test_a_second_scheduler_is_refused(dask):
    rc = dask
    rc.become_dask()
    with ipp.Client(rc.cluster.connection_file()) as other, pytest.raises(RuntimeError, match="stop_dask"):
        other.become_dask(targets=0)
    assert rc[:].apply_sync(worker_threads) == [["dask-worker"], ["dask-worker"]]


# --- what is not installed


@pytest.mark.parametrize("module, call", [
    ("joblib", lambda rc: ipp.register_joblib_backend()), ("joblib", lambda rc: rc[:].register_joblib_backend()),
    ("distributed", lambda rc: rc.become_dask())])
def test_a_package_that_is_not_installed_is_named(rc, monkeypatch, module, call):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=f"needs the package {module}.*install it"):
        call(rc)


def test_a_package_that_the_engines_lack(rc):
    rc[:].execute("import sys; sys.modules['distributed'] = None", block=True)
    try:
        with pytest.raises(ImportError, match="needs the package distributed"):
            rc.become_dask(targets=0)
        assert rc._dask is None
    finally:
        rc[:].execute("del sys.modules['distributed']", block=True)
