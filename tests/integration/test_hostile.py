"""Members who lie about what they have, want or were, and files of a former run that somebody has spoilt: the controller goes on."""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import os
import random
import signal
import socket
import sqlite3
import threading
import time

import psutil
import pytest
import tasks
from shell import Command, Raw, connection, controller, security
from support import eventually

import ipclite as ipp
from ipclite import config, wire
from ipclite.controller import Controller
from ipclite.peers import MAIL_MAX

pytestmark = pytest.mark.keeps_files
LASTING = ("--sqlitedb", "--reuse", "--ping=500")
NASTY = [None, True, -1, 0, 1.5, 1e308, float("inf"), float("nan"), 2**63, 10**400, "", "x", "\ud800", "0" * 100_000, [], [[]], [None],
         {}, {"a": {}}, [0], ["x", 1], [2**70], [["ab" * 8, 1, 1, 0]] * 3]
RESUME = {"run": "x", "taken": 0, "next": 5, "pending": [[1, 4]], "done": [[7, 9]]}
MPI = {"rank": 0, "size": 2, "tag": "t"}


class Live:
    """A controller whose records last, and one real engine."""

    def __init__(self, folder, command):
        self.command = command
        self.client, self.engine = connection(folder), connection(folder, "engine")
        with ipp.Client(timeout=20) as rc:
            rc.wait_for_engines(1, timeout=20)

    def join(self, role, **body):
        """A peer, and the answer to its hello."""
        info = self.client if role == "client" else self.engine
        raw = Raw.member(info)
        return raw, raw.hello(info, role=role, **body)

    def unharmed(self):
        assert self.command.running(), self.command.err[-5000:]
        with ipp.Client(timeout=20) as rc:
            assert rc.load_balanced_view(rc.ids[:1]).apply_async(lambda x: x + 1, 41).get(20) == 42
        assert "Traceback" not in self.command.err and "no records of tasks are kept" not in self.command.err


@pytest.fixture
def live(ipython_dir):
    with controller(ipython_dir, *LASTING) as command, Command("engine"):
        found = Live(ipython_dir, command)
        yield found
        found.unharmed()


@pytest.mark.parametrize("role,field,proper", [
    ("client", "resume", RESUME), ("engine", "mpi", MPI), ("engine", "holds", [["ab" * 8, 1, 1, 0]]), ("engine", "left_s", 5.0),
    ("engine", "drain_s", 0.5), ("engine", "set", "s"), ("engine", "id", 5), ("agent", "engines", {"ab": ["ab" * 8, 1]})])
def test_what_only_some_say_in_a_hello(live, role, field, proper):
    values = list(NASTY)
    if isinstance(proper, dict):
        values += [{**proper, key: value} for key in proper for value in NASTY]
    if isinstance(proper, list):
        values += [[[*proper[0][:i], value, *proper[0][i + 1:]]] for i in range(4) for value in NASTY]
    for value in values:
        info = live.client if role == "client" else live.engine
        with Raw.member(info) as raw:
            proper_hello = {"role": role, "protocol": wire.VERSION, "session": os.urandom(8).hex(), "pid": 1, "host": "h",
                            "uuid": os.urandom(16).hex(), "agent": os.urandom(16).hex(), "token": ipp.net.token(info["secret_key"])}
            raw.send(wire.encode_json(wire.HELLO, {**proper_hello, field: value}))
            raw.sock.poll(20)
            assert live.command.running(), (value, live.command.err[-3000:])
            raw.send(wire.encode_json(wire.BYE, {"reason": "done"}))


@pytest.mark.parametrize("runs", [[[0, 2**60]], [[0, 2**64]], [[i * 2**40, i * 2**40 + 2**36] for i in range(100)]])
def test_a_few_bytes_that_stand_for_very_many_tasks(live, runs):
    before = psutil.Process(live.command.pid).memory_info().rss
    for name in ("pending", "done"):
        with Raw.member(live.client) as raw:
            assert raw.hello(live.client, resume={**RESUME, name: runs})[0] == wire.REFUSED
    raw, answer = live.join("client")
    with raw:
        raw.send(wire.encode_query(wire.QUERY, {"id": 1, "what": "missed", "runs": runs}))
        assert "malformed" in json.loads(raw.answer(wire.REPLY)[1])["error"]
    assert psutil.Process(live.command.pid).memory_info().rss < before + (50 << 20)


