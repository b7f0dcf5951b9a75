"""One small adapter per system, and the child process in which a system is measured.

    python -m bench.peers <system> import              what importing it, and its entry point, takes
    python -m bench.peers <system> first               a line as soon as each of 4 engines has given a result
    python -m bench.peers <system> idle                the same, then stays until stdin ends
    python -m bench.peers <system> many                a line as soon as each of 64 engines has
    python -m bench.peers <system> rows '{"call": 200, ...}'     the timed rows, as JSON

An adapter has `module` and `entry` (what a user imports), `most` (a bound on the number of tasks, so that slow
systems end in time; rates are per task all the same) and these methods:

    start(n), stop()
    each(function)          function() on every engine, or on as many as take it
    call()                  one synchronous no-op
    submit(n)               n no-ops submitted one by one, gathered
    map(n)                  the system's own map of a no-op over n items, as a user would call it
    results(n, size)        n results of `size` bytes
    send(array)             an array to every engine

and, where the system offers it:

    executor(n)             n no-ops through the interface of `concurrent.futures`
    imap(n)                 a lazy map of a no-op over n items
    chain(n)                n no-ops, each after the one before
    everywhere(n)           n calls of a no-op on each of 8 engines

The no-op is `abs` and a result of size bytes is `bytes(size)`: built-in functions, which every system can name.
"""

from __future__ import annotations

import importlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any, Callable

MAP_CHUNK = 1000  # for the executors, whose map needs tuning to be fast
MODES = ("import", "first", "rows", "idle")  # of a system that does not say others


class IPP:
    """ipclite and ipyparallel: one program serves both."""

    entry = "Client"

    def __init__(self, module: str, most: int, modes: tuple[str, ...] = ()):
        self.module, self.most = module, most
        self.modes = modes or MODES

    def start(self, n: int) -> None:
        ipp = importlib.import_module(self.module)
        self.n = n
        self.cluster = ipp.Cluster(n=n)
        self.client = self.cluster.start_and_connect_sync()
        self.view = self.client.load_balanced_view()

    def stop(self) -> None:
        self.client.close()
        self.cluster.stop_cluster_sync()

    def each(self, function: Callable[[], Any]) -> list[Any]:
        return self.client[:].apply_sync(function)

    def call(self) -> Any:
        return self.view.apply_sync(abs, -1)

    def submit(self, n: int) -> list[Any]:
        return [result.get() for result in [self.view.apply_async(abs, i) for i in range(n)]]

    def map(self, n: int) -> list[Any]:
        return self.view.map_sync(abs, range(n))

    def results(self, n: int, size: int) -> list[Any]:
        return [result.get() for result in [self.view.apply_async(bytes, size) for _ in range(n)]]

    def send(self, array: Any) -> None:
        self.client[:].push({"array": array}, block=True)

    def executor(self, n: int) -> list[Any]:
        submit = self.view.executor.submit
        return [future.result() for future in [submit(abs, i) for i in range(n)]]

    def imap(self, n: int) -> list[Any]:
        return list(self.view.imap(abs, range(n)))

    def chain(self, n: int) -> list[Any]:
        results: list[Any] = []
        for i in range(n):
            with self.view.temp_flags(after=results[-1:]):
                results.append(self.view.apply_async(abs, i))
        return [result.get() for result in results]

    def everywhere(self, n: int) -> list[Any]:
        cluster = importlib.import_module(self.module).Cluster(n=8)
        with cluster as client:
            everyone = client[:]
            everyone.apply_sync(abs, 0)
            start = time.perf_counter()
            values = [result.get() for result in [everyone.apply_async(abs, i) for i in range(n)]]
            self.everywhere_s = time.perf_counter() - start
        return [value[0] for value in values]


