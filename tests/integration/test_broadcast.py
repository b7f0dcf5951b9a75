"""BroadcastView: one message out, and with is_coalescing one message back."""

from __future__ import annotations

import os

import pytest
import tasks
from support import eventually

import ipclite as ipp
from ipclite import net, wire


class Traffic:
    """Messages of tasks that the client has sent, and of results that it has received."""

    def __init__(self, monkeypatch):
        self.sent = self.received = 0
        send, recv = net.send, net.recv
        monkeypatch.setattr(net, "send", lambda sock, frames, *more: (self._count(frames), send(sock, frames, *more))[1])
        monkeypatch.setattr(net, "recv", lambda sock: self._count(recv(sock)))

    def _count(self, frames):
        self.sent += frames[0] == wire.TASKS
        self.received += frames[0] == wire.RESULTS
        return frames


@pytest.fixture
def traffic(monkeypatch):
    return Traffic(monkeypatch)


@pytest.fixture(scope="module")
def eight(cluster_of):
    return cluster_of(8)


CALLS = {
    "apply": lambda view: view.apply_sync(os.getpid),
    "execute": lambda view: view.execute("a = 1", block=True),
    "push": lambda view: view.push({"a": 1}, block=True),
    "pull": lambda view: view.pull("1 + 1", block=True),
    "clear": lambda view: view.clear(block=True),
}


@pytest.mark.parametrize("call", CALLS)
def test_one_message_there_and_one_back(eight, traffic, call):
    view = eight.broadcast_view(is_coalescing=True)
    for n in range(1, 6):
        assert len(CALLS[call](view)) == 8
        assert (traffic.sent, traffic.received) == (n, n)


def test_without_coalescing_results_come_as_they_are_ready(eight, traffic, tmp_path):
    flag = tmp_path / "flag"
    eight[0].execute("held = True", block=True)
    eight[1:].execute("held = False", block=True)
    view = eight.broadcast_view()
    hold = ipp.interactive(lambda flag: __import__("tasks").hold(flag if held else None, 1))  # noqa: F821
    eight[:].apply_sync(tasks.hold, None)
    ar = view.apply_async(hold, flag)
    eventually(lambda: ar.progress == 7)
    gathered = eight.broadcast_view(is_coalescing=True).apply_async(hold, flag)
    eight[1:].apply_sync(abs, 1)  # all but the first engine have run it by now
    assert gathered.progress == 0
    flag.touch()
    assert ar.get(30) == gathered.get(30) == [1] * 8


@pytest.mark.parametrize("coalescing", [False, True])
def test_it_is_a_direct_view(eight, coalescing):
    view = eight.broadcast_view(is_coalescing=coalescing)
    assert isinstance(view, ipp.BroadcastView) and isinstance(view, ipp.DirectView) and len(view) == 8
    assert view.is_coalescing is coalescing
    view["x"] = 3
    assert view["x + 1"] == [4] * 8
    view.scatter("part", range(20), block=True)
    assert view.gather("part", block=True) == list(range(20))
    assert view.map_sync(lambda x: -x, range(20)) == [-x for x in range(20)]
    assert len(set(view.apply_sync(os.getpid))) == 8
    assert eight.broadcast_view(targets=3, is_coalescing=coalescing).apply_sync(abs, -1) == 1
    assert eight.broadcast_view(targets=[1, -1], is_coalescing=coalescing).targets == [1, 7]
    ar = view.apply_async(print, "hello")
    ar.get(30)
    assert ar.stdout == ["hello\n"] * 8 and ar.engine_id == list(range(8))
    with pytest.raises(TypeError):
        eight.broadcast_view(nonsense=1)


@pytest.mark.parametrize("coalescing", [False, True])
def test_failures_of_some(eight, coalescing):
    eight[:].scatter("id", eight.ids, flatten=True, block=True)
    view = eight.broadcast_view(is_coalescing=coalescing)
    with pytest.raises(ipp.CompositeError) as caught:
        view.apply_sync(ipp.interactive(lambda: 1 / (id % 4)))
    assert len(caught.value.elist) == 2
    values = view.apply_async(ipp.interactive(lambda: 1 / (id % 4))).get(30, return_exceptions=True)
    assert [isinstance(v, ZeroDivisionError) for v in values] == [True, False, False, False] * 2


def test_an_engine_that_dies_does_not_hold_the_others_results_back(start, tmp_path):
    rc = start(3)
    view = rc.broadcast_view(is_coalescing=True)
    ar = view.apply_async(tasks.hold, tmp_path / "flag", 1)
    rc.send_signal(9, targets=1)
    eventually(lambda: rc.ids == [0, 2])
    (tmp_path / "flag").touch()
    values = ar.get(30, return_exceptions=True)
    assert values[0] == values[2] == 1 and isinstance(values[1], ipp.EngineError)


def test_what_is_taken_back_arrives_with_the_rest(eight, tmp_path):
    flag = tmp_path / "flag"
    busy = eight[0].apply_async(tasks.hold, flag)
    ar = eight.broadcast_view(is_coalescing=True).apply_async(abs, -1)
    eight[1:].apply_sync(abs, 1)
    ar.abort()
    values = ar.get(30, return_exceptions=True)
    assert isinstance(values[0], ipp.TaskAborted) and values[1:] == [1] * 7
    flag.touch()
    assert busy.get(30) is None
