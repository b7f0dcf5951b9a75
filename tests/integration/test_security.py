"""Strangers, people with half of what they need, and members who speak garbage get nothing and harm nothing."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import re
import shutil
import socket
import stat
import struct
import threading
from pathlib import Path

import psutil
import pytest
import zmq
from shell import Command, Raw, connection, controller, one_sentence, run, security
from support import eventually

import ipclite as ipp
from ipclite import net, wire

TCP = ("--transport=tcp", "--ip=127.0.0.1")
DEEP = 100_000  # levels of JSON that no decoder follows


@pytest.fixture(scope="module")
def live(tmp_path_factory):
    """A controller on both transports with one engine."""
    folder = tmp_path_factory.mktemp("live")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("IPYTHONDIR", str(folder))
        patch.setenv("IPCLITE_RUNTIME_DIR", f"/tmp/ipc-sec-{os.getpid()}")
        with controller(folder, "--transport=auto", "--ip=127.0.0.1") as command, Command("engine"):
            yield Live(folder, command)
    os.rmdir(f"/tmp/ipc-sec-{os.getpid()}")


class Live:
    def __init__(self, folder, command):
        self.command = command
        self.client, self.eng = connection(folder), connection(folder, "engine")
        self.file = security(folder) / "ipcontroller-client.json"
        self.secrets = {info[key] for info in (self.client, self.eng) for key in ("secret_key",)}
        self.secrets |= {net.token(secret) for secret in self.secrets}
        with self.connect() as rc:
            rc.wait_for_engines(1, timeout=20)

    def connect(self):
        return ipp.Client(self.file, timeout=20)

    def log_since(self, start):
        return self.command.err[start:]

    def works(self):
        """A real client is served, by the one engine that was there from the start."""
        with self.connect() as rc:
            eventually(lambda: 0 in rc.ids, what="the engine is there")
            assert rc[0].apply_async(lambda x: x + 1, 41).get(20) == 42
        assert self.command.running()


def hello_of(info):
    """A proper hello of whoever holds a connection file, with every field that any role sends."""
    return {"role": info["role"], "protocol": wire.VERSION, "session": os.urandom(8).hex(), "pid": 1, "host": "h",
            "id": None,
            "uuid": os.urandom(16).hex(), "agent": os.urandom(16).hex(), "token": net.token(info["secret_key"])}


@pytest.fixture
def unharmed(live, request):
    """Whatever the test did: the cluster works on, tells no secret, and strangers do not fill its log."""
    assert live.command.running(), "an earlier test ended the controller"
    start = len(live.command.err)
    yield live
    assert live.command.running(), live.command.err[start:][-5000:]
    live.works()
    told = live.log_since(start)
    assert not [s for s in live.secrets if s in told]
    assert "Traceback" not in told, told
    assert len(told) < (20_000 if request.cls else 2_000_000), told[:2000]


class Wiretap:
    """Stands between a client and the controller, and keeps what the client sends."""

    def __init__(self, host, port):
        self._target, self.upwards = (host, port), []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._threads = [threading.Thread(target=self._serve)]
        self._threads[0].start()

    def _serve(self):
        with contextlib.suppress(OSError):  # we are closed
            while True:
                near, far = self._listener.accept()[0], socket.create_connection(self._target, 5)
                for pair in ((near, far, self.upwards), (far, near, [])):
                    self._threads.append(threading.Thread(target=self._carry, args=pair))
                    self._threads[-1].start()

    @staticmethod
    def _carry(source, sink, kept):
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                kept.append(data)
                sink.sendall(data)
        for sock in (source, sink):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for thread in self._threads:
            thread.join(10)


class Test_strangers_on_tcp:
    def outcome(self, info, server=None, pair=None):
        """Dial, say a proper hello; what came of it."""
        with Raw(info["url"], info["server_key"] if server is None else server, pair) as raw:
            if raw.kept_out():
                return "kept out"
            answer = raw.hello(info)
            return "refused" if answer[0] == wire.REFUSED else "in"

    def test_the_right_keys_come_in(self, unharmed):
        for info in (unharmed.client, unharmed.eng):
            assert self.outcome(info, pair=(info["public_key"], info["secret_key"])) == "in"

    def test_without_encryption(self, unharmed):
        for info in (unharmed.client, unharmed.eng):
            assert self.outcome(info, server="") == "kept out"

    def test_with_keys_of_their_own(self, unharmed):
        for info in (unharmed.client, unharmed.eng):
            assert self.outcome(info) == "kept out"

    def test_with_the_keys_of_the_other_role(self, unharmed):
        for mine, other in itertools.permutations((unharmed.client, unharmed.eng)):
            assert self.outcome(mine, pair=(other["public_key"], other["secret_key"])) == "kept out"

    def test_expecting_another_server(self, unharmed):
        info = unharmed.client
        other = zmq.curve_keypair()[0].decode()
        assert self.outcome(info, server=other, pair=(info["public_key"], info["secret_key"])) == "kept out"

    def test_the_client_says_which_step_failed(self, unharmed):
        info = {**unharmed.client, "ipc": ""}
        public, secret = (k.decode() for k in zmq.curve_keypair())
        with pytest.raises(ipp.ConnectError, match="refused our key.*another cluster or of another role"):
            ipp.Client({**info, "public_key": public, "secret_key": secret}, timeout=5)
        with pytest.raises(ipp.ConnectError, match="broke off the handshake|refused our key"):
            ipp.Client({**info, "server_key": public}, timeout=5)

    @pytest.mark.parametrize("words", [
        b"GET / HTTP/1.1\r\n\r\n", b"\xff" + bytes(8) + b"\x7f", bytes(64), b"\xff" * 5000,
        b"\xff\0\0\0\0\0\0\0\1\x7f\3\0NULL" + bytes(48) + b"\2" + struct.pack(">Q", 1 << 62),
        b"\xff\0\0\0\0\0\0\0\1\x7f\3\0CURVE" + bytes(47) + b"\6" + struct.pack(">Q", 1 << 40),
    ])
    def test_bytes_of_no_protocol(self, unharmed, words):
        host, port = unharmed.client["url"][6:].split(":")
        before = psutil.Process(unharmed.command.pid).memory_info().rss
        for _ in range(20):
            with socket.create_connection((host, int(port)), 5) as sock:
                sock.sendall(words)
        assert psutil.Process(unharmed.command.pid).memory_info().rss < before + (30 << 20)

    def test_a_session_that_somebody_recorded(self, unharmed):
        """A wiretapper plays it again, whole and in pieces: nobody comes in, and nothing is run twice."""
        address = unharmed.client["url"][6:].split(":")
        told = len(unharmed.command.err)
        with Wiretap(address[0], int(address[1])) as tap:
            info = {**unharmed.client, "ipc": "", "url": f"tcp://127.0.0.1:{tap.port}", "location": ""}
            with ipp.Client(info, timeout=10) as rc:
                rc[0].execute("times = globals().get('times', 0) + 1", block=True)
            recorded = b"".join(tap.upwards)
        assert len(recorded) > 500 and b"times" not in recorded
        assert [s for s in unharmed.secrets if s.encode() in recorded] == []
        came = unharmed.command.err[told:].count("connected")
        for part in (recorded, recorded[64:], recorded * 2):
            with socket.create_connection((address[0], int(address[1])), 5) as sock:
                sock.sendall(part)
                sock.settimeout(5)
                with contextlib.suppress(OSError):  # it hangs up on us
                    while sock.recv(65536):
                        pass
        with unharmed.connect() as rc:
            assert rc[0].pull("times", block=True) == 1
        assert unharmed.command.err[told:].count("connected") == came + 1, "the last client alone"

    def test_a_flood_does_not_keep_members_out(self, unharmed):
        """Some open connections and say nothing, others shake hands with keys of their own, all the time."""
        host, port = unharmed.client["url"][6:].split(":")
        mute = [socket.create_connection((host, int(port)), 5) for _ in range(200)]
        over = threading.Event()

        def pester():
            while not over.is_set():
                with Raw(unharmed.client["url"], unharmed.client["server_key"]) as raw:
                    raw.kept_out(1)

        pests = [threading.Thread(target=pester) for _ in range(3)]
        for pest in pests:
            pest.start()
        try:
            with ipp.Client({**unharmed.client, "ipc": ""}, timeout=20) as rc:
                assert rc[0].map_sync(abs, range(-50, 0)) == list(range(50, 0, -1))
            eventually(lambda: re.search(r"refused somebody at \S*127.0.0.1, who has no key for the port of clients",
                                         unharmed.command.err), what="the log tells of it")
        finally:
            over.set()
            for pest in pests:
                pest.join()
            for sock in mute:
                sock.close()

    def test_many_who_connect_and_leave(self, unharmed):
        process = psutil.Process(unharmed.command.pid)
        with Raw(unharmed.client["url"], unharmed.client["server_key"]) as raw:
            assert raw.kept_out()
        before = process.num_fds()
        for _ in range(30):
            self.outcome(unharmed.client)
        eventually(lambda: process.num_fds() <= before + 2, what="its files are closed again")


class Test_half_admitted:
    """On a socket that one may reach, only the right hello counts."""

    def both(self, live, role):
        info = live.client if role == "client" else live.eng
        for tcp in (False, True):
            with Raw.member(info, tcp) as raw:
                yield info, raw

    @pytest.mark.parametrize("role", ["client", "engine"])
    @pytest.mark.parametrize("change,reason", [
        ({"token": "0" * 32}, "another cluster, run or role"), ({"token": None}, "another cluster"),
        ({"token": []}, "another cluster"),
        ({"token": "\ud800"}, "another cluster"), ({"token": "é"}, "another cluster"),
        ({"protocol": 99}, "protocol version 99"), ({"protocol": "1"}, "protocol version"),
        ({"role": "king"}, "this port is for"), ({"role": None}, "this port is for"), ({"role": ["client"]},
                                                                                       "this port is for"),
    ])
    def test_a_wrong_hello(self, unharmed, role, change, reason):
        for info, raw in self.both(unharmed, role):
            answer = raw.hello(info, **change)
            assert answer[0] == wire.REFUSED, answer
            assert len(answer) == 2 and reason in json.loads(answer[1])["reason"]
            raw.send(wire.encode_json(wire.QUERY, {"id": 1, "what": "queue_status", "targets": None}))
            assert raw.silent()

    @pytest.mark.parametrize("role,other", [("client", "engine"), ("engine", "client"), ("engine", "agent")])
    def test_the_other_roles_token(self, unharmed, role, other):
        infos = {"client": unharmed.client, "engine": unharmed.eng, "agent": unharmed.eng}
        wrong = infos["client" if other != "client" else "engine"]
        for _, raw in self.both(unharmed, role):
            claimed = other if other == "agent" else role
            assert raw.hello(wrong if other == "agent" else infos[other], role=claimed)[0] == wire.REFUSED

    def test_an_engine_file_does_not_make_a_client(self, unharmed):
        for info, raw in self.both(unharmed, "engine"):
            assert raw.hello(info, role="client")[0] == wire.REFUSED

    def test_without_a_hello(self, unharmed):
        for kind in sorted(wire.KINDS - {wire.HELLO, wire.PONG}):
            with Raw.member(unharmed.client) as raw:
                raw.send(wire.encode_json(kind, {"hub": True, "what": "shutdown", "targets": None, "id": 1}))
                raw.send([kind])
                assert raw.silent(0.05)

    def test_a_flood_is_one_line_in_the_log(self, unharmed):
        start = len(unharmed.command.err)
        with Raw.member(unharmed.client) as raw:
            for _ in range(500):
                raw.send([b"garbage", os.urandom(10)])
            for _ in range(500):
                assert raw.hello(unharmed.client, token="wrong")[0] == wire.REFUSED
        lines = unharmed.log_since(start).splitlines()
        assert 1 <= len(lines) <= 5, lines

    def test_a_second_hello_changes_nothing(self, unharmed):
        with Raw.member(unharmed.eng) as raw, unharmed.connect() as rc:
            uuids = [os.urandom(16).hex() for _ in range(2)]
            assert raw.hello(unharmed.eng, uuid=uuids[0])[0] == wire.WELCOME
            eventually(lambda: len(rc.ids) == 2)
            raw.send(wire.encode_json(wire.HELLO, {**hello_of(unharmed.eng), "uuid": uuids[1]}))
            raw.send(wire.encode_json(wire.BYE, {"reason": "enough"}))
            eventually(lambda: rc.ids == [0], what="every engine of that connection is gone")


# --- members who speak garbage

NASTY = [None, True, -1, 0, 1.5, 1e308, float("inf"), float("nan"), 2**63, 10**400, "", "x", "\ud800", "0" * 100_000,
         [], [[]], [None], {},
         {"a": {}}, [0], ["x", 1], [2**70]]


def bodies(proper):
    """A JSON object with each field in turn absent or of every wrong type."""
    for key in proper:
        yield {k: v for k, v in proper.items() if k != key}
        for value in NASTY:
            yield {**proper, key: value}


def texts(proper):
    yield from (json.dumps(body).encode() for body in bodies(proper))
    for levels in (300, 900, 940, 960, 975, 980, 985, 990, 1000, DEEP):
        for key in proper:
            yield json.dumps({**proper, key: "@"}).replace('"@"', "[" * levels + "]" * levels).encode()
            yield json.dumps({**proper, key: "@"}).replace('"@"', '{"a":' * levels + "1" + "}" * levels).encode()
    yield from (b"", b"null", b"[]", b"1", b"{", b"\xff\xfe", b"{}" * 9, b'{"a":1e9999}', b"9" * 10_000)


def client_messages(session):
    """Valid messages of a client of every kind."""
    spec = json.dumps({"op": "apply", "fn": "ab" * 16, "targets": None, "retries": 0}).encode()
    yield [wire.TASKS, *wire.encode_tasks(spec, session, [(5, 1, b"x"), (6, 1, [b"a", b"b" * 20_000])])]
    wide = json.dumps({"op": "apply", "targets": [0, 7]}).encode()
    yield [wire.TASKS, *wire.encode_tasks(wide, session, [(9, 2, b"x")])]
    yield [wire.FUNCTION, b"\xab" * 16, b"code", b"more"]
    yield [wire.FORGET, b"\xab" * 16]
    yield wire.encode_ids(wire.ABORT, session, [(5, 0), (6, 0)])
    yield wire.encode_json(wire.QUERY, {"id": 1, "what": "queue_status", "targets": [0]})
    yield wire.encode_json(wire.QUERY, {"id": 2, "what": "signal", "targets": [7], "signum": 0})
    yield wire.encode_json(wire.QUERY, {"id": 3, "what": "missed", "runs": [[5, 7], [9, 10]]})
    yield wire.encode_number(wire.PONG, 3)
    yield wire.encode_json(wire.RESUME, {})


def engine_messages(session, engine_id):
    results = [wire.Result(5, 1.0, 0.1, 1, wire.OK, b"x"),
               wire.Result(6, 1.0, 0.1, 1, wire.ERROR, [b"a", b"b" * 20_000])]
    yield [wire.RESULTS, *wire.encode_results(session, engine_id, results)]
    yield wire.encode_output(session, engine_id, [[5, "stdout", "hi"]])
    yield wire.encode_ids(wire.RETURNED, session, [(5, 1)])


def agent_messages(uuid):
    yield wire.encode_json(wire.EXITED, {"uuid": uuid, "cause": "c", "crashed": True, "running": ["ab" * 8, 1], "item": 3})
    yield [wire.PONG]


def mutants(message, chance):
    """Flip, cut, drop, double, swap and lengthen the frames of a message."""
    frames = [bytes(f) for f in message]
    at = chance.randrange(len(frames))
    frame = bytearray(frames[at])
    how = chance.randrange(7)
    if how == 0 and frame:
        frame[chance.randrange(len(frame))] ^= 1 << chance.randrange(8)
    elif how == 1:
        del frame[chance.randrange(len(frame) + 1):]
    elif how == 2:
        frame += os.urandom(chance.choice((1, 8, 15, 70_000)))
    frames[at] = bytes(frame)
    if how == 3:
        del frames[at]
    elif how == 4:
        frames.insert(at, frames[at])
    elif how == 5:
        chance.shuffle(frames)
    elif how == 6:
        frames += frames[1:]
    return frames or [b""]


class Member:
    """An admitted peer that dials again when it was thrown out, and reads what it is told."""

    def __init__(self, live, role):
        self.live, self.role = live, role
        self.info = live.client if role == "client" else live.eng
        self.raw = None
        self.join()

    def join(self):
        if self.raw:
            self.raw.close()
        self.raw = Raw.member(self.info)
        self.session, self.uuid = os.urandom(8), os.urandom(16).hex()
        answer = self.raw.hello(self.info, role=self.role, session=self.session.hex(), uuid=self.uuid)
        assert answer[0] == wire.WELCOME, answer
        self.id = json.loads(answer[1]).get("id")

    def messages(self):
        if self.role == "client":
            return list(client_messages(self.session))
        return list(engine_messages(self.session, self.id) if self.role == "engine" else agent_messages(self.uuid))

    def send(self, frames):
        self.raw.send(frames)
        while self.raw.sock.poll(0):
            self.raw.sock.recv_multipart()

    def close(self):
        self.raw.send(wire.encode_json(wire.BYE, {"reason": "done"}))
        self.raw.close()


@pytest.mark.parametrize("role", ["client", "engine", "agent"])
def test_mutated_messages(unharmed, role):
    chance = random.Random(f"mutants of {role}s")
    for _ in range(60):
        member = Member(unharmed, role)
        try:
            for _ in range(40):
                member.send(mutants(chance.choice(member.messages()), chance))
            assert unharmed.command.running(), unharmed.command.err
        finally:
            member.raw.close()
    unharmed.works()


@pytest.mark.parametrize("role", ["client", "engine", "agent"])
def test_random_frames(unharmed, role):
    chance = random.Random(f"noise of {role}s")
    member = Member(unharmed, role)
    kinds = sorted(wire.KINDS - {wire.BYE})
    for _ in range(3000):
        frames = [chance.choice([*kinds, b"", b"\x01", b"\x02T", bytes(2), bytes(70_000)])]
        frames += [bytes(chance.randrange(256) for _ in range(chance.choice((0, 1, 8, 12, 16,
                                                                             45)))) for _ in range(chance.randrange(5))]
        member.send(frames)
    member.close()
    assert unharmed.command.running(), unharmed.command.err


@pytest.mark.parametrize("role", ["client", "engine", "agent"])
def test_wrong_types_in_a_hello(unharmed, role):
    info = unharmed.client if role == "client" else unharmed.eng
    proper = {**hello_of(info), "role": role}
    proper.update({
        "client": {"resume": {"run": "x", "taken": 3, "next": 9, "pending": [[1, 3], [5, 6]], "done": [[3, 5]]}},
        "engine": {"holds": [["ab" * 8, 5, 1, 0], ["ab" * 8, 6, 2, 1]]}, "agent": {"engines": {"u": ["ab" * 8, 5], "v": None}}}[role])
    for tried in range(0, 1 << 20, 40):
        some = list(itertools.islice(texts(proper), tried, tried + 40))
        if not some:
            break
        with Raw.member(info) as raw:
            for text in some:
                raw.send([wire.HELLO, text])
            assert raw.hello(info, role=role)[0] in (wire.WELCOME, wire.REFUSED, wire.PING)
    assert unharmed.command.running(), unharmed.command.err


@pytest.mark.parametrize("what,more", [("queue_status", {"targets": [0]}), ("signal", {"targets": [5], "signum": 0}),
                                       ("shutdown", {"targets": [5], "hub": False})])
def test_wrong_types_in_a_query(unharmed, what, more):
    member = Member(unharmed, "client")
    for text in texts({"id": 1, "what": what, **more}):
        body = text.decode("latin-1").replace(" ", "")
        if what != "queue_status" and ('"targets":null' in body or '"targets":[0]' in body):
            continue  # proper orders to the engine that others use
        if what == "shutdown" and '"hub":false' not in body:
            continue  # or to the controller
        member.send([wire.QUERY, text])
    member.close()
    assert unharmed.command.running(), unharmed.command.err


def test_wrong_types_in_a_task(unharmed):
    needs = {"ids": ["ab" * 8 + "-1"], "all": True, "success": True, "failure": False}
    spec = {"op": "apply", "fn": "ab" * 16, "targets": [77], "retries": 0, "timeout": None, "after": None, "path": []}
    member = Member(unharmed, "client")
    numbers = itertools.count(1)
    for text in [*texts(spec), *(json.dumps({**spec, "after": body}).encode() for body in bodies(needs))]:
        if b'"targets": null' in text or b'"targets": [0]' in text:
            continue  # these would reach the engine that others use
        for fan_out in (0, 1, 2, 65535):
            member.send([wire.TASKS, *wire.encode_tasks(text, member.session, [(next(numbers), fan_out, b"x")])])
    for seq in (0, 2**63, 2**64 - 1):
        spec["targets"] = [77, 78, 79]
        member.send([wire.TASKS, *wire.encode_tasks(json.dumps(spec).encode(), member.session, [(seq, 3, b"x")])])
    member.close()
    assert unharmed.command.running(), unharmed.command.err


def test_wrong_types_in_an_exit(unharmed):
    agent = Member(unharmed, "agent")
    proper = {"uuid": "?", "cause": "c", "crashed": True, "running": ["ab" * 8, 1], "item": 3}
    runnings = [["zz", 1], ["ab", "x"], ["ab", None], ["ab", 1e400], {}, {"0": 1}, [[], 1], "ab", 5, ["ab"], [1, 1]]
    for extra in [*texts(proper), *(json.dumps({**proper, "running": r}).encode() for r in runnings)]:
        with Raw.member(unharmed.eng) as engine:
            uuid = os.urandom(16).hex()
            engine.hello(unharmed.eng, uuid=uuid, agent=agent.uuid)
            agent.send([wire.EXITED, extra.replace(b'"?"', json.dumps(uuid).encode())])
            engine.send(wire.encode_json(wire.BYE, {}))
    agent.close()
    assert unharmed.command.running(), unharmed.command.err


# --- a controller that is not what it seems


class Impostor:
    """Listens where a client's connection file says, welcomes it, and then says what a test has it say."""

    WELCOME = {"run_id": "x", "cluster_id": "", "version": "9", "ping_s": 2, "silence_s": 6, "max_task_bytes": 1 << 30,
               "pid": 1, "host": "h", "engines": [{"id": 0, "uuid": "u", "host": "h", "pid": 1, "agent": "a"}]}

    def __init__(self, folder, welcome=None):
        self.context = zmq.Context()
        self.sock = self.context.socket(zmq.ROUTER)
        self.path = f"{folder}/s"
        self.sock.bind(f"ipc://{self.path}")
        self.welcome = welcome or self.WELCOME
        self.info = {"program": "ipclite", "role": "client", "url": "", "ipc": self.path, "ssh": "", "location": "h",
                     "public_key": "p",
                     "secret_key": "s", "server_key": "", "cluster_id": "", "run_id": "x", "protocol": wire.VERSION,
                     "version": "9",
                     "pid": os.getpid(), "host": socket.gethostname(), "reuse": False}
        self.route = b""

    def greet(self, message=None):
        """Answer one hello, in a thread of its own."""
        def answer():
            self.route = self.sock.recv_multipart()[0]
            self.say(message or wire.encode_json(wire.WELCOME, self.welcome))

        thread = threading.Thread(target=answer)
        thread.start()
        return thread

    def say(self, frames):
        self.sock.send_multipart([self.route, *map(bytes, frames)])

    def close(self):
        self.sock.close(0)
        self.context.term()
        Path(self.path).unlink()


