"""Message kinds and their frames: encode, decode, version. No sockets.

A message is a list of frames. The first is one of the constants below (two bytes: format and kind); what follows
depends on the kind:

    HELLO WELCOME REFUSED EXITED CONTROL ENGINES BYE
    RESUME MISSING                                                  one JSON object
    QUERY REPLY                                                     one JSON object, and the buffers that it refers to
    PING                                                            nothing
    PONG SAVED                                                      a number of eight bytes, in a client's PONG and in SAVED
    FUNCTION                                                        digest, then the frames of the function
    FORGET ABORT RETURNED                                           ids, see below
    TASKS RESULTS                                                   sections: one frame, then its large frames ...
    OUTPUT                                                          session, then a JSON list of [seq, stream, text]

Tasks travel in batches. A *section* holds tasks of one client that share a *spec* (a JSON object: what to do with the
payload, and under which conditions). Its first frame holds a head, the spec, an index of one fixed-size record per task, and the
small payloads one after the other (the blob); large ones follow as frames of their own. So a thousand tasks cost two
frames, and whoever forwards them copies bytes without looking at them. Results travel the same way, without a spec.

A payload is `bytes` (small, one piece) or a list of buffers. Rules that hold here: nothing is unpickled, everything
that comes from outside is checked, and what is wrong raises `ProtocolError`.
"""

from __future__ import annotations

import json
import struct
from typing import Any, Iterable, Iterator, List, NamedTuple, Sequence, Tuple, Union

from .errors import ProtocolError

VERSION = 2

HELLO, WELCOME, REFUSED = b"\x01H", b"\x01W", b"\x01N"  # first contact: any role to the controller, and its answers
PING, PONG, BYE = b"\x01P", b"\x01O", b"\x01B"
FUNCTION, FORGET = b"\x01F", b"\x01D"  # a function's bytes travel once; its owner says when it can be dropped
TASKS, RESULTS, OUTPUT = b"\x01T", b"\x01R", b"\x01S"
ABORT = b"\x01A"  # client: take back tasks that have not started
RETURNED = b"\x01U"  # engine: these tasks were taken back unstarted
ENGINES = b"\x01E"  # to clients: engines that came and went
QUERY, REPLY = b"\x01Q", b"\x01Y"
EXITED = b"\x01X"  # agent: an engine has ended, and why
CONTROL = b"\x01C"  # to agents: signal, recall, stop
SAVED = b"\x01V"  # controller: what was sent up to here need not be kept any more
RESUME, MISSING = b"\x01M", b"\x01L"  # a client that came back waits for these tasks; the controller does not have those

KINDS = frozenset((HELLO, WELCOME, REFUSED, PING, PONG, BYE, FUNCTION, FORGET, TASKS, RESULTS, OUTPUT, ABORT,
                   RETURNED, ENGINES, QUERY, REPLY, EXITED, CONTROL, SAVED, RESUME, MISSING))

OK, ERROR, UNMET = 0, 1, 2  # status of a result; UNMET: refused, as a dependency does not hold on this engine
PRINTED, TOLD = ("stdout", "stderr"), ("data", "display")  # kinds of output: text, and what comes in whole pieces
NO_ENGINE = 0xFFFFFFFF  # engine id of a result that no engine made

INLINE_MAX = 16 * 1024  # larger pieces are not copied into a blob
BATCH_TASKS = 512  # a message carries at most this many tasks ...
BATCH_BYTES = 512 * 1024  # ... and about this many bytes of blob, so that nobody is kept from other work for long

SESSION_SIZE = 8
SEQ_END = 1 << 64  # numbers of tasks lie below
NUMBERS_MAX = 1 << 24  # that ranges may name: a few bytes must not become more than fits into memory
Buffer = Union[bytes, bytearray, memoryview]
Payload = Union[bytes, List[Buffer]]
TaskKey = Tuple[bytes, int]  # a task's id: session of its client, number within it

_TASK = struct.Struct("<QIHH")  # number, bytes in the blob, large frames, attempt (or, from a client, fan-out)
_RESULT = struct.Struct("<QddIHHB")  # number, start [s since the epoch], run time [s], bytes, frames, attempt, status
_OUTPUT_HEAD = struct.Struct("<8sI")  # session, engine id
_TASKS_HEAD = struct.Struct("<I8sI")  # bytes of the spec, session, tasks
_RESULTS_HEAD = struct.Struct("<8sII")  # session, engine id, results
_LENGTH = struct.Struct("<I")
_NUMBER = struct.Struct("<Q")
_ID = struct.Struct("<QH")  # number, attempt


class Result(NamedTuple):
    """One task's outcome as an engine reports it. `started` in s since the epoch, `duration` in s."""

    seq: int
    started: float
    duration: float
    attempt: int
    status: int
    payload: Payload