def test_an_engine_that_wants_the_last_number(live):
    """Those after it get numbers, too."""
    peers = [live.join("engine", id=wanted) for wanted in (wire.NO_ENGINE - 1, wire.NO_ENGINE - 2, None, None)]
    ids = [json.loads(answer[1])["id"] for _, answer in peers]
    assert len(set(ids)) == 4 and max(ids) < wire.NO_ENGINE >> 1
    for raw, _ in peers:
        raw.close()


@pytest.mark.parametrize("name", [None, "", 5, [], {}])
def test_engines_of_no_set_are_not_gone(live, name):
    raw, _ = live.join("client")
    with raw:
        raw.send(wire.encode_query(wire.QUERY, {"id": 1, "what": "gone", "set": name, "reason": "x"}))
        assert "malformed" in json.loads(raw.answer(wire.REPLY)[1])["error"]
    with ipp.Client(timeout=20) as rc:
        assert rc.ids == [0]


def test_tasks_that_are_sent_again_count_once(live):
    """The client is forgotten with its last one: engines hear that they need not keep its functions."""
    engine, welcome = live.join("engine")
    id, session, digest = json.loads(welcome[1])["id"], os.urandom(8), b"\xab" * 16
    client, _ = live.join("client", session=session.hex())
    spec = json.dumps({"op": "apply", "fn": digest.hex(), "targets": [id], "retries": 0}).encode()
    batch = [wire.TASKS, *wire.encode_tasks(spec, session, [(1, 1, b"x"), (2, 1, b"y")])]
    with engine, client:
        client.send([wire.FUNCTION, digest, b"code"])
        for _ in range(3):
            client.send(batch)
        client.send(wire.encode_query(wire.QUERY, {"id": 1, "what": "queue_status", "targets": []}))
        assert json.loads(client.answer(wire.REPLY)[1])["value"]["unassigned"] == 0
        for seq in (1, 2):
            assert seq in {task[0] for _, _, found in wire.decode_tasks(engine.answer(wire.TASKS)) for task in found}
            engine.send([wire.RESULTS, *wire.encode_results(session, id, [wire.Result(seq, 1.0, 10.0, 1, wire.OK, b"x")])])
            client.answer(wire.RESULTS)
        client.send([wire.BYE])
        assert engine.answer(wire.FORGET)[1] == session + digest
        engine.send(wire.encode_json(wire.BYE, {"reason": "done"}))


@pytest.mark.parametrize("flags", [(), LASTING])
def test_the_last_number_that_a_task_can_have(ipython_dir, flags):
    with controller(ipython_dir, "--ping=200", *flags) as command, Command("engine"):
        live = Live(ipython_dir, command)
        session = os.urandom(8)
        raw, _ = live.join("client", session=session.hex())
        with raw:
            spec = json.dumps({"op": "apply", "targets": [77]}).encode()
            raw.send([wire.TASKS, *wire.encode_tasks(spec, session, [(wire.SEQ_END - 1, 1, b"x")])])
            assert wire.decode_number(raw.answer(wire.SAVED)) == wire.SEQ_END - 1
        live.unharmed()


