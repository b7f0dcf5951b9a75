"""Other hosts, as ssh launchers use them: run something there that outlives us, and know what becomes of it.

    ssh launcher ──► Site, one host ──► Host ══ one ssh connection ══► outpost ──► warden ──► controller, or agent
                 ◄── who ended, in another thread ──┘       (outpost.py, sent there)

A `Site` lives through "before" ──start──► "running" ⇄ "unreachable" ──► "ended". While it can't be reached it tries to
connect again; what it started does not notice.

Rules that hold here:
- a host needs Python and pyzmq; this package and cloudpickle are sent along unless the same are there;
- whatever fails, the error names the step and the fix, and who reports it the host;
- questions are asked on a terminal, one at a time, and what was answered is not asked again.
"""

from __future__ import annotations

import base64
import contextlib
import getpass
import io
import json
import logging
import os
import queue
import re
import shlex
import signal
import socket
import threading
import time
from collections import deque
from pathlib import Path
from typing import Any, Callable, Dict, Iterable, List, Optional, Tuple, TypeVar

from . import config, outpost
from .errors import ConfigError, LauncherError, TunnelError
from .ssh import Login, on_terminal, parse_server

CONNECT_S = 20.0  # to be logged in, but for the questions
ANSWER_S = 30.0
AGAIN_S, AGAIN_MAX_S = 1.0, 30.0  # between two tries to reach a host that was lost
PARALLEL = 32  # hosts that are talked to at a time
PYTHON_MIN = (3, 9)
NOISE = 20  # lines of what a login prints that may explain its failure
Item = TypeVar("Item")

# `ssh_args`: options with a value, those that change nothing here, and which of `-o` paramiko can do.
_SSH_VALUES = {"-p": "port", "-l": "user", "-i": "identityfile", "-J": "proxyjump"}
_SSH_OTHER_VALUES = tuple("-" + letter for letter in "BbcDEeFIkLmOPQRSWw")
_SSH_MEANINGLESS = ("-t", "-tt", "-T", "-n", "-q", "-x", "-a", "-v", "-vv", "-vvv", "-N", "-k")
_SSH_OPTIONS = ("hostname", "port", "user", "identityfile", "identitiesonly", "identityagent", "proxyjump", "proxycommand",
                "userknownhostsfile", "globalknownhostsfile", "stricthostkeychecking", "hostkeyalias")
_SSH_QUIET = ("batchmode", "requesttty", "loglevel", "serveraliveinterval", "serveralivecountmax", "connecttimeout",
              "tcpkeepalive", "controlmaster", "controlpath", "controlpersist", "forwardx11")


def ssh_options(args: Iterable[str]) -> Tuple[Dict[str, Any], List[str]]:
    """What arguments of the `ssh` program mean to paramiko: (options as `Login` takes them, arguments without effect)."""
    found: Dict[str, Any] = {}
    dropped, words = [], list(args)
    while words:
        word = words.pop(0)
        letter, value = word[:2], word[2:]
        if letter in _SSH_VALUES or letter == "-o" or letter in _SSH_OTHER_VALUES:
            value = value or (words.pop(0) if words else "")
        key, whole = _SSH_VALUES.get(letter, ""), value
        if letter == "-o":
            key, _, value = (part.strip() for part in value.replace(" ", "=", 1).partition("="))
            key = key.lower()
        if key in _SSH_OPTIONS:
            found[key] = [*found.get(key, []), value] if key == "identityfile" else value
        elif word not in _SSH_MEANINGLESS and key not in _SSH_QUIET:
            dropped.append(f"{letter} {whole}" if whole else word)
    return found, dropped


def rooms(engines: Dict[str, Any]) -> List[Tuple[str, int, Dict[str, Any]]]:
    """(host, number of engines, options of that host) of each row of `SSHEngineSetLauncher.engines`.

    Raises:
        ConfigError: a row is something else.
    """
    known = {o.key: o for o in config.OPTIONS if o.section in ("BaseLauncher", "EngineLauncher", "SSHLauncher")}
    found = []
    for host, value in engines.items():
        origin, own = f"engines[{host!r}]", {}
        if isinstance(value, dict):
            own = {key: word for key, word in value.items() if key != "n"}
            value = value.get("n", 1)
        elif isinstance(value, (tuple, list)) and len(value) == 2:
            value, own = value[0], {"engine_args": value[1]}
        if not isinstance(host, str) or isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise ConfigError(f"{origin} of c.SSHEngineSetLauncher needs a number of engines, (number, arguments) or a dict with "
                              f"'n', not {value!r}.")
        for key in own:
            if key not in known:
                raise ConfigError(f"{origin} of c.SSHEngineSetLauncher has an unknown key {key!r}" + config.suggest(key, known))
        found.append((host, value, {key: config.convert(known[key], word, f"{origin}[{key!r}]") for key, word in own.items()}))
    return found