@pytest.fixture
def impostor(ipython_dir):
    found = Impostor(ipython_dir)
    yield found
    found.close()


WELCOME_RUBBISH = [
    [wire.WELCOME],
    [wire.WELCOME, b"{}"],
    [wire.WELCOME, b"[]"],
    [wire.WELCOME, b"\xff"],
    [b"HTTP/1.1 200 OK"],
    [wire.PING],
    [wire.REFUSED, b"{}"],
    [wire.REFUSED, b"x"],
    [b""],
    [wire.WELCOME, b'{"max_task_bytes":"x","silence_s":[],"engines":5}'],
    [wire.WELCOME, b'{"max_task_bytes":1,"silence_s":6,"cluster_id":"","engines":[5]}'],
    [wire.WELCOME, b'{"max_task_bytes":1,"silence_s":6,"cluster_id":"","engines":[{"id":"x"}]}'],
]


@pytest.mark.parametrize("rubbish", WELCOME_RUBBISH)
def test_a_client_reports_a_welcome_that_is_none(impostor, rubbish):
    thread = impostor.greet(rubbish)
    with pytest.raises(ipp.ConnectError) as caught:
        ipp.Client(impostor.info, timeout=5)
    thread.join()
    assert "controller" in str(caught.value) or "does not speak this protocol" in str(caught.value)