def test_garbage_while_a_former_run_waits(ipython_dir):
    """What engines send then is looked at later, when it must not harm either."""
    with contextlib.ExitStack() as stack:
        first = stack.enter_context(Command("controller", *LASTING))
        first.says("controller started")
        info, client = connection(ipython_dir, "engine"), connection(ipython_dir)
        uuid = os.urandom(16).hex()
        engine = stack.enter_context(Raw.member(info))
        assert engine.hello(info, uuid=uuid, agent="a")[0] == wire.WELCOME
        other = stack.enter_context(Raw.member(info))
        assert other.hello(info, uuid="other", agent="a")[0] == wire.WELCOME
        eventually(lambda: '"other"' in (security(ipython_dir) / "ipcontroller-peers").read_text(), what="both are in the roster")
        first.stop(signal.SIGKILL)
        second = stack.enter_context(Command("controller", *LASTING, "--restore-grace=2"))
        second.says("controller started")
        info = connection(ipython_dir, "engine")
        engine = stack.enter_context(Raw.member(info))
        assert engine.hello(info, uuid=uuid, agent="a")[0] == wire.WELCOME
        for kind in (wire.RESULTS, wire.RETURNED):
            engine.send([kind, b"garbage"])
            engine.send([kind])
        second.says("carrying on without the engines 1")
        stack.enter_context(Command("engine"))
        live = Live(ipython_dir, second)
        engine.send(wire.encode_json(wire.BYE, {"reason": "done"}))
        with ipp.Client(timeout=20) as rc:
            eventually(lambda: 0 not in rc.ids and rc.ids, what="only the real engine is left")
        live.unharmed()
        assert client["secret_key"] == connection(ipython_dir)["secret_key"]


def spoilt(text):
    """A JSON object's text with each value in turn of wrong types, cut short, and nested too deep."""
    body = json.loads(text)
    for key in body:
        for value in (None, -1, 2**70, 1.5, "", "x", [], [5], {}, {"x": 5}, [{"id": 5}],
                      [{"id": 2**40, "uuid": "u", "agent": "a", "host": "h"}]):
            yield json.dumps({**body, key: value})
    yield from ("", "{}", "[]", "5", text[:-5], "\0" * 50, "[" * 100_000, json.dumps(body).replace(":", ":" + "[" * 5000, 1))


@pytest.mark.parametrize("name", ["ipcontroller-peers", "ipcontroller-client.json", "ipcontroller-engine.json"])
def test_spoilt_files_of_a_former_run(ipython_dir, name):
    """The controller starts, or says in one sentence why not."""
    with Command("controller", *LASTING) as command, Command("engine") as engine:
        command.says("controller started")
        with ipp.Client(timeout=20) as rc:
            rc.wait_for_engines(1, timeout=20)
            eventually((security(ipython_dir) / "ipcontroller-peers").exists)
            command.stop(signal.SIGKILL)
            engine.stop(signal.SIGKILL)
    files = {path: path.read_bytes() for path in security(ipython_dir).iterdir() if path.is_file()}
    text = (security(ipython_dir) / name).read_text()
    for broken in spoilt(text):
        for path, content in files.items():
            path.write_bytes(content)
        (security(ipython_dir) / name).write_text(broken)
        started(broken[:300])


