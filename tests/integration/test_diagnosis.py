"""Each way in which an engine or a client can fail to connect: the step, the address and the remedy, in one sentence."""

from __future__ import annotations

import json
import shutil
import socket
import threading

import pytest
import zmq
from shell import connection, controller, one_sentence, run, security

import ipclite as ipp
from ipclite import wire

KEY, SECRET = (key.decode() for key in zmq.curve_keypair())


@pytest.fixture
def fails(ipython_dir, tmp_path):
    """A function that has a client and an engine connect with a changed connection file, and checks what they say."""
    def check(*hints, client=True, **changes):
        said = []
        for role in ("client", "engine"):
            info = {**json.loads((security(ipython_dir) / f"ipcontroller-{role}.json").read_text()), **changes}
            path = tmp_path / f"{role}.json"
            path.write_text(json.dumps(info))
            path.chmod(0o600)
            if role == "client":
                with pytest.raises(ipp.IPythonError) as caught:
                    ipp.Client(path, timeout=1)
                said.append(str(caught.value))
            else:
                said.append(one_sentence(run("engine", f"--file={path}", "--timeout=1"), 1))
        for text in said:
            assert "\n" not in text and len(text) < 600, text
            for hint in hints:
                assert hint in text, (hint, text)
    return check


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return sock.getsockname()[1]


def test_steps_to_a_controller(ipython_dir, fails):
    with controller(ipython_dir, "--transport=tcp"):
        url = connection(ipython_dir)["url"]
        far = {"host": "elsewhere", "location": ""}
        fails("'no.such.host.invalid' can not be looked up", "location", "--location", url="tcp://no.such.host.invalid:9", **far)
        fails("tcp://host:port", "'nonsense'", url="nonsense")
        fails("tcp://host:port", url="tcp://127.0.0.1:123456")
        port = free_port()
        fails(f"tcp://127.0.0.1:{port} refused the connection", "copy the connection file", url=f"tcp://127.0.0.1:{port}")
        fails("listens on that host only", f"tcp://127.0.0.1:{port}", "--ip=*", "--ssh=elsewhere",
              url=f"tcp://127.0.0.1:{port}", **far)
        fails("listens on that host only", "--ip=*", "--ssh=elsewhere", url="", **far)
        fails("refused our key", "another cluster or of another role", public_key=KEY, secret_key=SECRET)
        fails("broke off the handshake", "copy the file again", server_key=KEY)
        fails("of a controller with a newer protocol", "ipclite 9.9", "install the same version", protocol=wire.VERSION + 1,
              version="9.9")
        fails("of a run that has ended", f"pid {2 ** 22 + 1}", pid=2 ** 22 + 1)
        fails("lacks run_id", "restart the controller", run_id=None)
        fails("of another program", program="other")
        shutil.copy(security(ipython_dir) / "ipcontroller-engine.json", ipython_dir / "e.json")
        with pytest.raises(ipp.ConnectionFileError, match=r"for the role of engine, not client.*ends in -client.json"):
            ipp.Client(ipython_dir / "e.json", timeout=1)
        assert url


def test_somebody_who_never_answers(ipython_dir, fails):
    with controller(ipython_dir, "--transport=tcp"), socket.create_server(("127.0.0.1", 0)) as mute:
        port = mute.getsockname()[1]
        fails(f"connected to tcp://127.0.0.1:{port}", "no controller answered there", url=f"tcp://127.0.0.1:{port}")


def test_something_else_that_answers(ipython_dir, fails):
    """A web server, say."""
    with controller(ipython_dir, "--transport=tcp"), socket.create_server(("127.0.0.1", 0)) as web:
        over = threading.Event()

        def serve():
            web.settimeout(0.1)
            while not over.is_set():
                try:
                    with web.accept()[0] as sock:
                        sock.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n" + bytes(100))
                except OSError:
                    continue

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            address = f"tcp://127.0.0.1:{web.getsockname()[1]}"
            fails(f"{address} broke off the handshake", "something else listens there", url=address)
        finally:
            over.set()
            thread.join()


def test_no_file_at_all(ipython_dir):
    """Who has named no cluster is told which there are, and how to get one."""
    with pytest.raises(ipp.ConnectionFileError, match="There is no file .*ipcontroller-client.json; is the controller running.*"
                                                          "`ipcluster start` starts one"):
        ipp.Client(timeout=0.1)
    with controller(ipython_dir, "--cluster-id=a"):
        connection(ipython_dir, cluster_id="a")
        with pytest.raises(ipp.ConnectionFileError, match=r"There are files of --cluster-id=a \(cluster_id=\)"):
            ipp.Client(timeout=0.1)
        one_sentence(run("engine", "--timeout=0.2"), 1, "waited 0.2 s for a controller", "--cluster-id=a")
    for words in (("status",), ("logs", "0"), ("engines", "-n", "1")):
        one_sentence(run("cluster", *words), 1 if words[0] == "engines" else 12, "ipcontroller-client.json")
