"""ssh tunnels through real sshd, and hosts of their own in network namespaces."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import select
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from networks import SBIN, Hosts, an_sshd, free_port, needs_sshd
from shell import ROOT, Command, Raw, connection, controller, run, security
from support import command_line, eventually, need, our_processes
from tasks import hold, report_and_hold

import ipclite as ipp
from ipclite import net, ssh, tunnel, wire
from ipclite.errors import ConnectError, TunnelError

SECRET = "correct horse"


@pytest.fixture(scope="module")
def sshd(_mark):
    """Two ssh servers that take a key."""
    with an_sshd() as server:
        yield server


@pytest.fixture
def home(sshd, tmp_path, monkeypatch):
    """A home directory whose ~/.ssh knows the two servers, and calls them node1 and node2."""
    (tmp_path / ".ssh").mkdir(mode=0o700)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)
    (tmp_path / ".ssh/known_hosts").write_text(sshd.known)
    configure(tmp_path, f"Host node1\n  HostName 127.0.0.1\nHost node2\n  HostName 127.0.0.2\n"
                        f"Host *\n  Port {sshd.port}\n  IdentityFile {sshd.key}\n")
    return tmp_path


def configure(home, text):
    (home / ".ssh/config").write_text(text)


@contextlib.contextmanager
def tcp_controller(ipython_dir, *flags, **options):
    """A controller that can't be reached by a socket file."""
    with controller(ipython_dir, "--transport=tcp", *flags, **options) as command:
        yield command


def nobody(port=None):
    """A connection file's content; nobody listens at its port."""
    keys, server = net.make_keys(), net.make_keys()
    return {"program": "ipclite", "role": "client", "url": f"tcp://127.0.0.1:{port or free_port()}", "ipc": "",
            "ssh": "", "location": "elsewhere", "public_key": keys.public,
            "secret_key": keys.secret, "server_key": server.public,
            "cluster_id": "", "run_id": "0", "protocol": wire.VERSION, "version": "", "pid": 1, "host": "elsewhere",
            "reuse": False}


def tunnel_processes():
    return {pid: p for pid, p in our_processes().items() if f"{ipp.__name__}.tunnel" in command_line(p)}


def refused(kind=TunnelError, *words, info=None, **options):
    """The sentence with which a client is told that there is no tunnel."""
    with pytest.raises(kind) as caught:
        ipp.Client(info or nobody(), **options)
    text = str(caught.value)
    for word in words:
        assert word in text, (word, text)
    assert "\n" not in text and len(text) < 700, text
    eventually(lambda: not tunnel_processes(), 10, "its process ended")
    return text


# --- what works


def test_client_and_engines_meet_through_ssh(ipython_dir, home, sshd):
    before = sshd.logins(), sshd.logins("127.0.0.2")
    with tcp_controller(ipython_dir), Command("engine", "-n", "3", "--ssh=node1"):
        with ipp.Client(sshserver=f"root@127.0.0.2:{sshd.port}", sshkey=sshd.key) as rc:
            rc.wait_for_engines(3, timeout=30)
            assert sorted(rc[:].apply_sync(os.getppid)) == [rc[0].apply_sync(os.getppid)] * 3
            assert "through ssh to root@127.0.0.2" in rc._connection.address
            assert (sshd.logins() - before[0], sshd.logins("127.0.0.2") - before[1]) == (1, 1)
            assert len(tunnel_processes()) == 2


def test_paramiko_is_a_keyword(ipython_dir, home):
    with tcp_controller(ipython_dir):
        with ipp.Client(sshserver="node1", paramiko=True) as rc:
            assert rc.ids == []
        with pytest.warns(DeprecationWarning, match="paramiko=False has no effect"), \
                ipp.Client(sshserver="node1", paramiko=False) as rc:
            assert rc.ids == []


def test_controller_writes_ssh_into_the_files(ipython_dir, home, sshd):
    with tcp_controller(ipython_dir, "--ssh=node2", "--enginessh=node1"), Command("engine"):
        assert connection(ipython_dir)["ssh"] == "node2"
        assert connection(ipython_dir, "engine")["ssh"] == "node1"
        with ipp.Client() as rc:
            rc.wait_for_engines(1, timeout=30)
            assert rc[0].apply_sync(abs, -1) == 1
            assert len(tunnel_processes()) == 2


