"""Servers and hosts for tests: real sshd, and hosts of their own in network namespaces."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import tempfile
from pathlib import Path

import psutil
from support import eventually, need

SERVICES = Path(__file__).resolve().parent / "services"
SBIN = os.environ["PATH"] + ":/usr/sbin:/sbin"


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
            eventually(lambda host=host: "Server listening" in self.log(host), 20, f"sshd of {host} listens")

    def _script(self, what):
        subprocess.run([*self.via, str(SERVICES / "sshd.sh"), what], env=self.env, check=True, timeout=30)

    @property
    def key(self):
        return str(self.state / "id_ed25519")

    @property
    def known(self):
        return (self.state / "known_hosts").read_text()

    def log(self, host="127.0.0.1"):
        path = self.state / f"log.{host}"
        return path.read_text() if path.exists() else ""

    def logins(self, host="127.0.0.1"):
        return self.log(host).count("Accepted publickey for ")

    def kill_sessions(self, host="127.0.0.1"):
        """Kill what serves the connections; the server takes new ones."""
        server = psutil.Process(int((self.state / f"pid.{host}").read_text()))
        for child in server.children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()

    def make_home(self, home, monkeypatch, names):
        """Make the directory our home: its ~/.ssh knows the servers, the key, and `names` {name: address}."""
        (home / ".ssh").mkdir(mode=0o700, parents=True)
        monkeypatch.setenv("HOME", str(home))
        monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)
        (home / ".ssh/known_hosts").write_text(self.known)
        (home / ".ssh/config").write_text("".join(f"Host {name}\n  HostName {address}\n" for name, address in names.items())
                                          + f"Host *\n  User root\n  Port {self.port}\n  IdentityFile {self.key}\n")
        return home

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