def msg_id(key: TaskKey) -> str:
    """The id of a task as users see it: 16 hex digits of the session, then its number."""
    return f"{key[0].hex()}-{key[1]}"


def task_key(text: str) -> TaskKey:
    """The inverse of `msg_id`.

    Raises:
        ValueError: not a message id.
    """
    try:
        session, _, number = text.partition("-")
        key = (bytes.fromhex(session), int(number))
        if len(key[0]) == SESSION_SIZE and msg_id(key) == text and 0 <= key[1] < SEQ_END:
            return key
    except (AttributeError, TypeError, ValueError):
        pass  # say what it is not, whatever it is
    raise ValueError(f"{str(text)[:100]!r} is not a message id, which is 16 hexadecimal digits, a dash and a number")


def slots(seqs: Sequence[int], size: int) -> list[tuple[int, int, int]]:
    """Where numbers are, in their order, in a table cut into blocks of `size`: (number of the block, first place in it, end in
    it) of each run of consecutive ones."""
    first, n = seqs[0], len(seqs)
    if n == 1 or type(seqs) is range or seqs == list(range(first, first + n)):
        number, a = divmod(first, size)
        if a + n <= size:
            return [(number, a, a + n)]
        runs = [range(first, first + n)]
    else:
        cuts = [i for i, (a, b) in enumerate(zip(seqs, seqs[1:]), 1) if b - a != 1]
        runs = [range(seqs[i], seqs[j - 1] + 1) for i, j in zip([0, *cuts], [*cuts, n])]
    places = []
    for run in runs:
        at = run.start
        while at < run.stop:
            number, a = divmod(at, size)
            b = min(size, a + run.stop - at)
            places.append((number, a, b))
            at += b - a
    return places


def encode_json(kind: bytes, body: Any) -> list[Buffer]:
    """A message whose body is one JSON object."""
    return [kind, json.dumps(body, separators=(",", ":")).encode()]


def decode_json(frames: Sequence[Any], at: int = 1) -> Any:
    """The JSON value in frame `at`."""
    try:
        return json.loads(bytes(frames[at]))
    except (IndexError, ValueError, RecursionError) as e:
        raise ProtocolError(f"frame {at} is not JSON: {e}") from None


def encode_query(kind: bytes, body: Any) -> list[Buffer]:
    """QUERY and REPLY: like `encode_json`, but datetimes become {"$date": ISO text}, and bytes {"$buffer": n}, n being the
    frame after the JSON that holds them."""
    buffers: list[Buffer] = []

    def other(value: Any) -> Any:
        if isinstance(value, (bytes, bytearray, memoryview)):
            buffers.append(value)
            return {"$buffer": len(buffers) - 1}
        if hasattr(value, "isoformat") and hasattr(value, "astimezone"):
            return {"$date": (value if value.tzinfo else value.astimezone()).isoformat()}
        if isinstance(value, (set, frozenset)):
            return list(value)
        raise TypeError(f"{value!r} can not be part of a query")

    return [kind, json.dumps(body, separators=(",", ":"), default=other).encode(), *buffers]


def decode_query(frames: Sequence[Any]) -> dict[str, Any]:
    """The inverse of `encode_query`; dates have a time zone."""
    from datetime import datetime

    def other(value: dict[str, Any]) -> Any:
        if len(value) == 1:
            if "$date" in value:
                return datetime.fromisoformat(value["$date"])
            if "$buffer" in value:
                return frames[2 + value["$buffer"]]
        return value

    try:
        body = json.loads(bytes(frames[1]), object_hook=other)
    except (IndexError, TypeError, ValueError, RecursionError) as e:
        raise ProtocolError(f"a query is malformed: {e}") from None
    if not isinstance(body, dict):
        raise ProtocolError("the body is not a JSON object")
    return body


def decode_dict(frames: Sequence[Any]) -> dict[str, Any]:
    """The JSON object in frame 1, which must be a dict."""
    body = decode_json(frames)
    if not isinstance(body, dict):
        raise ProtocolError("the body is not a JSON object")
    return body


def encode_error(info: dict[str, Any], pickled: bytes = b"") -> bytes:
    """The payload of a failed task: what `errors.remote_error` takes, then the pickled exception if there is one."""
    text = json.dumps(info, separators=(",", ":"), default=str).encode()
    return _LENGTH.pack(len(text)) + text + pickled


def decode_error(payload: Payload) -> tuple[dict[str, Any], bytes]:
    """The inverse of `encode_error`: (info, pickled exception)."""
    whole = payload if isinstance(payload, bytes) else b"".join(payload)
    end = _LENGTH.size + (_LENGTH.unpack_from(whole)[0] if len(whole) >= _LENGTH.size else 0)
    if len(whole) < end:
        raise ProtocolError("an error is cut short")
    return decode_dict([b"", whole[_LENGTH.size : end]]), whole[end:]