@pytest.mark.keeps_files
def test_ssh_written_into_the_file_by_hand_is_used_and_outlives_a_restart(ipython_dir, home):
    with tcp_controller(ipython_dir, "--reuse"):
        path = security(ipython_dir) / "ipcontroller-client.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "ssh": "node2"}))
        with ipp.Client() as rc:
            assert rc._connection.address.endswith("through ssh to node2")
    with tcp_controller(ipython_dir, "--reuse"), ipp.Client() as rc:
        assert rc._connection.address.endswith("through ssh to node2")


def test_on_the_controllers_host_the_socket_is_preferred(ipython_dir, home):
    with controller(ipython_dir, "--ssh=node2"), ipp.Client() as rc:
        assert rc._connection.address.startswith("ipc://")
        assert not tunnel_processes()


def test_a_controller_without_a_port_is_reached_at_its_socket(ipython_dir, home, sshd):
    """As `ipcluster start` makes it: somebody on another host has its file and ssh."""
    before = sshd.logins(), sshd.logins("127.0.0.2")
    with controller(ipython_dir, "--transport=ipc"), Command("engine", "-n", "2", "--ssh=node1"):
        assert connection(ipython_dir)["url"] == ""
        with ipp.Client(sshserver="node2") as rc:
            rc.wait_for_engines(2, timeout=30)
            data = os.urandom(4 << 20)
            assert rc[:].apply_sync(len, data) == [4 << 20] * 2 and rc[0].apply_sync(bytes, data) == data
            assert f"{connection(ipython_dir)['ipc']} through ssh to node2" in rc._connection.address
            assert (sshd.logins() - before[0], sshd.logins("127.0.0.2") - before[1]) == (1, 1)
        path = security(ipython_dir) / "ipcontroller-client.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "ssh": "node1"}))
        done = run("doctor", "--json")
        assert "steps failed" not in done.out and done.process.returncode == 0, done.out


def test_a_socket_that_is_not_at_the_far_end(home):
    info = {**nobody(), "url": "", "ipc": "/nowhere/client"}
    refused(ConnectError, "can't reach /nowhere/client", "(elsewhere)", "--ip=*", sshserver="node1", info=info)
    refused(ConnectError, "--ssh=elsewhere", "--ip=*", info=info)


def test_proxy_jump_leads_through_both(ipython_dir, home, sshd):
    configure(home, "Host far\n  HostName 127.0.0.2\n  ProxyJump near\nHost near\n  HostName 127.0.0.1\n"
                    "Include more\n")
    (home / ".ssh/more").write_text(f"Host *\n  User root\n  Port {sshd.port}\n  IdentityFile {sshd.key}\n")
    before = sshd.logins(), sshd.logins("127.0.0.2")
    with tcp_controller(ipython_dir), ipp.Client(sshserver="far") as rc:
        assert rc.ids == []
        assert (sshd.logins() - before[0], sshd.logins("127.0.0.2") - before[1]) == (1, 1)


def test_large_data_arrive_whole(ipython_dir, home):
    data = os.urandom(8 << 20)
    with tcp_controller(ipython_dir), Command("engine"), ipp.Client(sshserver="node1") as rc:
        rc.wait_for_engines(1, timeout=30)
        assert rc[0].apply_sync(bytes, data) == data


def test_close_delivers_what_was_sent(ipython_dir, home, tmp_path):
    with tcp_controller(ipython_dir), Command("engine"):
        with ipp.Client(sshserver="node1") as rc:
            rc.wait_for_engines(1, timeout=30)
            rc[0].apply_async(lambda data, path: open(path, "w").write(str(len(data))), bytes(4 << 20),
                              str(tmp_path / "told"))
        eventually(lambda: (tmp_path / "told").exists() and (tmp_path / "told").read_text() == str(4 << 20))


def test_another_user_can_not_reach_the_socket(ipython_dir, home):
    with tcp_controller(ipython_dir), ipp.Client(sshserver="node1") as rc:
        path = Path(rc._tunnel.path)
        assert path.is_socket() and path.parent.stat().st_mode & 0o077 == 0
    assert not path.exists()


# --- keys and passwords


def new_key(path, passphrase=""):
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", passphrase, "-f", str(path)], check=True)
    return path


@pytest.fixture
def locked_key(sshd, home):
    """A key with a passphrase that the servers know; no other is listed."""
    path = new_key(home / "locked", SECRET)
    known = sshd.state / "authorized_keys"
    before = known.read_text()
    known.write_text(before + (home / "locked.pub").read_text())
    configure(home, f"Host *\n  Port {sshd.port}\n  User root\n")
    yield path
    known.write_text(before)


