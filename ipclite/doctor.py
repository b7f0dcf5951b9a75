"""`ipclite doctor`: checks, one after the other, what must hold for engines and clients to find their controller.

    profile ─► settings ─► sockets ─► file ─► run ─► version ─► name ─► address ─► key and handshake, for each role
                                                              and: clock, open files, commands of batch systems

Each step gives a `Verdict` that names what was looked at and, if it failed, what to do. A step whose ground is missing
is left out. Nothing is changed: the probes say hello as a client, and as an agent without engines, and leave.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import stat
import sys
import time
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional

from . import __version__, config, net, wire
from .errors import ConfigError, ConnectionFileError, UserError

OK, NOTE, FAIL = "ok", "note", "FAIL"
PROBE_S = 5.0  # for each thing that may not answer
SKEW_S = 5.0  # clocks may differ by so much
FILES_PER_ENGINE = 2  # connections to the controller: its own, and its share of an agent's
FEW_FILES = 1024
COMMANDS = {"sbatch": "Slurm", "qsub": "PBS or Grid Engine", "bsub": "LSF", "condor_submit": "HTCondor",
            "mpiexec": "MPI", "srun": "Slurm", "ssh": "ssh"}
# Launcher -> the command that it starts with, and the settings that name another one.
STARTERS = {"slurm": ("sbatch", "submit_command"), "pbs": ("qsub", "submit_command"), "sge": ("qsub", "submit_command"),
            "lsf": ("bsub", "submit_command"), "htcondor": ("condor_submit", "submit_command"),
            "mpi": ("mpiexec", "mpi_cmd")}


class Verdict(NamedTuple):
    """What a step found. `result` is OK, NOTE (worth knowing) or FAIL."""

    step: str
    result: str
    text: str


class Doctor:
    """The steps, in order.

    Args:
        profile_dir: the profile to look at. cluster_id: which of its clusters.
    """

    def __init__(self, profile_dir: Path, cluster_id: str):
        self.profile_dir, self.cluster_id = profile_dir, cluster_id

    def verdicts(self) -> Iterator[Verdict]:
        """Take every step that can be taken."""
        yield from self._profile()
        for app in config.APPS:
            yield self._try(f"settings of ip{app}", lambda app=app: self._settings(app))
        yield self._try("socket directory", lambda: f"{config.runtime_dir()} is yours alone")
        for role in ("client", "engine"):
            yield from self._connection(role)
        yield self._clock()
        yield self._open_files()
        yield self._commands()
        for role in ("controller", "engine"):
            yield self._try(f"launcher of the {role}s" if role == "engine" else "launcher of the controller",
                            lambda role=role: self._launcher(role))

    def _try(self, step: str, look: Callable[[], str]) -> Verdict:
        try:
            return Verdict(step, OK, look())
        except UserError as e:
            return Verdict(step, FAIL, str(e))

    def _settings(self, app: str) -> str:
        config.load("cluster start" if app == "cluster" else app, self.profile_dir)
        path = self.profile_dir / f"ip{app}_config.py"
        for file in (path, self.profile_dir):
            if os.name == "posix" and file.exists() and file.stat().st_mode & 0o002:
                raise ConfigError(f"{file} can be written by others, who could run code as you by it; run `chmod o-w {file}`.")
        return f"{path} can be read" if path.exists() else f"no {path.name}, so the defaults hold"

    def _profile(self) -> Iterator[Verdict]:
        if not self.profile_dir.is_dir():
            yield Verdict("profile", FAIL, f"There is no profile {self.profile_dir}; start a controller or copy a "
                                           "connection file, or choose another one with --profile.")
            return
        for name, private in (("security", True), ("log", False)):
            yield self._try(name, lambda: self._folder(self.profile_dir / name, private))  # noqa: B023

    def _folder(self, path: Path, private: bool) -> str:
        try:
            found = path.stat()
        except OSError as e:
            raise ConfigError(f"{path}: {e.strerror}; starting a controller makes it.") from None
        if not os.access(path, os.W_OK | os.X_OK):
            raise ConfigError(f"{path} can't be written; make it yours, or choose another profile.")
        if private and os.name == "posix" and stat.S_IMODE(found.st_mode) & 0o077:
            raise ConfigError(f"{path} is open to others; run `chmod 700 {path}`.")
        return f"{path} can be written" + (", by you alone" if private else "")

    def _connection(self, role: str) -> Iterator[Verdict]:
        """What must hold for a client, or an engine, to connect; ends with the first step that fails."""
        path = config.connection_file(self.profile_dir, self.cluster_id, role)
        info: Dict[str, Any] = {}

        def read() -> str:
            info.update(config.read_connection(path, role, wire.VERSION))
            return f"{path} is whole and yours alone"

        steps: List[tuple[str, Callable[[], str]]] = [
            (f"{role}'s connection file", read), (f"{role}: controller", lambda: self._alive(info)),
            (f"{role}: version", lambda: self._version(info)), (f"{role}: name lookup", lambda: self._name(info)),
            (f"{role}: address", lambda: self._address(info)), (f"{role}: key", lambda: self._handshake(role, info))]
        for step, look in steps:
            verdict = self._try(step, look)
            yield verdict
            if verdict.result == FAIL:
                return

    def _alive(self, info: Dict[str, Any]) -> str:
        dead = net.ended_run(info)
        if dead:
            raise ConnectionFileError(f"The file is of a run that has ended: {dead}; start a new cluster, or run "
                                      "`ipcluster clean`.")
        age_s = time.time() - info.get("started", 0)
        return f"pid {info['pid']} on {info['host']}, started {age_s:.0f} s ago"

    def _version(self, info: Dict[str, Any]) -> str:
        return f"protocol {info['protocol']}; controller {info.get('version')}, here {__version__}"

    def _name(self, info: Dict[str, Any]) -> str:
        if net.is_local(info):
            return "not needed: the controller is on this host"
        if net.needs_tunnel(info) and not info["url"]:
            return f"not needed: the controller's socket is on {info['ssh']}"
        host = net.endpoint(info)[0].strip("[]")
        if net.needs_tunnel(info):
            return f"{host} is looked up on {info['ssh']}"
        try:
            found = {str(entry[4][0]) for entry in socket.getaddrinfo(host, None)}
        except OSError as e:
            raise ConnectionFileError(f"{host} can't be looked up ({e.strerror or e}); start the controller with "
                                      "--location=ADDRESS, or edit the file.") from None
        loopback = all(address.startswith("127.") or address == "::1" for address in found)
        if loopback and info["host"] != socket.gethostname():
            raise ConnectionFileError(f"The controller listens on loopback of {info['host']} only, which can't be "
                                      "reached from here; start it with --ip=*.")
        return f"{host} is {', '.join(sorted(found))}"

    def _address(self, info: Dict[str, Any]) -> str:
        if net.is_local(info):
            return f"{info['ipc']} is there"
        if net.needs_tunnel(info):
            return f"{info['url'] or info['ipc']} is reached through ssh to {info['ssh']}"
        if not net.takes_connections(info, PROBE_S):
            raise ConnectionFileError(f"Nothing answers at {info['url']}; is the controller running, does it listen on "
                                      "this network (--ip), is a firewall in the way?")
        return f"{info['url']} takes connections"

    def _handshake(self, role: str, info: Dict[str, Any]) -> str:
        hello = {"role": "client" if role == "client" else "agent", "protocol": wire.VERSION, "pid": os.getpid(),
                 "host": socket.gethostname(), "session": os.urandom(wire.SESSION_SIZE).hex(),
                 "uuid": os.urandom(16).hex()}
        context, tunnel = net.Context(), self._tunnel(info)
        try:
            link, welcome = net.greet(context, info, hello, PROBE_S, tunnel)
            bye = [wire.BYE] if role == "client" else wire.encode_json(wire.BYE, {"reason": "it was a probe"})
            net.send(link.sock, bye)
            link.close(500)
        finally:
            context.term()
            if tunnel is not None:
                tunnel.close()
        engines = welcome.get("engines")
        if engines is None:
            return "the controller welcomes us"
        pythons = {str(engine.get("python") or "?").rpartition(".")[0] for engine in engines}
        here = ".".join(map(str, sys.version_info[:2]))
        others = f", some with Python {', '.join(sorted(pythons - {here}))} (here {here})" if pythons - {here} else ""
        return f"the controller welcomes us; it has {len(engines)} engines{others}"

    @staticmethod
    def _tunnel(info: Dict[str, Any]) -> Any:
        if not net.needs_tunnel(info):
            return None
        from .tunnel import Tunnel

        return Tunnel(f"{os.getpid()}-doctor")

    def _clock(self) -> Verdict:
        """The clocks of this host, of the file server and of the controller: results carry times."""
        ahead: List[str] = []
        path = config.connection_file(self.profile_dir, self.cluster_id, "client")
        try:
            started, written = config.read_json(path).get("started", 0.0), path.stat().st_mtime
        except (ConnectionFileError, OSError):
            return Verdict("clock", OK, f"it is {time.strftime('%Y-%m-%d %H:%M:%S %z')} here")
        for whose, then in (("the controller's host", started), ("the file server", written)):
            if then > time.time() + SKEW_S:
                ahead.append(f"{whose} is {then - time.time():.0f} s ahead of this host")
        text = "; ".join(ahead) + "; set the clocks by NTP." if ahead else "this host is not behind the controller's"
        return Verdict("clock", NOTE if ahead else OK, text)

    def _open_files(self) -> Verdict:
        try:
            import resource
        except ImportError:
            return Verdict("open files", OK, "this system has no such limit")
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        limit = hard if hard != resource.RLIM_INFINITY else 1 << 20
        text = f"up to {limit} (now {soft}), enough for about {max(0, limit - 64) // FILES_PER_ENGINE} engines"
        few = limit < FEW_FILES
        return Verdict("open files", NOTE if few else OK, text + ("; ask for a higher `ulimit -Hn`." if few else ""))

    def _commands(self) -> Verdict:
        found = [f"{command} ({system})" for command, system in COMMANDS.items() if shutil.which(command)]
        return Verdict("commands", OK, "on PATH: " + (", ".join(found) or "none of " + ", ".join(COMMANDS)))


    def _launcher(self, role: str) -> str:
        """Can the launcher that the profile chooses be found, and the command that it starts with?"""
        from .launchers import find_launcher, launcher_name

        settings = config.load(config.START, self.profile_dir)
        kind = find_launcher(role, settings[f"Cluster.{role}_launcher_class"])
        name = launcher_name(kind)
        command, setting = STARTERS.get(name, ("", ""))
        given = settings.section(*(c.__name__ for c in reversed(kind.__mro__))).get(setting)
        command = str(given[0] if isinstance(given, list) and given else given or command)
        if not command:
            return name
        found = shutil.which(command)
        if found is None:
            raise ConfigError(f"{name} starts with {command}, which is not on PATH here; load its module, or set "
                              f"c.{kind.__name__}.{setting}.")
        return f"{name}, by {found}"


def examine(settings: config.Settings) -> int:
    """Print the verdicts; returns the exit code: 1 if a step failed."""
    doctor = Doctor(settings.profile_dir, settings["Application.cluster_id"])
    verdicts = []
    as_json = settings["IPClusterList.output_format"] == "json"
    for verdict in doctor.verdicts():
        verdicts.append(verdict)
        if not as_json:
            print(f"{verdict.result:<5} {verdict.step}: {verdict.text}", flush=True)
    failed = [verdict for verdict in verdicts if verdict.result == FAIL]
    if as_json:
        print(json.dumps([verdict._asdict() for verdict in verdicts], indent=2))
    else:
        print("Everything is as it must be." if not failed else f"{len(failed)} of {len(verdicts)} steps failed.")
    return 1 if failed else 0


def _examine(argv: List[str]) -> int:
    settings = config.parse("doctor", argv)
    config.setup_logging("doctor", settings["Application.log_level"])
    return examine(settings)


def main(argv: Optional[List[str]] = None) -> int:
    """`ipclite doctor`: the command line."""
    return config.run_main(config.PROGRAM, _examine, argv)


if __name__ == "__main__":
    sys.exit(main())