def _add_payload(payload: Payload, blob: list[bytes], large: list[Buffer]) -> tuple[int, int]:
    """Put a payload where it belongs; returns its bytes in the blob and its number of large frames."""
    if type(payload) is bytes:
        if len(payload) <= INLINE_MAX:
            blob.append(payload)
            return len(payload), 0
        large.append(payload)
        return 0, 1
    pieces: list[Buffer] = payload  # type: ignore[assignment]
    first = pieces[0]
    if type(first) is bytes and 0 < len(first) <= INLINE_MAX:
        blob.append(first)
        large.extend(pieces[1:])
        return len(first), len(pieces) - 1
    large.extend(pieces)
    return 0, len(pieces)


def encode_tasks(spec: bytes, session: bytes, tasks: Iterable[tuple[int, int, Payload]]) -> list[Buffer]:
    """One section of a TASKS message.

    Args:
        spec: the JSON object shared by the tasks.
        session: the 8 bytes that name their client.
        tasks: (number, attempt or fan-out, payload) of each.
    """
    index: list[bytes] = []
    blob: list[bytes] = []
    large: list[Buffer] = []
    record = _TASK.pack
    for seq, extra, payload in tasks:
        if type(payload) is bytes and len(payload) <= INLINE_MAX:
            blob.append(payload)
            index.append(record(seq, len(payload), 0, extra))
        else:
            size, frames = _add_payload(payload, blob, large)
            index.append(record(seq, size, frames, extra))
    return [b"".join([_TASKS_HEAD.pack(len(spec), session, len(index)), spec, *index, *blob]), *large]


def decode_tasks(frames: Sequence[Any]) -> Iterator[tuple[bytes, bytes, list[tuple[int, int, Payload]]]]:
    """The sections of a TASKS message: (spec, session, [(number, attempt or fan-out, payload), ...])."""
    at, end = 1, len(frames)
    while at < end:
        whole = bytes(frames[at])
        if len(whole) < _TASKS_HEAD.size:
            raise ProtocolError("a section of tasks is cut short")
        spec_size, session, count = _TASKS_HEAD.unpack_from(whole)
        index = _TASKS_HEAD.size + spec_size
        start = index + count * _TASK.size
        if start > len(whole):
            raise ProtocolError("a section of tasks is cut short")
        at += 1
        tasks: list[tuple[int, int, Payload]] = []
        for seq, size, large, extra in _TASK.iter_unpack(memoryview(whole)[index:start]):
            stop = start + size
            if large:
                payload: Payload = [whole[start:stop], *frames[at : at + large]] if size else list(frames[at : at + large])
                at += large
            else:
                payload = whole[start:stop]
            tasks.append((seq, extra, payload))
            start = stop
        if start != len(whole) or at > end:
            raise ProtocolError("the index of a section of tasks does not fit its frames")
        yield whole[_TASKS_HEAD.size : index], session, tasks


def encode_results(session: bytes, engine_id: int, results: Iterable[Result]) -> list[Buffer]:
    """One section of a RESULTS message: outcomes of tasks of one client on one engine."""
    index: list[bytes] = []
    blob: list[bytes] = []
    large: list[Buffer] = []
    record = _RESULT.pack
    for seq, started, duration, attempt, status, payload in results:
        if type(payload) is bytes and len(payload) <= INLINE_MAX:
            blob.append(payload)
            index.append(record(seq, started, duration, len(payload), 0, attempt, status))
        else:
            size, frames = _add_payload(payload, blob, large)
            index.append(record(seq, started, duration, size, frames, attempt, status))
    return [b"".join([_RESULTS_HEAD.pack(session, engine_id, len(index)), *index, *blob]), *large]


def result_sections(frames: Sequence[Any]) -> Iterator[tuple[bytes, int, list[tuple[Any, ...]], Sequence[Any]]]:
    """The sections of a RESULTS message, payloads left where they are.

    Yields:
        (session, engine id, index records, frames of this section). A record is (number, started, duration,
        bytes, frames, attempt, status).
    """
    at, end = 1, len(frames)
    while at < end:
        whole = frames[at]
        if len(whole) < _RESULTS_HEAD.size:
            raise ProtocolError("a section of results is cut short")
        session, engine_id, count = _RESULTS_HEAD.unpack_from(whole)
        blob = _RESULTS_HEAD.size + count * _RESULT.size
        if blob > len(whole):
            raise ProtocolError("a section of results is cut short")
        records = list(_RESULT.iter_unpack(memoryview(whole)[_RESULTS_HEAD.size : blob]))
        stop = at + 1 + sum([r[4] for r in records])
        if stop > end or blob + sum([r[3] for r in records]) != len(whole):
            raise ProtocolError("the index of a section of results does not fit its frames")
        yield session, engine_id, records, frames[at:stop]
        at = stop