class Executor:
    """ProcessPoolExecutor and loky: the interface of `concurrent.futures`."""

    most = 10**9

    def __init__(self, module: str, entry: str):
        self.module, self.entry = module, entry

    def start(self, n: int) -> None:
        self.n = n
        self.pool = getattr(importlib.import_module(self.module), self.entry)(n)

    def stop(self) -> None:
        self.pool.shutdown(wait=True)

    def each(self, function: Callable[[], Any]) -> list[Any]:
        return [future.result() for future in [self.pool.submit(function) for _ in range(self.n)]]

    def call(self) -> Any:
        return self.pool.submit(abs, -1).result()

    def submit(self, n: int) -> list[Any]:
        return [future.result() for future in [self.pool.submit(abs, i) for i in range(n)]]

    def map(self, n: int) -> list[Any]:
        return list(self.pool.map(abs, range(n), chunksize=MAP_CHUNK))

    def results(self, n: int, size: int) -> list[Any]:
        return [future.result() for future in [self.pool.submit(bytes, size) for _ in range(n)]]

    def send(self, array: Any) -> None:
        for future in [self.pool.submit(len, array) for _ in range(self.n)]:
            future.result()


class Interpreters:
    """As many Python interpreters, started one by one: each imports what an engine needs, and says hello."""

    module, entry, most = "zmq", "Context", 0
    modes = ("many",)
    hello = "import sys, cloudpickle, zmq; s = zmq.Context().socket(zmq.DEALER); s.connect(sys.argv[1]); s.send(b''); s.recv()"

    def start(self, n: int) -> None:
        import zmq

        self.folder = tempfile.TemporaryDirectory(prefix="bench-")
        self.context, address = zmq.Context(), f"ipc://{self.folder.name}/hello"
        self.socket = self.context.socket(zmq.ROUTER)
        self.socket.bind(address)
        self.processes = [subprocess.Popen([sys.executable, "-c", self.hello, address]) for _ in range(n)]

    def each(self, function: Callable[[], Any]) -> list[Any]:
        self.names = [self.socket.recv_multipart()[0] for _ in self.processes]
        return self.names

    def stop(self) -> None:
        for name in self.names:
            self.socket.send_multipart([name, b""])
        for process in self.processes:
            process.wait()
        self.context.destroy()
        self.folder.cleanup()


class Raw:
    """`bench.raw`: pyzmq with nothing around it."""

    module, entry, most = "zmq", "Context", 10**9

    def start(self, n: int) -> None:
        from . import raw

        self.n = n
        self.pipeline = raw.Pipeline(n)

    def stop(self) -> None:
        self.pipeline.close()

    def each(self, function: Callable[[], Any]) -> list[Any]:
        return self.pipeline.run(function, [()] * self.n, batch=1)

    def call(self) -> Any:
        return self.pipeline.run(abs, [(-1,)])[0]

    def submit(self, n: int) -> list[Any]:
        return self.pipeline.run(abs, ((i,) for i in range(n)))

    map = submit

    def results(self, n: int, size: int) -> list[Any]:
        return self.pipeline.run(bytes, [(size,)] * n, batch=1)

    def send(self, array: Any) -> None:
        self.pipeline.run(len, [(array,)] * self.n, batch=1)


class Dask:
    module, entry, most = "distributed", "Client", 1000

    def start(self, n: int) -> None:
        from distributed import Client

        self.client = Client(n_workers=n, threads_per_worker=1, dashboard_address=None)

    def stop(self) -> None:
        self.client.shutdown()

    def each(self, function: Callable[[], Any]) -> list[Any]:
        return list(self.client.run(function).values())

    def call(self) -> Any:
        return self.client.submit(abs, -1, pure=False).result()

    def submit(self, n: int) -> list[Any]:
        return self.client.gather([self.client.submit(abs, i, pure=False) for i in range(n)])

    def map(self, n: int) -> list[Any]:
        return self.client.gather(self.client.map(abs, range(n), pure=False))

    def results(self, n: int, size: int) -> list[Any]:
        return self.client.gather([self.client.submit(bytes, size, pure=False) for _ in range(n)])

    def send(self, array: Any) -> None:
        self.client.scatter(array, broadcast=True, hash=False)


