"""The limit of this design: what pyzmq alone can do in the same shape.

    client DEALER -> ROUTER broker ROUTER -> DEALER engines, all over ipc, tasks in batches of 100

A task is a pickled (function, arguments), a result a pickled value. There are no futures, ids, retries, or
security, so whatever offers those can only come near.
"""

from __future__ import annotations

import multiprocessing
import pickle
import shutil
import tempfile
from typing import Any, Iterable

import zmq

BATCH = 100


def broker(front: str, back: str, n: int) -> None:
    """Hand messages of the client to the engines in turn, and bring the answers back."""
    context = zmq.Context()
    clients, engines = _socket(context, zmq.ROUTER), _socket(context, zmq.ROUTER)
    clients.bind(front)
    engines.bind(back)
    names = [engines.recv_multipart()[0] for _ in range(n)]
    poller = zmq.Poller()
    poller.register(clients, zmq.POLLIN)
    poller.register(engines, zmq.POLLIN)
    turn = 0
    while True:
        for socket, _ in poller.poll():
            for message in _waiting(socket):
                if socket is clients:
                    engines.send_multipart([names[turn % n], *message])
                    turn += 1
                else:
                    clients.send_multipart(message[1:])


def engine(back: str) -> None:
    """Run what arrives, one message of tasks at a time."""
    socket = _socket(zmq.Context(), zmq.DEALER)
    socket.connect(back)
    socket.send(b"")
    loads, dumps = pickle.loads, pickle.dumps
    while True:
        client, *tasks = socket.recv_multipart()
        results = [client]
        for task in tasks:
            function, args = loads(task)
            results.append(dumps(function(*args), 5))
        socket.send_multipart(results)


class Pipeline:
    """Broker and engines as child processes, and the client's end of them."""

    def __init__(self, n: int):
        fork = multiprocessing.get_context("fork")
        self._folder = tempfile.mkdtemp(prefix="raw-")
        front, back = f"ipc://{self._folder}/front", f"ipc://{self._folder}/back"
        self._processes = [fork.Process(target=broker, args=(front, back, n), daemon=True)]
        self._processes += [fork.Process(target=engine, args=(back,), daemon=True) for _ in range(n)]
        for process in self._processes:
            process.start()
        self._context = zmq.Context()
        self._socket = _socket(self._context, zmq.DEALER)
        self._socket.connect(front)

    def run(self, function: Any, arguments: Iterable[tuple[Any, ...]], batch: int = BATCH) -> list[Any]:
        """Results of `function` for each tuple of arguments, in order of arrival."""
        socket, dumps, loads = self._socket, pickle.dumps, pickle.loads
        results: list[Any] = []
        frames: list[bytes] = []
        sent = 0
        for args in arguments:
            frames.append(dumps((function, args), 5))
            if len(frames) == batch:
                socket.send_multipart(frames)
                sent += batch
                frames = []
                for message in _waiting(socket):
                    results += [loads(frame) for frame in message]
        if frames:
            socket.send_multipart(frames)
            sent += len(frames)
        while len(results) < sent:
            results += [loads(frame) for frame in socket.recv_multipart()]
        return results

    def close(self) -> None:
        """End the child processes and remove the sockets."""
        for process in self._processes:
            process.terminate()
        for process in self._processes:
            process.join()
        self._context.destroy(0)
        shutil.rmtree(self._folder)


def _socket(context: zmq.Context, kind: int) -> zmq.Socket:
    socket = context.socket(kind)
    socket.set_hwm(0)
    return socket


def _waiting(socket: zmq.Socket) -> Iterable[list[bytes]]:
    """The messages that have arrived."""
    try:
        while True:
            yield socket.recv_multipart(zmq.NOBLOCK)
    except zmq.Again:
        return