def section_results(records: Sequence[tuple[Any, ...]], section: Sequence[Any]) -> Iterator[Result]:
    """The results of one section that `result_sections` yielded."""
    whole = bytes(section[0])
    start, at = _RESULTS_HEAD.size + len(records) * _RESULT.size, 1
    for seq, started, duration, size, large, attempt, status in records:
        stop = start + size
        if large:
            payload: Payload = [whole[start:stop], *section[at : at + large]] if size else list(section[at : at + large])
            at += large
        else:
            payload = whole[start:stop]
        start = stop
        yield Result(seq, started, duration, attempt, status, payload)


def encode_number(kind: bytes, number: int) -> list[Buffer]:
    """SAVED, and a client's PONG. SAVED tells a client that the tasks below `number` need not be sent again, and an engine
    that its first `number` sections of results on this connection need not. PONG tells how many RESULTS messages a client
    has taken in since it first got to this run of the controller."""
    return [kind, _NUMBER.pack(number)]


def decode_number(frames: Sequence[Any]) -> int:
    """The inverse of `encode_number`."""
    if len(frames) != 2 or len(frames[1]) != _NUMBER.size:
        raise ProtocolError("a number has the wrong length")
    return int(_NUMBER.unpack(bytes(frames[1]))[0])


def encode_ranges(numbers: Iterable[int]) -> list[list[int]]:
    """Numbers in ascending order as [first, end] of each run of consecutive ones, for JSON."""
    runs: list[list[int]] = []
    for n in numbers:
        if runs and runs[-1][1] == n:
            runs[-1][1] = n + 1
        else:
            runs.append([n, n + 1])
    return runs


def decode_ranges(runs: Any) -> list[range]:
    """The inverse of `encode_ranges`: ranges, in ascending order."""
    try:
        found = [range(first, end) for first, end in runs]
        if all(0 <= r.start < r.stop <= SEQ_END for r in found) and all(a.stop < b.start for a, b in zip(found, found[1:])):
            if sum(r.stop - r.start for r in found) <= NUMBERS_MAX:
                return found
    except (TypeError, ValueError):
        pass  # say what it is not, whatever it is
    raise ProtocolError("numbers of tasks that are none")


def encode_ids(kind: bytes, session: bytes, ids: Iterable[tuple[int, int]]) -> list[Buffer]:
    """ABORT and RETURNED: (number, attempt) of tasks of one session. In ABORT, 1 in the attempt's place means that the task
    is to be interrupted if it runs."""
    return [kind, session + b"".join([_ID.pack(*i) for i in ids])]


def decode_ids(frames: Sequence[Any]) -> tuple[bytes, list[tuple[int, int]]]:
    """The inverse of `encode_ids`: (session, [(number, attempt), ...])."""
    if len(frames) != 2 or len(frames[1]) < SESSION_SIZE or (len(frames[1]) - SESSION_SIZE) % _ID.size:
        raise ProtocolError("a list of ids has the wrong length")
    index = bytes(frames[1])
    return index[:SESSION_SIZE], list(_ID.iter_unpack(index[SESSION_SIZE:]))


def encode_output(session: bytes, engine_id: int, pieces: list[Any]) -> list[Buffer]:
    """OUTPUT: pieces [number of the task, one of `PRINTED` or `TOLD`, text] written on an engine. The text of "data" is a
    payload in base64, that of "display" what a notebook shows, by MIME type, as JSON."""
    return [OUTPUT, _OUTPUT_HEAD.pack(session, engine_id), json.dumps(pieces, separators=(",", ":")).encode()]


def decode_output(frames: Sequence[Any]) -> tuple[bytes, int, list[Any]]:
    """The inverse of `encode_output`: (session, engine id, pieces)."""
    if len(frames) != 3 or len(frames[1]) != _OUTPUT_HEAD.size:
        raise ProtocolError("an output message has the wrong frames")
    session, engine_id = _OUTPUT_HEAD.unpack(bytes(frames[1]))
    pieces = decode_json(frames, 2)
    if not isinstance(pieces, list) or not all(map(_is_piece, pieces)):
        raise ProtocolError("an output message has pieces that are none")
    return session, engine_id, pieces


def _is_piece(piece: Any) -> bool:
    return (isinstance(piece, list) and len(piece) == 3 and type(piece[0]) is int and isinstance(piece[2], str)
            and piece[1] in (*PRINTED, *TOLD))