def ours(command: List[str]) -> List[str]:
    """A command in which modules of IPython Parallel are ours."""
    return [re.sub(r"^ipyparallel\.(engine|controller|cluster)$", rf"{package_name()}.\1", word) for word in command]


def path_there(path: config.PathLike) -> str:
    """A path of ours as it is called on other hosts: what lies in our home directory lies in theirs."""
    home, text = os.path.expanduser("~"), os.fspath(path)
    return os.path.relpath(text, home) if text.startswith(home.rstrip("/") + "/") else text


def pairs(value: Any, name: str) -> List[Tuple[str, str]]:
    """The pairs of paths of `to_send` or `to_fetch`.

    Raises:
        ConfigError: it is something else.
    """
    try:
        return [(os.fspath(one), os.fspath(other)) for one, other in value]
    except (TypeError, ValueError):
        raise ConfigError(f"{name} needs a list of pairs of paths, not {value!r}.") from None


def is_loopback(info: Dict[str, Any]) -> bool:
    """Does the controller of a connection file listen on its own host only?"""
    return not info["url"] or bool(re.match(r"tcp://(127\.|\[?::1\]?:|localhost:)", info["url"]))


class Questions:
    """Asks for passwords and passphrases: on a terminal, one at a time, for all hosts."""

    def __init__(self) -> None:
        self._answers: Dict[str, str] = {}
        self._lock = threading.Lock()

    def asker(self) -> Callable[[str], Optional[str]]:
        """A function for one login; an answer that was given before serves once more."""
        used = set()

        def ask(prompt: str) -> Optional[str]:
            with self._lock:
                if prompt not in self._answers or prompt in used:
                    if not on_terminal():
                        return None
                    self._answers[prompt] = getpass.getpass(prompt)
                used.add(prompt)
                return self._answers[prompt]
        return ask


def each(function: Callable[[Item], Any], items: List[Item]) -> Dict[Item, Exception]:
    """Call the function with every item, many at a time; returns what went wrong."""
    trouble: Dict[Item, Exception] = {}
    left = deque(items)

    def work() -> None:
        with contextlib.suppress(IndexError):
            while True:
                item = left.popleft()
                try:
                    function(item)
                except Exception as e:
                    trouble[item] = e

    threads = [threading.Thread(target=work, daemon=True) for _ in range(min(PARALLEL, len(items)))]
    for thread in threads:
        try:
            thread.start()
        except RuntimeError:  # the interpreter is ending
            work()
            break
    for thread in threads:
        if thread.ident is not None:
            thread.join()
    return trouble


# ---------------------------------------------------------------- what is sent along


def packages() -> Dict[str, Path]:
    """What engines import besides pyzmq: {name there: folder here}."""
    from importlib.util import find_spec

    spec = find_spec("cloudpickle")
    if spec is None or not spec.submodule_search_locations:
        raise LauncherError("This Python lacks cloudpickle; install it with `pip install cloudpickle`.")
    return {package_name(): Path(__file__).parent, "cloudpickle": Path(spec.submodule_search_locations[0])}


def package_name() -> str:
    """What this package is called on other hosts."""
    return (__package__ or "").rpartition(".")[2]


def archive_of(names: Iterable[str]) -> str:
    """Packages as the outpost takes them."""
    import zipfile

    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in names:
            for path in sorted(packages()[name].glob("*.py")):
                archive.write(path, f"{name}/{path.name}")
    return base64.b64encode(data.getvalue()).decode()


# ---------------------------------------------------------------- the connection


