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
import tempfile
import threading
import time
from pathlib import Path

import psutil
import pytest
from shell import ROOT, Command, connection, controller, run, security
from support import eventually, need, our_processes
from tasks import hold, report_and_hold

import ipclite as ipp
from ipclite import net, ssh, tunnel, wire
from ipclite.errors import ConnectError, ControllerLost, TunnelError

SERVICES = Path(__file__).resolve().parents[1] / "services"
SBIN = os.environ["PATH"] + ":/usr/sbin:/sbin"
SECRET = "correct horse"


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return sock.getsockname()[1]


class Sshd:
    """Running servers, one for each of `hosts`, all on `port`.

    Args:
        options: first lines of sshd_config.
        shadow: text to be taken for /etc/shadow.
        via: a command that runs another one, which is put before.
    """

    def __init__(self, hosts=("127.0.0.1", "127.0.0.2"), options="", shadow="", via=()):
        self.state = Path(tempfile.mkdtemp(prefix="ipc-sshd-"))
        self.hosts, self.port, self.via = hosts, free_port(), list(via)
        if shadow:
            (self.state / "shadow").write_text(shadow)
        self.env = {**os.environ, "STATE": str(self.state), "SSHD_PORT": str(self.port), "SSHD_HOSTS": " ".join(hosts),
                    "SSHD_OPTIONS": options, "SSHD_SHADOW": str(self.state / "shadow") if shadow else ""}
        self._script("start")
        for host in hosts:
            eventually(lambda host=host: b"Server listening" in (self.state / f"log.{host}").read_bytes(), 20,
                       f"sshd of {host} listens: {(self.state / f'log.{host}').read_text()}")

    def _script(self, what):
        subprocess.run([*self.via, str(SERVICES / "sshd.sh"), what], env=self.env, check=True, timeout=30)

    @property
    def key(self):
        return str(self.state / "id_ed25519")

    @property
    def known(self):
        return (self.state / "known_hosts").read_text()

    def log(self, host="127.0.0.1"):
        return (self.state / f"log.{host}").read_text()

    def logins(self, host="127.0.0.1"):
        return self.log(host).count("Accepted publickey for ")

    def kill_sessions(self, host="127.0.0.1"):
        """Kill what serves the connections; the server takes new ones."""
        server = psutil.Process(int((self.state / f"pid.{host}").read_text()))
        for child in server.children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()

    def close(self):
        self._script("stop")
        shutil.rmtree(self.state)


def needs_sshd():
    need(shutil.which("sshd", path=SBIN), "sshd")
    need(shutil.which("ssh-keygen"), "ssh-keygen")


@contextlib.contextmanager
def an_sshd(**options):
    needs_sshd()
    server = Sshd(**options)
    try:
        yield server
    finally:
        server.close()


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
    return {pid: p for pid, p in our_processes().items() if f"{ipp.__name__}.tunnel" in " ".join(p.cmdline())}


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
    """The engines' processes; nothing if one of them registers again meanwhile."""
    try:
        return set(rc[:].apply_sync(os.getpid))
    except ipp.CompositeError:
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


def test_task_of_an_engine_behind_a_broken_tunnel_runs_elsewhere(ipython_dir, home, sshd, tmp_path):
    with tcp_controller(ipython_dir), Command("engine", "--ssh=node1"), ipp.Client(sshserver="node2") as rc:
        rc.wait_for_engines(1, timeout=30)
        running = rc.load_balanced_view().apply_async(report_and_hold, str(tmp_path / "ran"), str(tmp_path / "go"), 7)
        eventually((tmp_path / "ran").exists, 20, "it runs")
        with Command("engine"):
            rc.wait_for_engines(2, timeout=30)
            sshd.kill_sessions("127.0.0.1")
            eventually(lambda: len((tmp_path / "ran").read_text().split()) == 2, 30, "it runs again")
            (tmp_path / "go").touch()
            assert running.get(30) == 7


def test_client_is_told_that_the_tunnel_broke(ipython_dir, home, sshd, tmp_path):
    with tcp_controller(ipython_dir), Command("engine"), ipp.Client(sshserver="node2") as rc:
        rc.wait_for_engines(1, timeout=30)
        view = rc[0]
        waiting = view.apply_async(hold, str(tmp_path / "go"))
        sshd.kill_sessions("127.0.0.2")
        with pytest.raises(ControllerLost, match="ssh tunnel through node2 broke"):
            waiting.get(30)
        with pytest.raises(ControllerLost, match="ssh tunnel through node2 broke"):
            view.apply_sync(abs, 1)
        (tmp_path / "go").touch()
        with ipp.Client(sshserver="node2") as again:
            assert again.ids == [0]


def test_killed_tunnel_process_is_noticed(ipython_dir, home):
    with tcp_controller(ipython_dir), ipp.Client(sshserver="node1") as rc:
        (process,) = tunnel_processes().values()
        process.kill()
        with pytest.raises(ControllerLost, match="ssh tunnel through node1 broke"):
            eventually(lambda: rc._connection.lost, 10, "it is noticed")
            raise rc._connection.lost


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


class Hosts:
    """Three hosts a, b and c that reach each other by name and address."""

    def __init__(self):
        self.prefix, self.net = f"i{os.getpid() % 100000}h", os.getpid() % 256
        self.env = {**os.environ, "NETNS_PREFIX": self.prefix, "NETNS_NET": str(self.net)}
        self.a, self.b, self.c = (f"{self.prefix}{i}" for i in (1, 2, 3))
        self.do("start")

    def do(self, *words):
        subprocess.run([str(SERVICES / "netns.sh"), *words], env=self.env, check=True, timeout=60)

    def address(self, name):
        return f"10.{self.net}.0.{10 + int(name[-1])}"

    def on(self, name):
        """A command that runs another one on a host."""
        return ("env", f"NETNS_PREFIX={self.prefix}", f"NETNS_NET={self.net}", str(SERVICES / "netns.sh"), "exec", name)


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
        stack.enter_context(tcp_controller(ipython_dir, f"--ip={address}", "--ping=500", via=hosts.on(hosts.a)))
        stack.enter_context(Command("engine", f"--file={elsewhere('engine')}", via=hosts.on(hosts.a)))
        agent = stack.enter_context(Command("engine", f"--file={elsewhere('engine')}", *flags, via=hosts.on(hosts.b)))
        code = ("import ipclite, sys, tasks; rc = ipclite.Client(sys.argv[1]); rc.wait_for_engines(2, timeout=30); ar "
                "= rc.load_balanced_view().map_async(tasks.hold, [sys.argv[2]] * 4, range(4)); print('sent', "
                "flush=True); print('got', list(ar.get(120)), flush=True); rc.wait_for_engines(2, timeout=60); "
                "print('all', rc.ids)")
        client = stack.enter_context(Command(code=["-c", code, str(elsewhere("client")), str(tmp_path / "go")],
                                             env={"PYTHONPATH": str(ROOT / "tests")}, via=hosts.on(hosts.c)))
        client.says("sent")
        hosts.do("cut", hosts.b)
        try:
            agent.says("said nothing", timeout=40)
            (tmp_path / "go").touch()
            client.says("got [0, 1, 2, 3]", timeout=60)
        finally:
            hosts.do("heal", hosts.b)
        client.says("all [0, 1]", timeout=60)
        assert client.wait() == 0


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