def rubbish_for_clients(session):
    good = wire.encode_results(session, 0, [wire.Result(1, 1.0, 0.1, 1, wire.OK, b"x")])
    yield from (
        [wire.RESULTS],
        [wire.RESULTS, b""],
        [wire.RESULTS, b"x" * 40, b""],
        [wire.RESULTS, bytes(good[0])[:-1], *good[1:]],
        [wire.OUTPUT],
        wire.encode_output(session, 0, 5),
        wire.encode_output(session, 0, [5]),
        wire.encode_output(session, 0, [[1, "stdout"]]),
        wire.encode_output(session, 0, [[[], "stdout", "x"]]),
        wire.encode_output(session, 0, [[1, "nowhere", "x"]]),
        wire.encode_output(session, 0, [[1, "stdout", 5]]),
        [wire.ENGINES],
        [wire.ENGINES, b"[]"],
        [wire.ENGINES, b'{"joined":5}'],
        [wire.ENGINES, b'{"joined":[5]}'],
        [wire.ENGINES, b'{"joined":[{"id":{}}]}'],
        [wire.ENGINES, b'{"left":["x"]}'],
        [wire.ENGINES, b'{"left":5}'],
        [wire.REPLY],
        [wire.REPLY, b'{"id":[]}'],
        [wire.BYE],
        [wire.BYE, b"{"],
        [wire.REFUSED],
        [wire.BYE, b"[" * 5000],
        [wire.REPLY, b"[" * DEEP],
    )