def test_locked_key_without_a_terminal(locked_key):
    refused(TunnelError, "did not let us in", "publickey", "it is locked", "--sshkey", "ssh-add",
            sshserver="127.0.0.1", sshkey=str(locked_key))


def test_locked_key_with_its_passphrase(ipython_dir, locked_key):
    with tcp_controller(ipython_dir), ipp.Client(sshserver="127.0.0.1", sshkey=str(locked_key), password=SECRET) as rc:
        assert rc.ids == []


def test_key_of_the_agent(ipython_dir, locked_key, home, sshd, monkeypatch):
    need(shutil.which("ssh-agent"), "ssh-agent")
    sock = home / "agent"
    with subprocess.Popen(["ssh-agent", "-D", "-a", str(sock)], stdout=subprocess.DEVNULL) as agent:
        try:
            eventually(sock.exists, 10, "the agent listens")
            monkeypatch.setenv("SSH_AUTH_SOCK", str(sock))
            subprocess.run(["ssh-add", "-q", sshd.key], check=True, stderr=subprocess.DEVNULL)
            with tcp_controller(ipython_dir), ipp.Client(sshserver="127.0.0.1") as rc:
                assert rc.ids == []
        finally:
            agent.terminate()


def on_a_terminal(code, *answers):
    """What a script prints on a terminal where each (prompt, answer) is typed."""
    pid, fd = pty.fork()
    if not pid:
        os.environ["PYTHONPATH"] = str(ROOT)
        os.execv(sys.executable, [sys.executable, "-c", code])
    said, seen = b"", 0
    pending = list(answers)
    with contextlib.suppress(OSError):  # how the end of a terminal's other side shows on Linux
        while select.select([fd], [], [], 30)[0]:
            said += os.read(fd, 4096)
            if pending and pending[0][0].encode() in said[seen:]:
                seen = len(said)
                os.write(fd, pending.pop(0)[1].encode() + b"\n")
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    os.close(fd)
    os.waitpid(pid, 0)
    assert not pending, said
    return said.decode()


def test_passphrase_is_asked_for_on_a_terminal(ipython_dir, locked_key):
    with tcp_controller(ipython_dir):
        said = on_a_terminal(f"import ipclite; rc = ipclite.Client(sshserver='127.0.0.1', sshkey={str(locked_key)!r}); "
                             "print('in', rc.ids)",
                             ("Passphrase of the key", "wrong"), ("Passphrase of the key", SECRET))
    assert "in []" in said and SECRET not in said


@pytest.fixture
def password_sshd(home):
    """A server at which root has the password SECRET, and keys do not count."""
    needs_sshd()
    need(os.geteuid() == 0, "root")
    crypted = subprocess.run(["openssl", "passwd", "-6", "-stdin"], input=SECRET, text=True, capture_output=True)
    need(crypted.returncode == 0, "openssl")
    with an_sshd(hosts=("127.0.0.1",), shadow=f"root:{crypted.stdout.strip()}:19000:0:99999:7:::\n",
                 options="PasswordAuthentication yes\nPermitRootLogin yes\nPubkeyAuthentication no") as server:
        (home / ".ssh/known_hosts").write_text(server.known)
        configure(home, f"Host *\n  Port {server.port}\n  User root\n")
        yield server


def test_password(ipython_dir, password_sshd):
    with tcp_controller(ipython_dir), ipp.Client(sshserver="127.0.0.1", password=SECRET) as rc:
        assert rc.ids == []
        for process in our_processes().values():
            assert SECRET not in " ".join(process.cmdline()) and SECRET not in str(process.environ())
    refused(TunnelError, "password", "the given password", "terminal", sshserver="127.0.0.1", password="wrong")


def test_password_is_asked_for_on_a_terminal(ipython_dir, password_sshd):
    with tcp_controller(ipython_dir):
        said = on_a_terminal("import ipclite; rc = ipclite.Client(sshserver='127.0.0.1'); print('in', rc.ids)",
                             ("Password of root@127.0.0.1", "wrong"), ("Password of root@127.0.0.1", SECRET))
    assert "in []" in said and SECRET not in said


# --- whom we trust