class Host:
    """An ssh connection with an outpost at its far end.

    Args:
        server: "[user@]host[:port]", or a name in ~/.ssh/config.
        python: the command there that is Python.
        login: makes the connection.
        on_ended: called in another thread with what the outpost tells of a process that has ended.
        on_lost: called in another thread with the reason when the connection has broken.

    Raises:
        LauncherError: there is no connection, or no Python.
    """

    def __init__(self, server: str, python: str, login: Login, on_ended: Callable[[Dict[str, Any]], None],
                 on_lost: Callable[[str], None]):
        self.server, self.python = server, python
        self._on_ended, self._on_lost = on_ended, on_lost
        self._asking = threading.Lock()
        self._answers: "queue.SimpleQueue[Optional[Dict[str, Any]]]" = queue.SimpleQueue()
        self._noise: "deque[str]" = deque(maxlen=NOISE)
        self._closing = self.lost = False
        try:
            self._transport = login.connect(server)
        except TunnelError as e:
            raise LauncherError(_sentence(str(e))) from None
        try:
            self._open()
        except BaseException:
            self.close()
            raise

    def _open(self) -> None:
        import paramiko

        try:
            self._channel = self._transport.open_session(timeout=CONNECT_S)
            self._channel.set_combine_stderr(True)
            self._channel.exec_command(f"exec {_shell_word(self.python)} -u -c 'import sys;exec(sys.stdin.readline())'")
            self._channel.sendall(_bootstrap())
        except (paramiko.SSHException, EOFError, OSError) as e:
            raise LauncherError(f"the ssh server runs no commands for us ({e}); ask its administrator.") from None
        threading.Thread(target=self._read, name=f"outpost on {self.server}", daemon=True).start()
        if self._next(CONNECT_S) is None:
            raise LauncherError(self._why_no_python())

    def _why_no_python(self) -> str:
        if not self.lost:
            return f"{self.python} did not start in {CONNECT_S:g} s."
        self._channel.status_event.wait(CONNECT_S)  # it may come after the end of the output
        code, said = self._channel.exit_status, " ".join(self._noise)
        needs = f"Python {PYTHON_MIN[0]}.{PYTHON_MIN[1]} or newer"
        name = "or name it with c.SSHLauncher.remote_python"
        if "TOO OLD" in said:
            version = said.rpartition("TOO OLD ")[2].split()[0]
            return f"{self.python} is Python {version} there; install {needs} there, {name}."
        if code in (126, 127) or "not found" in said.lower():
            return f"there is no {self.python}; install {needs} there, {name}."
        return f"{self.python} could not be started (exit code {code}{said and ': ' + said}); install {needs} there, {name}."

    @property
    def address(self) -> str:
        """The host's address as we reach it, or "" if others lie between."""
        sock = self._transport.sock
        return str(sock.getpeername()[0]) if isinstance(sock, socket.socket) else ""

    def _read(self) -> None:
        with contextlib.suppress(Exception):  # whatever it is, it is the end of the connection
            for raw in self._channel.makefile("rb"):
                line = raw.decode(errors="replace").rstrip("\n")
                _, mark, text = line.partition(outpost.MARK)
                if not mark:
                    self._noise.append(line.strip())
                    continue
                message = json.loads(text)
                if "ended" in message:
                    self._on_ended(message)
                else:
                    self._answers.put(message)
        self.lost = True
        self._answers.put(None)
        if not self._closing:
            self._on_lost(str(self._transport.get_exception() or "") or "it was closed")

    def _next(self, timeout_s: float) -> Optional[Dict[str, Any]]:
        try:
            return self._answers.get(timeout=timeout_s)
        except queue.Empty:
            return None

    def ask(self, do: str, timeout_s: float = ANSWER_S, fix: str = "", **arguments: Any) -> Any:
        """Have the outpost do something; returns its answer.

        Args:
            fix: what to do about it if it can't be done, as the end of a sentence.

        Raises:
            LauncherError: it could not be done, or there is no answer.
        """
        with self._asking:
            if not self.lost:
                try:
                    self._channel.sendall(json.dumps({"do": do, **arguments}).encode() + b"\n")
                except OSError:
                    self.lost = True
            answer = None if self.lost else self._next(timeout_s)
        if answer is None:
            if not self.lost:
                self.close()  # what it may answer later would be taken for the answer to something else
            raise LauncherError("the ssh connection broke." if self.lost else
                                f"there was no answer in {timeout_s:g} s; is the host overloaded?")
        if "error" in answer:
            raise LauncherError(_sentence(answer["error"] + fix))
        return answer["ok"]

    def close(self) -> None:
        """End the connection, and with it the outpost."""
        self._closing = self.lost = True
        self._transport.close()


def _sentence(text: str) -> str:
    return text if text[-1:] in (".", "?", "!") else text + "."


def _shell_word(python: str) -> str:
    """A command for any shell; a leading ~ is for it to expand."""
    words = shlex.split(python) or ["python3"]
    return " ".join("~/" + shlex.quote(word[2:]) if word.startswith("~/") else shlex.quote(word) for word in words)


def _bootstrap() -> bytes:
    """One line of Python, of any version, that becomes the outpost."""
    source = base64.b64encode(Path(outpost.__file__).read_bytes()).decode()
    return (f"sys.version_info < {PYTHON_MIN} and sys.exit('TOO OLD %d.%d' % sys.version_info[:2]); "
            f"exec(__import__('base64').b64decode('{source}').decode() + '\\nserve()\\n', "
            "{'__name__': 'outpost'})\n").encode()