def test_a_client_reports_rubbish_and_does_not_hang(ipython_dir):
    for i in range(len(list(rubbish_for_clients(bytes(8))))):
        impostor = Impostor(ipython_dir)
        try:
            thread = impostor.greet()
            rc = ipp.Client(impostor.info, timeout=5)
            thread.join()
            task = rc[0].apply_async(abs, -1)
            message = list(rubbish_for_clients(rc.session))[i]
            impostor.say(message)
            impostor.say(wire.encode_json(wire.BYE, {"reason": "that was all"}))
            with pytest.raises(ipp.ControllerLost) as caught:
                task.get(5)
            harmless = message in ([wire.RESULTS], [wire.REPLY, b'{"id":[]}'])
            assert ("that was all" if harmless else "malformed") in str(caught.value), (message, caught.value)
            rc.close()
        finally:
            impostor.close()


RUBBISH_FOR_HOSTS = [
    [wire.CONTROL], [wire.CONTROL, b"{}"], [wire.CONTROL, b"x"], [wire.CONTROL, b"[" * DEEP], [wire.BYE, b"x"],
    [wire.TASKS, b"x"], [wire.FUNCTION], [wire.FORGET], [b""], [b"nothing"], [wire.REFUSED, b"x"],
]


def test_engines_report_rubbish_and_go_on(ipython_dir):
    """Their agent, too; a controller that says goodbye in the end is obeyed."""
    impostor = Impostor(ipython_dir, {**Impostor.WELCOME, "id": 0})
    path = ipython_dir / "engine.json"
    path.write_text(json.dumps({**impostor.info, "role": "engine"}))
    path.chmod(0o600)
    try:
        with Command("engine", f"--file={path}") as command:
            routes, uuids = {}, {}
            while len(routes) < 2:
                assert impostor.sock.poll(20_000), command.err
                impostor.route, hello = impostor.sock.recv_multipart()[0::2]
                body = json.loads(hello)
                routes[body["role"]], uuids[body["role"]] = impostor.route, body["uuid"]
                impostor.say(wire.encode_json(wire.WELCOME, impostor.welcome))
            orders = [wire.encode_json(wire.CONTROL, {"uuid": uuids["engine"], **order}) for order in (
                {}, {"op": "signal"}, {"op": "signal", "signum": 10_000}, {"op": "signal", "signum": "x"},
                {"op": "interrupt"}, {"op": "interrupt", "tasks": [[1]]}, {"op": []}, {"op": "recall"})]
            for route in routes.values():
                impostor.route = route
                for message in RUBBISH_FOR_HOSTS + (orders if route == routes["agent"] else []):
                    impostor.say(message)
            command.says("dropped a malformed message")
            impostor.route = routes["agent"]
            impostor.say(wire.encode_json(wire.BYE, {"reason": "that was all"}))
            assert command.wait() == 0
            log = "".join(p.read_text() for p in ipython_dir.glob("*/log/*.log"))
            assert "the controller ended: that was all" in command.err
            assert "dropped a malformed message" in log and "Traceback" not in log + command.err
    finally:
        impostor.close()