def test_unknown_server_is_refused(ipython_dir, home, sshd):
    (home / ".ssh/known_hosts").write_text("")
    printed = subprocess.run(["ssh-keygen", "-lf", str(sshd.state / "key.127.0.0.1.pub")], capture_output=True,
                             text=True)
    text = refused(TunnelError, "not known here", printed.stdout.split()[1], "ssh-keygen -lf", sshserver="node1")
    command = text.rpartition("accept it with: ")[2]
    subprocess.run(command, shell=True, check=True, stderr=subprocess.DEVNULL)
    with tcp_controller(ipython_dir), ipp.Client(sshserver="node1") as rc:
        assert rc.ids == []


def test_changed_key_is_refused(home, sshd):
    new_key(home / "other")
    kind, key = (home / "other.pub").read_text().split()[:2]
    (home / ".ssh/known_hosts").write_text(f"[127.0.0.1]:{sshd.port} {kind} {key}\n")
    text = refused(TunnelError, "HAS CHANGED", "ssh-keygen -R", sshserver="node1")
    subprocess.run(text.rpartition("with: ")[2], shell=True, check=True, capture_output=True)
    assert key not in (home / ".ssh/known_hosts").read_text()
    configure(home, (home / ".ssh/config").read_text() + "  StrictHostKeyChecking no\n")
    (home / ".ssh/known_hosts").write_text(f"[127.0.0.1]:{sshd.port} {kind} {key}\n")
    refused(TunnelError, "HAS CHANGED", sshserver="node1")


def test_revoked_key_is_refused(home, sshd):
    known = (home / ".ssh/known_hosts").read_text()
    (home / ".ssh/known_hosts").write_text(known + "@revoked " + known.splitlines()[0] + "\n")
    refused(TunnelError, "@revoked", sshserver="node1")


def test_hashed_known_hosts_count(ipython_dir, home):
    subprocess.run(["ssh-keygen", "-q", "-H", "-f", str(home / ".ssh/known_hosts")], check=True, capture_output=True)
    assert "127.0.0.1" not in (home / ".ssh/known_hosts").read_text()
    with tcp_controller(ipython_dir), ipp.Client(sshserver="node1") as rc:
        assert rc.ids == []


# --- what goes wrong is named


def test_name_that_is_none(home):
    refused(TunnelError, "not the name of an ssh server", "~/.ssh/config", sshserver="root@127.0.0.1:port")


def test_server_that_does_not_resolve(home):
    refused(TunnelError, "'no-such-host.invalid' can't be looked up", "~/.ssh/config", sshserver="no-such-host.invalid")


def test_no_server_there(home):
    port = free_port()
    refused(TunnelError, f"127.0.0.1:{port} refused", "sshd", sshserver=f"127.0.0.1:{port}")


def test_something_else_there(home):
    with socket.create_server(("127.0.0.1", 0)) as sock:
        threading.Thread(target=lambda: sock.accept()[0].close(), daemon=True).start()
        refused(TunnelError, "ssh handshake", sshserver=f"127.0.0.1:{sock.getsockname()[1]}")


def test_not_let_in(home, sshd):
    key = new_key(home / "stranger")
    configure(home, f"Host *\n  Port {sshd.port}\n")
    refused(TunnelError, "root@127.0.0.1", "it takes publickey", str(key), "--sshkey", sshserver="root@127.0.0.1",
            sshkey=str(key))
    refused(TunnelError, "no key file", "nowhere", sshserver="root@127.0.0.1", sshkey=str(home / "nowhere"))


def test_forwarding_is_prohibited(home):
    with an_sshd(hosts=("127.0.0.1",), options="AllowTcpForwarding no") as server:
        (home / ".ssh/known_hosts").write_text(server.known)
        refused(TunnelError, "refuses to forward", "AllowTcpForwarding", sshserver=f"root@127.0.0.1:{server.port}",
                sshkey=server.key)
    with an_sshd(hosts=("127.0.0.1",), options="AllowStreamLocalForwarding no") as server:
        (home / ".ssh/known_hosts").write_text(server.known)
        refused(ConnectError, "can't reach /a/b", "AllowStreamLocalForwarding", info={**nobody(), "url": "", "ipc": "/a/b"},
                sshserver=f"root@127.0.0.1:{server.port}", sshkey=server.key)


def test_no_controller_at_the_far_end(home):
    refused(ConnectError, "can't reach 127.0.0.1", "refused", "--ip=*", "(elsewhere)", sshserver="node1")
    info = {**nobody(), "url": "tcp://10.255.255.1:1", "location": "no-such-host.invalid"}
    refused(ConnectError, "no-such-host.invalid:1", "location", sshserver="node1", info=info)