# ---------------------------------------------------------------- one host of a launcher


class Site:
    """One host of a launcher, and what runs there.

    Args:
        server: as in `Host`.
        n: of engines there.
        options: what `SSHLauncher` and its kin are set to, with what is set for this host.
        command: what the user wants to be run there in place of ours, or [].
        questions: shared by all hosts.
        log: where to tell.

    Attributes: `state`, `reason` (why it is no longer running), `code`, `pid`, `folder`, `log_path`, `far` (what `look`
    found), `on_end` (called in another thread when its process has ended).
    """

    def __init__(self, server: str, n: int, options: Dict[str, Any], command: List[str], questions: Questions,
                 log: logging.Logger):
        self.server, self.n, self.options, self.command, self.log = server, n, options, command, log
        self.state, self.reason, self.code = "before", "", None
        self.pid, self.started, self.hostname = 0, "", ""
        self.folder = self.log_path = self._tail = ""
        self.made: List[str] = []  # files that are there because of us
        self.far: Dict[str, Any] = {}
        self.on_end: Callable[["Site"], None] = lambda site: None
        self._questions = questions
        self._host: Optional[Host] = None
        self._connecting = threading.RLock()
        self._closed = False

    @property
    def connected(self) -> bool:
        """Does the host tell by itself what becomes of what runs there?"""
        return self._host is not None and not self._host.lost

    @property
    def python(self) -> str:
        """The interpreter there: the one that the user's command names, or what is set."""
        return self.command[0] if self.command[1:2] == ["-m"] else self.options.get("remote_python") or "python3"

    # --- connecting

    def host(self) -> Host:
        """The connection; made, or made again, if there is none."""
        with self._connecting:
            if self._host is None or self._host.lost:
                over, _ = ssh_options(self.options.get("ssh_args") or ())
                logging.getLogger("paramiko").addHandler(logging.NullHandler())  # its complaints are in our errors
                try:
                    login = Login(self.options.get("sshkey", ""), None, self._questions.asker(), CONNECT_S, over)
                except ImportError as e:
                    raise LauncherError(f"ssh needs paramiko, which this Python lacks ({e}); install it here with "
                                        "`pip install paramiko`.") from None
                except TunnelError as e:
                    raise LauncherError(_sentence(str(e))) from None
                self._host = Host(self.server, self.python, login, self._ended, self._lost)
                self._closed = False
            return self._host

    def _lost(self, why: str) -> None:
        if self.state == "running":
            self.state, self.reason = "unreachable", f"the ssh connection broke ({why})"
            self.log.warning("%s can't be reached at present, as %s; what runs there goes on.", self.server, self.reason)
            self._reach_again()

    def _reach_again(self) -> None:
        wait_s = AGAIN_S
        while self.state == "unreachable" and not self._closed:
            time.sleep(wait_s)
            wait_s = min(2 * wait_s, AGAIN_MAX_S)
            try:
                if self.state == "unreachable" and not self._closed:
                    self.look_again()
                    self.log.info("%s can be reached again: %s.", self.server, self.state)
            except LauncherError as e:
                self.reason = str(e)

    def look_again(self) -> None:
        """Find out what has become of what was started there."""
        found = self.host().ask("state", folder=self.folder)
        if found["alive"]:
            self.state, self.reason = "running", ""
        else:
            self._ended({**found, "tail": self.output(self._lines, 0)})

    def _ended(self, found: Dict[str, Any]) -> None:
        if self.state == "ended":
            return
        self.code = found.get("code")
        self._tail = found.get("tail", "")
        self.state = "ended"
        threading.Thread(target=self.on_end, args=(self,), daemon=True).start()  # it may ask the host

    @property
    def _lines(self) -> int:
        return int(self.options.get("output_limit", 100))

    # --- starting

    def prepare(self, profile_dir: str, work_dir: str) -> None:
        """Connect, make sure that engines could run there, and make a folder for them.

        Raises:
            LauncherError: names the host, what is missing and the fix.
        """
        host = self.host()
        wanted = {name: outpost.digest(os.fspath(folder)) for name, folder in packages().items()}
        self.far = host.ask("look", packages=wanted, profile=profile_dir, work_dir=work_dir)
        self.hostname = self.far["hostname"]
        if not self.far["has_zmq"]:
            python = self.far["executable"]
            raise LauncherError(f"{python} lacks pyzmq; install it there with `{python} -m pip install pyzmq`, "
                                "or name another Python with c.SSHLauncher.remote_python.")
        if not self.far["has_work_dir"]:
            raise LauncherError(f"there is no directory {self.far['work_dir']}; make it there, or correct work_dir.")
        self.folder = host.ask("open", profile=self.far["profile"],
                               fix="; choose another directory there with c.SSHLauncher.remote_profile_dir")
        if self.far["missing"]:
            host.ask("unpack", timeout_s=10 * ANSWER_S, folder=self.folder, data=archive_of(self.far["missing"]))

    def put(self, data: bytes, path: str, mode: int = 0o600) -> Tuple[str, bool]:
        """Write a file there; returns its path, and whether it was not there with this content."""
        found: Dict[str, Any] = {}
        for at in range(0, max(1, len(data)), outpost.PIECE):
            piece = base64.b64encode(data[at:at + outpost.PIECE]).decode()
            found = self.host().ask("put", path=path, data=piece, mode=mode, first=at == 0,
                                    last=at + outpost.PIECE >= len(data))
        return found["path"], found["made"]

    def get(self, path: str) -> Optional[Tuple[bytes, str]]:
        """(content, absolute path) of a file there; None if there is none."""
        data = b""
        while True:
            found = self.host().ask("get", path=path, offset=len(data))
            if found["data"] is None:
                return None
            piece = base64.b64decode(found.pop("data"))
            data += piece
            if not piece or len(data) >= found["size"]:
                return data, str(found["path"])

    def start(self, args: List[str], env: Dict[str, str], log: str, secrets: List[str], lease_s: float) -> None:
        """Start what lives on when the connection breaks; as `outpost.start`."""
        found = self.host().ask("start", fix="; correct the command", folder=self.folder, args=args, env=env,
                                cwd=self.far["work_dir"], log=log, secrets=secrets, lease_s=lease_s)
        self.pid, self.started, self.log_path = found["pid"], found["start"], found["log"]
        self.state = "running"

    def give_up(self) -> None:
        """After a failure: remove what was made there."""
        with contextlib.suppress(LauncherError):
            self.stop(signal.SIGTERM, ANSWER_S, self.made)
        self.close()

    # --- while it runs

    def send_signal(self, signum: int, depth: int) -> int:
        """As `outpost.send_signal`."""
        return int(self.host().ask("signal", folder=self.folder, signum=signum, depth=depth))

    def output(self, lines: int, depth: int) -> str:
        """The last lines of its log, and of those of its engines."""
        if self.state == "ended" and self._tail or not self.log_path:
            return "\n".join(self._tail.splitlines()[-lines:])
        return str(self.host().ask("log", folder=self.folder, log=self.log_path, lines=lines, depth=depth))

    def log_beside(self, name: str, lines: int) -> str:
        """The last lines of another log there, or ""."""
        path = f"{os.path.dirname(self.log_path)}/{name}"
        return str(self.host().ask("log", folder=self.folder, log=path, lines=lines, depth=0))

    def stop(self, signum: int, grace_s: float, also: Iterable[str] = ()) -> None:
        """End it, and remove what it needed there, and what `also` names."""
        if not self.folder:
            return
        self._closed = True  # nobody is to reach for it any more
        found = self.host().ask("stop", timeout_s=grace_s + ANSWER_S, folder=self.folder, signum=signum, grace_s=grace_s,
                                also=list(also), lines=self._lines)
        self.folder = ""
        if self.state != "ended":
            self.code = found.get("code")
            self._tail = found["tail"]
            self.state = "ended"
        self.close()

    def close(self) -> None:
        """Leave the host."""
        self._closed = True
        if self._host is not None:
            self._host.close()

    # --- the cluster file

    def to_dict(self) -> Dict[str, Any]:
        """What `from_dict` needs; no secrets."""
        kept = {key: self.options[key] for key in ("remote_python", "ssh_args", "sshkey") if self.options.get(key)}
        return {"server": self.server, "n": self.n, "host": self.hostname, "pid": self.pid, "pid_start": self.started,
                "folder": self.folder, "output_file": self.log_path, "options": kept, "command": self.command}

    @classmethod
    def from_dict(cls, state: Dict[str, Any], options: Dict[str, Any], questions: Questions, log: logging.Logger) -> "Site":
        """The site that another process started; not yet connected."""
        self = cls(state["server"], state["n"], {**options, **state["options"]}, state["command"], questions, log)
        self.hostname, self.pid, self.started = state["host"], state["pid"], state["pid_start"]
        self.folder, self.log_path = state["folder"], state["output_file"]
        self.state, self.reason = "unreachable", "it was not asked yet"
        return self


def full_name(user: str, host: str) -> str:
    """"user@host"; a user that `host` names counts more."""
    return f"{user}@{host}" if user and not parse_server(host)[0] else host