def test_an_engine_reports_a_welcome_that_is_none(ipython_dir):
    impostor = Impostor(ipython_dir, {**Impostor.WELCOME, "id": "x"})
    path = ipython_dir / "engine.json"
    path.write_text(json.dumps({**impostor.info, "role": "engine"}))
    path.chmod(0o600)
    try:
        with Command("engine", f"--file={path}") as command:
            for _ in range(2):
                assert impostor.sock.poll(20_000), command.err
                impostor.route = impostor.sock.recv_multipart()[0]
                impostor.say(wire.encode_json(wire.WELCOME, impostor.welcome))
            command.wait()
            log = "".join(p.read_text() for p in ipython_dir.glob("*/log/*.log"))
            assert "sent a welcome that is malformed (id)" in log and "Traceback" not in log + command.err
    finally:
        impostor.close()


def test_a_result_that_is_garbage_fails_its_task_alone(impostor):
    thread = impostor.greet()
    rc = ipp.Client(impostor.info, timeout=5)
    thread.join()
    tasks = [rc[0].apply_async(abs, -i) for i in range(6)]
    payloads = [b"", b"\x80garbage", [b"a", b"b"], b"\x00" * 9, b"cos\nsystem\n", b"\xff\xff\xff\xff"]
    for i, (payload, status) in enumerate(zip(payloads, (wire.OK, wire.OK, wire.OK, wire.ERROR, wire.ERROR,
                                                         wire.ERROR))):
        impostor.say([wire.RESULTS, *wire.encode_results(rc.session, 0, [wire.Result(i + 1, 1.0, 0.1, 1, status,
                                                                                     payload)])])
    for task in tasks:
        with pytest.raises(ipp.IPythonError):
            task.get(5)
    rc.close()


