"""Futures over several tasks, told what the connection would tell them."""

from __future__ import annotations

import pytest

from ipclite import pack, wire
from ipclite.errors import CompositeError, ControllerLost, EngineError
from ipclite.futures import Source
from ipclite.results import AsyncResult


def ended(*payloads: bytes, status: int = wire.ERROR) -> AsyncResult:
    """An AsyncResult of one task per payload, all of which have arrived."""
    ar = AsyncResult(None, "f", single=False)
    ar._sent_as(1, len(payloads))
    for i, payload in enumerate(payloads):
        ar._arrive(i, (Source(0, 0.0), wire.Result(1 + i, 0.0, 0.0, 1, status, payload)))
    return ar


def failure(kind: type, text: str) -> bytes:
    """The payload of a task that ended with one of our own errors."""
    return wire.encode_error({"ename": kind.__name__, "evalue": text, "own": True})


def test_values_are_in_the_order_of_the_tasks():
    assert ended(pack.pack("a"), pack.pack("b"), status=wire.OK).get() == ["a", "b"]


def test_losing_the_controller_is_one_error_however_many_tasks_it_ends():
    ar = ended(*[failure(ControllerLost, "gone")] * 3)
    for look in (ar.get, ar.result):
        with pytest.raises(ControllerLost, match="gone"):
            look()
    assert isinstance(ar.exception(), ControllerLost)


def test_other_errors_come_together():
    with pytest.raises(CompositeError) as caught:
        ended(failure(ControllerLost, "gone"), failure(EngineError, "killed")).get()
    assert [type(e) for e in caught.value.elist] == [ControllerLost, EngineError]