class Ray:
    module, entry, most = "ray", "init", 2000

    def start(self, n: int) -> None:
        import ray

        self.n, self.ray = n, ray
        ray.init(num_cpus=n, include_dashboard=False, log_to_driver=False, logging_level="error")
        self._remote = ray.remote(lambda function, *args: function(*args)).remote

    def stop(self) -> None:
        self.ray.shutdown()

    def each(self, function: Callable[[], Any]) -> list[Any]:
        return self.ray.get([self._remote(function) for _ in range(self.n)])

    def call(self) -> Any:
        return self.ray.get(self._remote(abs, -1))

    def submit(self, n: int) -> list[Any]:
        return self.ray.get([self._remote(abs, i) for i in range(n)])

    map = submit

    def results(self, n: int, size: int) -> list[Any]:
        return self.ray.get([self._remote(bytes, size) for _ in range(n)])

    def send(self, array: Any) -> None:
        shared = self.ray.put(array)
        self.ray.get([self._remote(len, shared) for _ in range(self.n)])


SYSTEMS = {
    "ipclite": IPP("ipclite", most=10**9, modes=(*MODES, "many")),
    "raw pyzmq": Raw(),
    "ProcessPool": Executor("concurrent.futures", "ProcessPoolExecutor"),
    "interpreters": Interpreters(),
    "ipyparallel": IPP("ipyparallel", most=1000),
    "dask": Dask(),
    "ray": Ray(),
    "loky": Executor("loky", "get_reusable_executor"),
}
CORE, PEERS = list(SYSTEMS)[:4], list(SYSTEMS)[4:]


def _timed(function: Callable[..., Any], *args: Any) -> float:
    start = time.perf_counter()
    function(*args)
    return time.perf_counter() - start


def _calls(system: Any, times: int) -> float:
    return statistics.median([_timed(system.call) for _ in range(times)])


def _rate(run: Callable[[int], list[Any]], n: int) -> float:
    start = time.perf_counter()
    results = run(n)
    seconds = time.perf_counter() - start
    if sorted(results) != list(range(n)):
        raise RuntimeError(f"{len(results)} results, and not those of {n} tasks")
    return n / seconds


def _everywhere(system: Any, n: int) -> float:
    if system.everywhere(n) != list(range(n)):
        raise RuntimeError("wrong results")
    return 8 * n / float(system.everywhere_s)


def _send(system: Any, size: int) -> float:
    try:
        import numpy

        array = numpy.ones(size, dtype="u1")
    except ImportError:
        array = bytearray(size)
    return _timed(system.send, array)


MIB = 1 << 20
# What a row measures, given the system and the row's number: round trips, tasks, items, results, bytes.
ROWS: dict[str, Callable[[Any, int], float]] = {
    "call": lambda system, n: _calls(system, min(n, system.most)) * 1e3,
    "submit": lambda system, n: _rate(system.submit, min(n, system.most)),
    "map": lambda system, n: _rate(system.map, min(n, system.most)),
    "results": lambda system, n: n / _timed(system.results, n, MIB),
    "send": lambda system, size: _send(system, size) * 1e3,
    "executor": lambda system, n: _rate(system.executor, min(n, system.most)),
    "imap": lambda system, n: _rate(system.imap, min(n, system.most)),
    "chain": lambda system, n: _rate(system.chain, min(n, system.most)),
    "everywhere": lambda system, n: _everywhere(system, min(n, system.most)),
}
OPTIONAL = ("executor", "imap", "chain", "everywhere")


def _import(system: Any) -> dict[str, float]:
    before = len(sys.modules)
    first = _timed(importlib.import_module, system.module)
    modules = len(sys.modules) - before
    second = _timed(getattr, sys.modules[system.module], system.entry)  # many packages load their parts when asked
    return {"import": first * 1e3, "modules": modules,
            "entry": (first + second) * 1e3, "entry_modules": len(sys.modules) - before}


def main(name: str, mode: str, sizes: str = "{}") -> None:
    """Measure one system; see the head of this file."""
    system = SYSTEMS[name]
    if mode == "import":
        print(json.dumps(_import(system)))
        return
    system.start({"rows": 2, "many": 64}.get(mode, 4))
    try:
        if mode == "rows":
            system.submit(100)  # connections, caches and lazily started workers are part of the first result
            offered = {row: n for row, n in json.loads(sizes).items() if row not in OPTIONAL or hasattr(system, row)}
            print(json.dumps({row: ROWS[row](system, n) for row, n in offered.items()}), flush=True)
        else:
            system.each(os.getpid)
            print("ready", flush=True)
        if mode == "idle":
            sys.stdin.read()
    finally:
        system.stop()


if __name__ == "__main__":
    main(*sys.argv[1:])