# --- files and processes


def mode(path):
    return stat.S_IMODE(os.lstat(path).st_mode)


def test_file_modes(ipython_dir):
    """Under a umask that forbids nothing."""
    old = os.umask(0)
    try:
        shutil.rmtree(ipython_dir)
        with ipp.Cluster(n=1, cluster_id="m", controller_args=["--log-to-file"]) as rc:
            folder = security(ipython_dir)
            assert mode(folder) == 0o700
            for role in ("client", "engine"):
                assert mode(folder / f"ipcontroller-m-{role}.json") == 0o600
            runtime = ipython_dir.parent / "run"
            assert mode(runtime) == 0o700
            sockets = Path(connection(ipython_dir, cluster_id="m")["ipc"])
            assert mode(sockets.parent) == 0o700 and stat.S_ISSOCK(sockets.lstat().st_mode)
            assert rc[:].apply_sync(abs, -1) == [1]
            found = [ipython_dir, *ipython_dir.rglob("*")]
            assert [path for path in found if mode(path) & 0o022] == []
            logs = list(ipython_dir.glob("*/log/*.log"))
            assert len(logs) >= 3 and {mode(path) for path in logs} == {0o600}
    finally:
        os.umask(old)


def test_secrets_are_in_the_connection_files_only(ipython_dir):
    with Command("cluster", "start", "-n", "2", "--debug", "--ip=127.0.0.1") as cluster:
        cluster.says("engines are ready")
        secrets = {connection(ipython_dir, role)["secret_key"] for role in ("client", "engine")}
        secrets |= {net.token(secret) for secret in secrets}
        assert len(secrets) == 4
        family = [psutil.Process(cluster.pid), *psutil.Process(cluster.pid).children(recursive=True)]
        assert len(family) == 5
        for process in family:
            for name in ("cmdline", "environ"):
                text = Path(f"/proc/{process.pid}/{name}").read_bytes().decode(errors="replace")
                assert not [s for s in secrets if s in text], (process, name)
        connections = {security(ipython_dir) / f"ipcontroller-{role}.json" for role in ("client", "engine")}
        others = [p for p in ipython_dir.rglob("*") if p.is_file() and p not in connections]
        assert {p.name for p in others} >= {"cluster-.json"} and len(others) >= 5
        for path in others:
            assert not [s for s in secrets if s in path.read_text(errors="replace")], path
        assert not [s for s in secrets if s in cluster.out + cluster.err]


