"""The engines in other people's hands: joblib (and so scikit-learn) and dask.

    joblib.Parallel ──► JoblibBackend.submit ──► view.apply_async ──► _run_batch on an engine
    rc.become_dask  ──► scheduler: a thread of this process ◄── TLS ── workers: a thread in each engine

Third-party packages are imported on use, and their absence is one sentence. What runs on engines is a function of this
file that refers to nothing of the client's process.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
import os
import socket
import threading
from typing import Any, Optional

from .errors import EngineError, NoEnginesRegistered

DASK_WAIT_S = 30.0  # for a worker to reach its scheduler, or to end


def _need(module: str, what: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as e:
        raise ImportError(f"{what} needs the package {module.partition('.')[0]}, which can't be imported ({e}); "
                          "install it where the client runs and where the engines run") from None


# ---------------------------------------------------------------- joblib


def register_joblib_backend(name: str = "ipclite", make_default: bool = False, view: Any = None) -> None:
    """Make the engines known to joblib: `with joblib.parallel_config(backend="ipclite"): ...`

    Args:
        name: of the backend; the default one is also known as "ipyparallel", for scripts that ask for it.
        make_default: use it wherever no other backend is asked for.
        view: where to run; by default all engines of the default cluster if one runs, or else of a cluster that is
            started on first use and ends with this process.

    Raises:
        ImportError: joblib is not installed.

    Example:
        >>> import joblib
        >>> rc.load_balanced_view().register_joblib_backend()
        >>> with joblib.parallel_config(backend="ipclite"):
        ...     joblib.Parallel()(joblib.delayed(pow)(i, 2) for i in range(5))
        [0, 1, 4, 9, 16]
    """
    joblib = _need("joblib", "register_joblib_backend")
    make = functools.partial(_joblib_backend(), view=view)
    for each in (name, "ipyparallel") if name == "ipclite" else (name,):
        joblib.register_parallel_backend(each, make)
    if make_default:
        joblib.register_parallel_backend(name, make, make_default=True)


def _run_batch(batch: Any) -> Any:
    return batch()


class _Default:
    """The view for those who gave none, shared by all backends of this process."""

    lock = threading.Lock()
    view: Any = None
    pid = 0

    @classmethod
    def get(cls) -> Any:
        """All engines of the default cluster, or of one that is started now."""
        with cls.lock:
            if cls.view is None or cls.pid != os.getpid() or cls.view.client._connection.lost:
                cls.view, cls.pid = cls.connect().load_balanced_view(), os.getpid()
            return cls.view

    @staticmethod
    def connect() -> Any:
        """A client of the default cluster, or of a new one if there is none, or no engine."""
        package = importlib.import_module(__package__ or "")
        try:
            client = package.Client(timeout=1)
        except (OSError, TimeoutError):
            return package.Cluster().start_and_connect_sync()
        try:
            client.wait_for_engines(1, timeout=5)
            return client
        except TimeoutError:
            client.close()
            return package.Cluster().start_and_connect_sync()


@functools.lru_cache(None)
def _joblib_backend() -> Any:
    backends = _need("joblib.parallel", "the joblib backend")

    class JoblibBackend(backends.AutoBatchingMixin, backends.ParallelBackendBase):  # type: ignore[misc, name-defined]
        """Runs the batches of joblib on a view's engines.

        Args:
            view: where; None: on the default cluster.
        """

        supports_retrieve_callback = True  # and so timeouts and results by generator
        supports_inner_max_num_threads = False
        default_n_jobs = -1

        def __init__(self, view: Any = None, **options: Any):
            super().__init__(**options)
            self._given = view
            self._under_way: set[Any] = set()

        @property
        def view(self) -> Any:
            return self._given if self._given is not None else _Default.get()

        def effective_n_jobs(self, n_jobs: Any) -> int:
            """As many as there are engines, whatever is asked for: they run one task each. With one engine joblib runs
            everything itself."""
            if n_jobs == 0:
                raise ValueError("n_jobs == 0 in Parallel has no meaning")
            engines = len(self.view)
            if not engines:
                raise NoEnginesRegistered("joblib can't run anything: there are no engines")
            return engines

        def configure(self, n_jobs: Any = 1, parallel: Any = None, **options: Any) -> int:
            """Start a `Parallel`; returns how many jobs run at once."""
            self.parallel = parallel
            self.reset_batch_stats()
            return self.effective_n_jobs(n_jobs)

        def submit(self, func: Any, callback: Any = None) -> Any:
            """Run a batch; its future."""
            future = self.view.apply_async(_run_batch, func)
            self._under_way.add(future)
            future.add_done_callback(self._under_way.discard)
            if callback is not None:
                future.add_done_callback(callback)
            return future

        def retrieve_result_callback(self, out: Any) -> Any:
            """The results of a batch that has ended."""
            return out.result()

        def abort_everything(self, ensure_ready: bool = True) -> None:
            """Take back what has not started: a task has failed."""
            for future in list(self._under_way):
                future.cancel()

        def get_nested_backend(self) -> Any:
            """A `Parallel` within a task has one engine to itself."""
            return backends.SequentialBackend(nesting_level=(self.nesting_level or 0) + 1), None

    return JoblibBackend


# ---------------------------------------------------------------- dask


def start_dask(client: Any, targets: Any, port: int, nanny: bool, scheduler_args: Optional[dict[str, Any]],
               worker_args: dict[str, Any]) -> Any:
    """Make engines workers of dask, too: they go on to take tasks, and dask's run in other threads.

    The scheduler is a thread of this process and ends with it. All speak TLS with keys made for the occasion, unless
    `scheduler_args` brings a `security` of its own.

    Args:
        targets: which engines.
        port: of the scheduler; 0: any.
        nanny: run each worker in a process of its own, a child of the engine, so that dask can restart it.
        scheduler_args, worker_args: keywords for `distributed.Scheduler` and for `distributed.Worker` (or `Nanny`).

    Returns:
        A `distributed.Client`.

    Raises:
        ImportError: distributed is not installed, here or on the engines.
    """
    distributed = _need("distributed", "become_dask")
    view = client.direct_view(targets)
    ids = list(view._ids()[0])
    client.direct_view(ids).apply_sync(_check_dask)
    here = {client._engines[i].get("host") for i in ids} <= {socket.gethostname()}
    if client._dask is None:
        host = "127.0.0.1" if here else distributed.utils.get_ip()
        client._dask = _Dask(distributed, host, port, dict(scheduler_args or {}))
    dask = client._dask
    options = {"nthreads": 1, "dashboard_address": "127.0.0.1:0", **worker_args}
    if here:
        options.setdefault("host", "127.0.0.1")
    try:
        client.direct_view(ids).apply_sync(_start_worker, dask.cluster.scheduler_address, dask.security, nanny, options)
        dask.engines.update(ids)
        return dask.connect(len(dask.engines))
    except BaseException:
        stop_dask(client, ids)
        raise


def stop_dask(client: Any, targets: Any = "all") -> None:
    """End the workers on engines, and the scheduler and its clients when no worker is left.

    They are those of this client's scheduler, or if it has none, of any.
    """
    dask = client._dask
    ids = client._targets(targets)[0]
    if dask is not None:
        dask.engines.intersection_update(set(client.ids) - set(ids))
        if not dask.engines:
            client._dask = None
            dask.close_clients()
    try:
        address = dask.cluster.scheduler_address if dask is not None else None
        stopping = []
        for i in ids if client._connection.lost is None else ():
            with contextlib.suppress(IndexError):  # an engine that is gone has no worker
                stopping.append(client.direct_view(i).apply_async(_stop_worker, address))
        for ar in stopping:
            with contextlib.suppress(EngineError):
                ar.get()
    finally:
        if dask is not None and not dask.engines:
            dask.cluster.close(timeout=10)


class _Dask:
    """The scheduler, and the clients of it that were handed out."""

    def __init__(self, distributed: Any, host: str, port: int, options: dict[str, Any]):
        self.engines: set[int] = set()
        self.security = options.pop("security", None) or distributed.Security.temporary()
        self._distributed, self._clients = distributed, []  # type: ignore[var-annotated]
        scheduler = {"host": host, "port": port, "dashboard": False, "dashboard_address": "127.0.0.1:0", **options,
                     "security": self.security, "protocol": "tls://" if self.security.require_encryption else "tcp://"}
        self.cluster = distributed.SpecCluster(
            scheduler={"cls": distributed.Scheduler, "options": scheduler}, workers={}, security=self.security,
            silence_logs=logging.WARNING)

    def connect(self, workers: int) -> Any:
        """A client that sees so many workers."""
        client = self._distributed.Client(self.cluster.scheduler_address, security=self.security, set_as_default=True)
        self._clients.append(client)
        client.wait_for_workers(workers, timeout=DASK_WAIT_S)
        return client

    def close_clients(self) -> None:
        """End what `connect` returned."""
        for client in self._clients:
            with contextlib.suppress(TimeoutError):
                client.close(timeout=5)


class _Worker(threading.Thread):
    """On an engine: a thread with dask's event loop and worker, so that the main thread can go on taking tasks."""

    def __init__(self, kind: Any, address: str, options: dict[str, Any]):
        super().__init__(name="dask-worker", daemon=True)
        self.kind, self.address, self.options = kind, address, options
        self.told = threading.Event()  # it works, or it never will
        self.trouble: Optional[BaseException] = None
        self._loop: Any = None
        self._end: Any = None

    def run(self) -> None:
        """The thread."""
        import asyncio

        try:
            asyncio.run(self._work(asyncio))
        except BaseException as e:
            self.trouble = e
        finally:
            self.told.set()

    async def _work(self, asyncio: Any) -> None:
        self._loop, self._end = asyncio.get_running_loop(), asyncio.Event()
        async with self.kind(self.address, **self.options) as worker:
            self.told.set()
            ends = [asyncio.ensure_future(self._end.wait()), asyncio.ensure_future(worker.finished())]
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            for end in ends:
                end.cancel()

    def stop(self) -> None:
        """End the worker and the thread."""
        if self.is_alive():
            with contextlib.suppress(RuntimeError):  # the loop has ended meanwhile
                self._loop.call_soon_threadsafe(self._end.set)
        self.join(DASK_WAIT_S)


_worker: Optional[_Worker] = None


def _check_dask() -> None:
    _need("distributed", "become_dask")


def _start_worker(address: str, security: Any, nanny: bool, options: dict[str, Any]) -> None:
    global _worker
    distributed = _need("distributed", "become_dask")
    if _worker is not None and _worker.is_alive():
        if _worker.address == address:
            return
        raise RuntimeError(f"this engine works for the dask scheduler at {_worker.address} already; call stop_dask() "
                           "first")
    worker = _Worker(distributed.Nanny if nanny else distributed.Worker, address, {"security": security, **options})
    worker.start()
    if not worker.told.wait(DASK_WAIT_S):
        worker.stop()
        raise TimeoutError(f"dask's worker did not reach its scheduler at {address} in {DASK_WAIT_S:g} s")
    if worker.trouble is not None:
        raise worker.trouble
    _worker = worker


def _stop_worker(address: Optional[str]) -> None:
    """End the worker of the scheduler at `address`, or of any."""
    global _worker
    if _worker is not None and address in (None, _worker.address):
        worker, _worker = _worker, None
        worker.stop()