def test_spoilt_records_of_a_former_run(ipython_dir):
    """Values of wrong types, tables that are missing, bytes that were flipped."""
    chance = random.Random("flipped")
    with Command("controller", *LASTING) as command, Command("engine") as engine:
        command.says("controller started")
        with ipp.Client(timeout=20) as rc:
            rc.wait_for_engines(1, timeout=20)
            assert rc[0].map_sync(abs, range(100)) == list(range(100))
            left = [rc[0].apply_async(time.sleep, 100 + i) for i in range(3)]
            eventually(lambda: len(rc.db_query({"completed": None}, ["msg_id"])) == len(left), what="they are on record")
            command.stop(signal.SIGKILL)
            engine.stop(signal.SIGKILL)
    folder = security(ipython_dir).parent
    files = {path: path.read_bytes() for path in [folder / "tasks.db", *security(ipython_dir).iterdir()] if path.is_file()}
    said = []

    def play(what, spoil):
        for path in folder.glob("tasks.db*"):
            path.unlink()
        for path, content in files.items():
            path.write_bytes(content)
        if spoil():
            said.append(started(what))

    def change(statement, *values):
        with contextlib.closing(sqlite3.connect(folder / "tasks.db")) as db, db:
            try:
                return db.execute(statement, values) is not None
            except sqlite3.IntegrityError:
                return False

    with contextlib.closing(sqlite3.connect(folder / "tasks.db")) as db:
        tables = [name for (name,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        columns = {table: [row[1] for row in db.execute(f'PRAGMA table_info("{table}")')] for table in tables}
    for table in tables:
        for column in columns[table]:
            for value in (None, "x", b"x", -1, 2**62, 1.5, bytes(100)):
                play((table, column, value), lambda: change(f'UPDATE OR IGNORE "{table}" SET "{column}" = ?', value))  # noqa: B023
        play(table, lambda: change(f'DROP TABLE "{table}"'))  # noqa: B023

    def flip():
        content = bytearray(files[folder / "tasks.db"])
        for _ in range(chance.choice((1, 5, 50))):
            content[chance.randrange(100, len(content))] = chance.randrange(256)
        return (folder / "tasks.db").write_bytes(content[:chance.choice((len(content), chance.randrange(len(content))))])

    for i in range(60):
        play(f"flipped {i}", flip)
    assert "" in said and any("damaged" in words for words in said) and any("records" in words for words in said)


def started(what):
    """Start and stop a controller in this process, as often as one likes; returns what it said if it would not start."""
    settings = config.parse("controller", [*LASTING, "--restore-grace=0"])
    found = Controller(settings, logging.getLogger("test"))
    try:
        found.open(settings.profile_dir)
        found.end = "that was all"
        found.run()
        found._on_deadline(1e12)
        return ""
    except ipp.UserError as e:
        assert str(e).count(chr(10)) == 0
        return str(e)
    except Exception as e:
        raise AssertionError(what) from e
    finally:
        found.close()


class Cable:
    """TCP to the controller's port, which can be cut and mended."""

    def __init__(self, port):
        self._port, self._pairs, self.whole = port, [], True
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._threads = [threading.Thread(target=self._serve)]
        self._threads[0].start()

    def _serve(self):
        with contextlib.suppress(OSError):  # we are closed
            while True:
                near = self._listener.accept()[0]
                if not self.whole:
                    near.close()
                    continue
                far = socket.create_connection(("127.0.0.1", self._port), 5)
                self._pairs.append((near, far))
                for ends in ((near, far), (far, near)):
                    self._threads.append(threading.Thread(target=self._carry, args=ends))
                    self._threads[-1].start()

    @staticmethod
    def _carry(source, sink):
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 18):
                sink.sendall(data)
        for sock in (source, sink):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def cut(self):
        self.whole = False
        for sock in itertools.chain(*self._pairs):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def close(self):
        self.cut()
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for thread in self._threads:
            thread.join(10)
        for sock in itertools.chain(*self._pairs):
            sock.close()


def bytes_when(flag, n, path):
    tasks.hold(flag)
    with open(path, "ab") as file:
        file.write(b"x")
    return bytes(n)


@pytest.mark.parametrize("flags", [(), ("--nodb",), LASTING])
def test_a_huge_result_of_a_client_that_is_away(ipython_dir, tmp_path, flags):
    """It waits for its client, larger than all that is kept otherwise; and the child of a fork meanwhile has no part in it."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(controller(ipython_dir, "--transport=auto", "--ip=127.0.0.1", "--ping=500", *flags))
        stack.enter_context(Command("engine"))
        info = connection(ipython_dir)
        cable = Cable(int(info["url"].rpartition(":")[2]))
        stack.callback(cable.close)
        there = {**info, "ipc": "", "url": f"tcp://127.0.0.1:{cable.port}", "location": ""}
        with ipp.Client(there, timeout=20) as rc, ipp.Client(timeout=20) as other:
            rc.wait_for_engines(1, timeout=20)
            other.wait_for_engines(1, timeout=20)
            ar = rc[0].apply_async(bytes_when, tmp_path / "flag", MAIL_MAX + 1, tmp_path / "ran")
            eventually(lambda: other.queue_status()[0]["queue"] == 1)
            cable.cut()
            eventually(lambda: rc._connection.away, what="the client has lost its connection")
            (tmp_path / "flag").touch()
            eventually(lambda: other.queue_status()[0]["completed"] == 1, what="the task has ended")
            child = os.fork()
            if not child:
                try:
                    ar.get(10)
                    os._exit(1)
                except ipp.ControllerLost:
                    os._exit(0)
                finally:
                    os._exit(2)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
            cable.whole = True
            assert len(ar.get(60)) == MAIL_MAX + 1
            assert (tmp_path / "ran").read_bytes() == b"x"