def test_a_local_cluster_opens_no_port(ipython_dir):
    before = set(psutil.Process().children(recursive=True))
    with ipp.Cluster(n=2) as rc:
        assert rc[:].apply_sync(abs, -1) == [1, 1]
        ours = set(psutil.Process().children(recursive=True)) - before
        assert len(ours) == 4
        for process in ours:
            assert process.net_connections("inet") == [], process
        assert connection(ipython_dir, cluster_id=rc.cluster_id)["url"] == ""


OUTSIDER = """
import json, os, socket, sys
os.setgid(65534)
os.setuid(65534)
for reach, paths in zip((socket.socket(socket.AF_UNIX).connect, open), map(json.loads, sys.argv[1:])):
    for path in paths:
        try:
            reach(path)
            print("reached", path)
        except PermissionError:
            print("no")
"""


def test_another_user_does_not_reach_the_sockets(ipython_dir):
    if os.getuid() != 0:
        pytest.skip("only root can play somebody else")
    ipython_dir.parent.chmod(0o755)
    with ipp.Cluster(n=1) as rc:
        paths = [connection(ipython_dir, role, rc.cluster_id)["ipc"] for role in ("client", "engine")]
        files = [str(p) for p in security(ipython_dir).glob("*.json")]
        command = run(code=["-c", OUTSIDER, json.dumps(paths), json.dumps(files)])
        assert command.out.split() == ["no"] * (len(paths) + len(files)) and len(files) == 3, command.out + command.err
        assert rc[:].apply_sync(abs, -1) == [1]