def test_something_else_at_the_far_end(home, sshd):
    refused(ConnectError, "handshake", sshserver="node1", info=nobody(sshd.port))


def test_config_that_can_not_be_read(home):
    configure(home, "Host node1\n  this is = 'no config\n")
    refused(TunnelError, "~/.ssh/config", sshserver="node1")


def test_engine_tells_in_one_sentence(ipython_dir, home):
    with tcp_controller(ipython_dir):
        command = run("engine", "--ssh=no-such-host.invalid")
        assert command.process.returncode == 1 and "Traceback" not in command.err, command.err
        assert "ipengine: the ssh server 'no-such-host.invalid' can't be looked up" in command.err


def test_paramiko_is_absent(home, tmp_path, monkeypatch):
    (tmp_path / "absent").mkdir()
    (tmp_path / "absent/paramiko.py").write_text("raise ImportError('no module of that name')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "absent"))
    refused(TunnelError, "pip install paramiko", "ssh -L", sshserver="node1")


# --- what breaks


def pids_of(rc):
    """The engines' processes; nothing if some of them register again meanwhile."""
    try:
        return set(rc[:].apply_sync(os.getpid))
    except (ipp.CompositeError, ipp.EngineError):  # several of them, or one
        return set()


def test_engines_come_back_through_a_new_tunnel(ipython_dir, home, sshd, tmp_path):
    with tcp_controller(ipython_dir), Command("engine"), Command("engine", "-n", "3", "--ssh=node1") as agent:
        with ipp.Client(sshserver="node2") as rc:
            rc.wait_for_engines(4, timeout=30)
            engines, logins = set(rc[:].apply_sync(os.getpid)), sshd.logins()
            sshd.kill_sessions("127.0.0.1")
            agent.says("the ssh tunnel through node1 broke")
            eventually(lambda: sshd.logins() == logins + 1, 30, "the agent is back at the ssh server")
            eventually(lambda: {e["pid"] for e in rc._engines.values()} == engines, 30, "the same engines are back")
            eventually(lambda: pids_of(rc) == engines, 30, "they answer")


def test_task_of_an_engine_behind_a_broken_tunnel_goes_on(ipython_dir, home, sshd, tmp_path):
    with tcp_controller(ipython_dir), Command("engine", "--ssh=node1"), ipp.Client(sshserver="node2") as rc:
        rc.wait_for_engines(1, timeout=30)
        running = rc.load_balanced_view().apply_async(report_and_hold, str(tmp_path / "ran"), str(tmp_path / "go"), 7)
        eventually((tmp_path / "ran").exists, 20, "it runs")
        with Command("engine"):
            rc.wait_for_engines(2, timeout=30)
            logins = sshd.logins()
            sshd.kill_sessions("127.0.0.1")
            eventually(lambda: sshd.logins() == logins + 1, 30, "the agent is back at the ssh server")
            (tmp_path / "go").touch()
            assert running.get(30) == 7
            assert len((tmp_path / "ran").read_text().split()) <= 2  # elsewhere too, if the engine was missed first


def test_client_comes_back_through_a_new_tunnel(ipython_dir, home, sshd, tmp_path):
    with tcp_controller(ipython_dir), Command("engine"), ipp.Client(sshserver="node2") as rc:
        rc.wait_for_engines(1, timeout=30)
        waiting = rc[0].apply_async(hold, str(tmp_path / "go"), 7)
        logins = sshd.logins("127.0.0.2")
        sshd.kill_sessions("127.0.0.2")
        eventually(lambda: sshd.logins("127.0.0.2") > logins, 30, "it logs in again")
        (tmp_path / "go").touch()
        assert waiting.get(30) == 7
        assert rc[0].apply_sync(abs, -1) == 1


def test_killed_tunnel_process_is_replaced(ipython_dir, home):
    with tcp_controller(ipython_dir), Command("engine"), ipp.Client(sshserver="node1") as rc:
        rc.wait_for_engines(1, timeout=30)
        (process,) = tunnel_processes().values()
        process.kill()
        assert rc[0].apply_async(abs, -1).get(30) == 1
        eventually(lambda: [pid for pid in tunnel_processes() if pid != process.pid], 30, "there is a new one")


def test_tunnel_ends_with_a_killed_owner(ipython_dir, home):
    with tcp_controller(ipython_dir):
        code = ("import os, signal, ipclite; rc = ipclite.Client(sshserver='node1'); print('in', flush=True); "
                "os.kill(os.getpid(), signal.SIGKILL)")
        with Command(code=["-c", code]) as client:
            client.says("in")
            eventually(lambda: not tunnel_processes(), 10, "the tunnel's process ends")


def test_agent_stops_while_it_makes_a_tunnel(ipython_dir, home):
    with socket.create_server(("127.0.0.1", 0)) as silent, tcp_controller(ipython_dir):
        with Command("engine", f"--ssh=127.0.0.1:{silent.getsockname()[1]}") as agent:
            silent.settimeout(30)
            taken, _ = silent.accept()
            started = time.monotonic()
            assert agent.stop() == 0, agent.err
            assert time.monotonic() - started < tunnel.TUNNEL_S / 2, "it waited for the ssh server"
            taken.close()


# --- hosts


@pytest.fixture(scope="module")
def hosts(_mark):
    need(os.geteuid() == 0, "root")
    need(shutil.which("ip", path=SBIN), "ip")
    found = Hosts()
    yield found
    found.do("stop")


@pytest.fixture
def elsewhere(ipython_dir, tmp_path):
    """A function that copies a connection file away from the profile, and returns its path."""
    def copy(role):
        connection(ipython_dir, role)
        path = tmp_path / f"ipcontroller-{role}.json"
        shutil.copy(security(ipython_dir) / path.name, path)
        return path
    return copy


SUM = "import ipclite, sys; rc = ipclite.Client(sys.argv[1]{more}); rc.wait_for_engines(2, timeout=30); " \
      "print('sum', sum(rc.load_balanced_view().map_sync(abs, range(-10, 0))))"


@pytest.mark.parametrize("flags", ["--ip={address}", "--ip=* --location={name}", "--ip=*"])
def test_three_hosts(ipython_dir, hosts, elsewhere, tmp_path, flags):
    words = flags.format(address=hosts.address(hosts.a), name=hosts.a).split()
    with tcp_controller(ipython_dir, *words, via=hosts.on(hosts.a)):
        with Command("engine", "-n", "2", f"--file={elsewhere('engine')}", via=hosts.on(hosts.b)):
            with Command(code=["-c", SUM.format(more=""), str(elsewhere("client"))], via=hosts.on(hosts.c)) as client:
                client.says("sum 55")
                assert client.wait() == 0


def test_location_written_by_hand(ipython_dir, hosts, elsewhere):
    with tcp_controller(ipython_dir, "--ip=*", "--location=nowhere.invalid", via=hosts.on(hosts.a)):
        lost = run("engine", f"--file={elsewhere('engine')}", via=hosts.on(hosts.b))
        assert "'nowhere.invalid' can not be looked up" in lost.err and "location" in lost.err, lost.err
        with Command("engine", f"--file={elsewhere('engine')}", f"--location={hosts.address(hosts.a)}",
                     via=hosts.on(hosts.b)):
            path = elsewhere("client")
            path.write_text(json.dumps({**json.loads(path.read_text()), "location": hosts.a}))
            code = ("import ipclite, sys; rc = ipclite.Client(sys.argv[1]); rc.wait_for_engines(1, timeout=30); "
                    "print('got', rc.ids)")
            with Command(code=["-c", code, str(path)], via=hosts.on(hosts.c)) as client:
                client.says("got [0]")
                assert client.wait() == 0


def test_remote_engine_of_a_loopback_controller_is_told_so(ipython_dir, hosts, elsewhere):
    with tcp_controller(ipython_dir, via=hosts.on(hosts.a)):
        engine = run("engine", f"--file={elsewhere('engine')}", via=hosts.on(hosts.b))
        assert engine.process.returncode == 1
        assert f"the controller on {hosts.a} listens on that host only" in engine.err, engine.err
        assert "--ip=*" in engine.err and f"--ssh={hosts.a}" in engine.err


@pytest.mark.parametrize("transport", ["tcp", "ipc"])
def test_two_hosts_race_for_one_id(ipython_dir, hosts, transport):
    """They see the same profile, as on a cluster's file system."""
    names = (hosts.a, hosts.b)
    flags = {name: [f"--ip={hosts.address(name)}", f"--transport={transport}"] for name in names}
    rivals = [Command("controller", *flags[name], via=hosts.on(name)) for name in names]
    try:
        eventually(lambda: sum(rival.running() for rival in rivals) == 1, what="one has won")
        winner, loser = sorted(rivals, key=lambda rival: not rival.running())
        winner.says("controller started")
        assert loser.wait() == 10 and "already serves" in loser.err and "Traceback" not in loser.err, loser.err
        assert connection(ipython_dir)["host"] == names[rivals.index(winner)]
        assert ("remove" in loser.err) == (transport == "ipc"), "from there nobody can tell whether it lives"
        third = run("controller", *flags[names[rivals.index(loser)]], via=hosts.on(names[rivals.index(loser)]))
        assert third.process.returncode == 10, third.err
    finally:
        for rival in rivals:
            rival.stop()


def test_a_firewall_is_suspected(ipython_dir, hosts, elsewhere):
    """Packets are dropped on the way, or there is no way: client and engine say so, with the address."""
    address = hosts.address(hosts.a)
    with tcp_controller(ipython_dir, f"--ip={address}", via=hosts.on(hosts.a)):
        client, engine = elsewhere("client"), elsewhere("engine")
        urls = [json.loads(path.read_text())["url"] for path in (client, engine)]
        code = "import ipclite, sys; ipclite.Client(sys.argv[1], timeout=2)"
        hosts.do("cut", hosts.b)
        try:
            for url, done in zip(urls, (run(code=["-c", code, str(client)], via=hosts.on(hosts.b), timeout=60),
                                        run("engine", f"--file={engine}", via=hosts.on(hosts.b), timeout=60))):
                last = done.err.splitlines()[-1]
                assert done.process.returncode == 1 and url in last, done.err
                assert "firewall" in last or "can't be reached (No route to host)" in last, done.err
        finally:
            hosts.do("heal", hosts.b)
        client.write_text(json.dumps({**json.loads(client.read_text()), "url": "tcp://198.51.100.1:9", "location": ""}))
        done = run(code=["-c", code, str(client)], via=hosts.on(hosts.b))
        assert "198.51.100.1:9 can't be reached (Network is unreachable)" in done.err, done.err


def test_loopback_controller_is_reached_by_ssh_to_its_host(ipython_dir, hosts, elsewhere, tmp_path, monkeypatch):
    address = hosts.address(hosts.a)
    with an_sshd(hosts=(address,), via=hosts.on(hosts.a)) as server, tcp_controller(ipython_dir, via=hosts.on(hosts.a)):
        (tmp_path / ".ssh").mkdir(mode=0o700)
        monkeypatch.setenv("HOME", str(tmp_path))
        (tmp_path / ".ssh/known_hosts").write_text(server.known)
        server_name = f"root@{address}:{server.port}"
        with Command("engine", "-n", "2", f"--file={elsewhere('engine')}", f"--ssh={server_name}",
                     f"--sshkey={server.key}", via=hosts.on(hosts.b)):
            code = SUM.format(more=f", sshserver={server_name!r}, sshkey={server.key!r}")
            with Command(code=["-c", code, str(elsewhere("client"))], via=hosts.on(hosts.c)) as client:
                client.says("sum 55")
                assert client.wait() == 0


@pytest.mark.parametrize("through_ssh", [False, True], ids=["direct", "through ssh"])
def test_cable_is_cut_and_healed(ipython_dir, hosts, elsewhere, tmp_path, monkeypatch, through_ssh):
    address = hosts.address(hosts.a)
    with contextlib.ExitStack() as stack:
        flags = []
        if through_ssh:
            server = stack.enter_context(an_sshd(hosts=(address,), via=hosts.on(hosts.a)))
            (tmp_path / ".ssh").mkdir(mode=0o700)
            monkeypatch.setenv("HOME", str(tmp_path))
            (tmp_path / ".ssh/known_hosts").write_text(server.known)
            flags = [f"--ssh=root@{address}:{server.port}", f"--sshkey={server.key}"]
        control = stack.enter_context(tcp_controller(ipython_dir, f"--ip={address}", "--ping=500", via=hosts.on(hosts.a)))
        stack.enter_context(Command("engine", f"--file={elsewhere('engine')}", via=hosts.on(hosts.a)))
        agent = stack.enter_context(Command("engine", f"--file={elsewhere('engine')}", *flags, via=hosts.on(hosts.b)))
        code = ("import ipclite, sys, tasks; rc = ipclite.Client(sys.argv[1]); rc.wait_for_engines(2, timeout=30); ar "
                "= rc.load_balanced_view().map_async(tasks.hold, [sys.argv[2]] * 4, range(4)); print('sent', "
                "flush=True); print('got', list(ar.get(120)), flush=True); rc.wait_for_engines(2, timeout=60); "
                "print('all', rc.ids)")
        client = stack.enter_context(Command(code=["-c", code, str(elsewhere("client")), str(tmp_path / "go")],
                                             env={"PYTHONPATH": str(ROOT / "tests")}, via=hosts.on(hosts.c)))
        client.says("sent")
        control.says(f" on {hosts.b} connected")  # the agent; its engine may be quicker
        hosts.do("cut", hosts.b)
        try:
            agent.says("WARNING", timeout=40)  # that the controller says nothing, or not even welcome
            (tmp_path / "go").touch()
            client.says("got [0, 1, 2, 3]", timeout=60)
        finally:
            hosts.do("heal", hosts.b)
        client.says("all [0, 1]", timeout=60)
        assert client.wait() == 0


def test_the_controller_s_cable_is_cut_and_healed(ipython_dir, hosts, elsewhere, tmp_path):
    """The engines go on with what they have, and client and engines come back: nothing is lost or run twice."""
    address, ran = hosts.address(hosts.a), tmp_path / "ran"
    ran.mkdir()
    with tcp_controller(ipython_dir, f"--ip={address}", "--ping=500", via=hosts.on(hosts.a)) as control, \
            Command("engine", "-n", "2", f"--file={elsewhere('engine')}", via=hosts.on(hosts.b)) as agent:
        code = ("import ipclite, sys, tasks; rc = ipclite.Client(sys.argv[1]); rc.wait_for_engines(2, timeout=30); ids = rc.ids\n"
                "view = rc.load_balanced_view(); ars = [view.apply_async(tasks.note_and_sleep, sys.argv[2], i, 0.2) for i in range(40)]\n"
                "pinned = rc[:].apply_async(tasks.note_and_sleep, sys.argv[2], 40, 0); ars[0].get(); print('runs', flush=True)\n"
                "print('got', [ar.get(120) for ar in ars] == list(range(40)), pinned.get(120), rc.ids == ids, "
                "flush=True)")
        with Command(code=["-c", code, str(elsewhere("client")), str(ran)], env={"PYTHONPATH": str(ROOT / "tests")},
                     via=hosts.on(hosts.c)) as client:
            client.says("runs")
            hosts.do("cut", hosts.a)
            try:
                agent.says("WARNING", timeout=40)
                control.says("can not be reached", timeout=40)
                client.says("trying", timeout=60)
            finally:
                hosts.do("heal", hosts.a)
            client.says("got True [40, 40] True", timeout=90)
            assert client.wait() == 0 and "is back" in client.err
    assert sorted(int(line) for path in ran.iterdir() for line in path.read_text().split()) == [*range(40), 40, 40]


def test_an_engine_that_is_given_up_is_told(ipython_dir):
    """Its welcome may come late, through a cable that was healed; then it must not wait for ever for tasks."""
    with controller(ipython_dir, "--ping=100"):
        info = connection(ipython_dir, "engine")
        with Raw.member(info) as engine:
            assert engine.hello(info)[0] == wire.WELCOME
            assert b"taken for dead" in engine.answer(wire.REFUSED)[1]


# --- details


@pytest.mark.parametrize("text, parts", [
    ("login", ("", "login", 0)), ("me@login:2222", ("me", "login", 2222)), ("ssh://me@login:22/", ("me", "login", 22)),
    ("me@[::1]:22", ("me", "::1", 22)), ("::1", ("", "::1", 0)), ("a@b@login", ("a@b", "login", 0)),
])
def test_names_of_servers(text, parts):
    assert ssh.parse_server(text) == parts


@pytest.mark.parametrize("text", ["", "me@", "login:0x10", "login:70000", "-oProxyCommand=x"])
def test_names_that_are_none(text):
    with pytest.raises(TunnelError):
        ssh.parse_server(text)


def test_ssh_is_imported_only_when_asked_for():
    done = subprocess.run([sys.executable, "-c", "import sys, ipclite.client, ipclite.engine, ipclite.controller; "
                                                 "print([m for m in sys.modules if 'paramiko' in m or "
                                                 "m.endswith('.tunnel')])"],
                          cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done