WITHOUT_CURVE = ("import sys, zmq; real = zmq.has; zmq.has = lambda what: what != 'curve' and real(what); "
                 "from ipclite.controller import main; sys.exit(main(sys.argv[1:]))")


@pytest.mark.parametrize("ip", ["*", "0.0.0.0", "::"])
def test_without_encryption_the_controller_stays_on_this_host(ipython_dir, ip):
    command = run(code=["-c", WITHOUT_CURVE, f"--ip={ip}"])
    one_sentence(command, 2, "no CURVE encryption", "--ip=127.0.0.1 with ssh tunnels")
    assert list(security(ipython_dir).iterdir()) == []


def test_without_encryption_loopback_still_asks_for_the_token(ipython_dir):
    with Command(code=["-c", WITHOUT_CURVE, *TCP]) as command:
        command.says("controller started")
        info = connection(ipython_dir)
        assert info["server_key"] == ""
        with Raw(info["url"]) as raw:
            assert raw.hello(info, token="0" * 32)[0] == wire.REFUSED
        with Raw(info["url"]) as raw:
            assert raw.hello(info)[0] == wire.WELCOME


def test_a_controller_that_fails_leaves_no_file(ipython_dir):
    one_sentence(run("controller", "--ip=203.0.113.7"), 2, "203.0.113.7", "--ip")
    assert list(security(ipython_dir).iterdir()) == []
    assert list(ipython_dir.parent.glob("run/*")) == []
