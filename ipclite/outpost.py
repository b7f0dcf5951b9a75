"""What an ssh launcher runs on the other host. This file's source is sent there through the ssh connection.

    Host (hosts.py) ── a JSON request a line ──► outpost ── fork ──► warden ── Popen ──► controller, or agent of engines
                     ◄── answers, and who ended ──  └── reads ── state.json ◄── writes ──┘

Shells differ, and sftp may be off: so nothing is started there but Python, which gets all else through its stdin. The
outpost lives as long as the connection. The warden lives as long as the process that it started, which no end of a
connection touches. All that one start needs there lies in one folder of the profile, `security/ssh-<random>`.

Rules that hold here: nothing but the standard library is imported; nothing secret is in an argument or the environment;
the folder is the user's alone; the warden takes the secrets away when the process has ended, and the folder, too, if
nobody is there for whom its end is news; else `stop` does. A process is its pid and its start time.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import importlib.util
import io
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from typing import Any, Callable, Dict, List, Optional, Tuple

MARK = "@outpost "  # begins each of our lines, so that what login scripts print is told apart
LOOK_S = 0.3  # between two looks at what runs
LEASE_LOOK_S = 1.0
SETTLE_S = 3.0  # for the warden to note the end of a process
ALONE_S = 2.0  # without a look by an outpost, after which none is thought to be there
LEFTOVER_S = 3600.0  # folders of dead processes are kept for so long for somebody to ask
PIECE = 1 << 20  # bytes of a file in one answer
TAIL_BYTES = 64 * 1024

_watched: Dict[str, Dict[str, Any]] = {}  # folder -> state, of what runs and whose end is to be told


def digest(folder: str) -> str:
    """Of the Python files of a package, to tell whether two copies are the same."""
    found = hashlib.sha256()
    for name in sorted(os.listdir(folder)):
        if name.endswith(".py"):
            with open(os.path.join(folder, name), "rb") as file:
                text = file.read()
            found.update(b"%s %d\n" % (name.encode(), len(text)) + text)
    return found.hexdigest()


def absolute(path: str) -> str:
    """As seen from the home directory."""
    home = os.path.expanduser("~")
    return os.path.abspath(os.path.join(home, os.path.expanduser(path)))


# ---------------------------------------------------------------- processes


def processes() -> Dict[int, Tuple[int, int]]:
    """{pid: (parent's pid, session, or 0 where sessions can't be seen)}"""
    found = {}
    if not os.path.isdir("/proc/self"):
        table = subprocess.run(["ps", "-A", "-o", "pid=,ppid="], stdout=subprocess.PIPE, check=True).stdout.split()
        return {int(pid): (int(parent), 0) for pid, parent in zip(table[::2], table[1::2])}
    for name in os.listdir("/proc"):
        fields = _stat(int(name)) if name.isdigit() else []
        if fields:
            found[int(name)] = (int(fields[1]), int(fields[3]))
    return found


def _stat(pid: int) -> List[str]:
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return file.read().decode(errors="replace").rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return []


def started(pid: int) -> str:
    """When a process started, as a text that only serves to compare; "" if there is none, or it is a zombie."""
    if os.path.isdir("/proc/self"):
        fields = _stat(pid)
        return fields[19] if fields and fields[0] not in "ZX" else ""
    done = subprocess.run(["ps", "-o", "stat=,lstart=", "-p", str(pid)], stdout=subprocess.PIPE, check=False)
    status, _, when = done.stdout.decode().strip().partition(" ")
    return "" if status.startswith("Z") else when.strip()


def alive(state: Dict[str, Any]) -> bool:
    """Does the process that a state tells of run?"""
    return "code" not in state and bool(state.get("pid")) and started(state["pid"]) == state["start"]


def below(pid: int) -> List[int]:
    """A process, what descends from it and what is in its session."""
    table, found = processes(), {pid}
    while True:
        more = {one for one, (parent, session) in table.items() if parent in found or session == pid} - found
        if not more:
            return sorted(found)
        found |= more


def engines_of(pid: int, depth: int) -> List[int]:
    """The process itself (`depth` 0), its engines (1: it is their agent), or those of the agents that it started (2)."""
    table, found = processes(), [pid]
    for level in range(depth):
        last = level == depth - 1  # an engine is in its agent's session; helpers of an agent are not
        found = [one for one, (parent, session) in table.items()
                 if parent in found and (not last or session == table[parent][1])]
    return found


def _wait(condition: Callable[[], bool], timeout_s: float) -> bool:
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def _kill(pid: int, signum: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signum)


# ---------------------------------------------------------------- files


def _write_state(folder: str, state: Dict[str, Any]) -> None:
    path = os.path.join(folder, "state.json")
    with open(path + ".new", "w") as file:
        json.dump(state, file)
    os.replace(path + ".new", path)


def _read_state(folder: str) -> Dict[str, Any]:
    try:
        with open(os.path.join(folder, "state.json")) as file:
            return dict(json.load(file))
    except (OSError, ValueError):
        return {}


def tail(log: str, lines: int) -> str:
    """The last lines of a log."""
    try:
        with open(log, "rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL_BYTES))
            text = file.read().decode(errors="replace")
    except OSError:
        return ""
    return "\n".join(text.splitlines()[-lines:])


def _sweep(security: str) -> None:
    """Remove what starts of long ago, whose launchers never came back, left on this host."""
    for name in os.listdir(security):
        folder = os.path.join(security, name)
        if name.startswith("ssh-"):
            state = _read_state(folder)
            with contextlib.suppress(OSError):
                old = time.time() - os.stat(folder).st_mtime > LEFTOVER_S
                if old and state.get("host", socket.gethostname()) == socket.gethostname() and not alive(state):
                    shutil.rmtree(folder, ignore_errors=True)


# ---------------------------------------------------------------- what is asked for


def look(packages: Dict[str, str], profile: str, work_dir: str) -> Dict[str, Any]:
    """What this host is like; `packages` maps a name to the digest that it should have."""
    sys.path[:] = [entry for entry in sys.path if entry]  # what lies in the home directory is not installed
    missing = []
    for name, wanted in packages.items():
        spec = importlib.util.find_spec(name)
        folders = list(spec.submodule_search_locations or []) if spec else []
        if not folders or digest(folders[0]) != wanted:
            missing.append(name)
    return {"python": list(sys.version_info[:3]), "executable": sys.executable, "hostname": socket.gethostname(),
            "has_zmq": importlib.util.find_spec("zmq") is not None, "missing": missing, "profile": absolute(profile),
            "work_dir": absolute(work_dir), "has_work_dir": os.path.isdir(absolute(work_dir))}


def open_folder(profile: str) -> str:
    """Make a new folder in a profile, which is made if need be."""
    for name, mode in (("security", 0o700), ("pid", 0o700), ("log", 0o755)):
        os.makedirs(os.path.join(profile, name), mode=mode, exist_ok=True)
    security = os.path.join(profile, "security")
    os.chmod(security, 0o700)
    _sweep(security)
    folder = os.path.join(security, f"ssh-{os.urandom(6).hex()}")
    os.mkdir(folder, 0o700)
    return folder


def unpack(folder: str, data: str) -> None:
    """Put packages, in a zip archive, where what is started will find them."""
    import zipfile

    with zipfile.ZipFile(io.BytesIO(base64.b64decode(data))) as archive:
        archive.extractall(os.path.join(folder, "lib"))


def put(path: str, data: str, mode: int, first: bool, last: bool) -> Dict[str, Any]:
    """Write a file, in one or more pieces; tells whether it has been made, or was there with this content."""
    path, piece = absolute(path), base64.b64decode(data)
    if first and last and os.path.isfile(path):
        with open(path, "rb") as file:
            if file.read() == piece:
                return {"path": path, "made": False}
    os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
    part = f"{path}.part-{os.getpid()}"
    flags = os.O_WRONLY | os.O_CREAT | (os.O_TRUNC if first else os.O_APPEND)
    with open(os.open(part, flags, mode), "wb") as file:
        file.write(piece)
    if last:
        os.chmod(part, mode)
        os.replace(part, path)
    return {"path": path, "made": True}


def get(path: str, offset: int) -> Dict[str, Any]:
    """A piece of a file; "data" is None if there is no such file."""
    path = absolute(path)
    try:
        with open(path, "rb") as file:
            file.seek(offset)
            piece, size = file.read(PIECE), os.fstat(file.fileno()).st_size
    except FileNotFoundError:
        return {"path": path, "data": None}
    return {"path": path, "data": base64.b64encode(piece).decode(), "size": size}


def start(folder: str, args: List[str], env: Dict[str, str], cwd: str, log: str, secrets: List[str],
          lease_s: float) -> Dict[str, Any]:
    """Start a process that outlives us.

    Args:
        log: path of its log; "{pid}" in it becomes its pid.
        secrets: files to be removed when it has ended, as are the packages in the folder.
        lease_s: end it when no outpost has looked after it for so long; 0: let it be.
    """
    reading, writing = os.pipe()
    middle = os.fork()
    if not middle:
        try:
            os.setsid()
            if not os.fork():  # so that it is nobody's child but init's
                os.close(reading)
                _warden(writing, folder, args, env, cwd, log, secrets, lease_s)
        finally:
            os._exit(0)
    os.close(writing)
    os.waitpid(middle, 0)
    with open(reading) as answer:
        state: Dict[str, Any] = json.loads(answer.read() or '{"error": "its warden could not be started"}')
    if "error" in state:
        raise OSError(0, state["error"])
    _watched[folder] = state
    return state


def _warden(writing: int, folder: str, args: List[str], env: Dict[str, str], cwd: str, log: str, secrets: List[str],
            lease_s: float) -> None:
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):  # the connection must not wait for us
        os.dup2(null, fd)
    environment = {**os.environ, **env}
    lib = os.path.join(folder, "lib")
    if os.path.isdir(lib):
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (lib, environment.get("PYTHONPATH"))))
    unnamed = log.replace("{pid}", os.path.basename(folder))
    try:
        with open(unnamed, "wb") as output:
            popen = subprocess.Popen([os.path.expanduser(args[0]), *args[1:]], stdin=null, stdout=output,
                                     stderr=subprocess.STDOUT, cwd=cwd, env=environment, start_new_session=True)
    except OSError as e:
        answer: Dict[str, Any] = {"error": f"{e.filename}: {e.strerror}"}
        with contextlib.suppress(OSError):
            os.unlink(unnamed)
    else:
        log = log.replace("{pid}", str(popen.pid))
        os.replace(unnamed, log)
        answer = {"pid": popen.pid, "start": started(popen.pid), "host": socket.gethostname(), "log": log,
                  "secrets": secrets}
        _write_state(folder, answer)
    os.write(writing, json.dumps(answer).encode())
    os.close(writing)
    if "error" in answer:
        return
    if lease_s:
        threading.Thread(target=_watch_lease, args=(folder, popen, lease_s), daemon=True).start()
    code = popen.wait()
    with contextlib.suppress(OSError):  # who stopped it has removed the folder
        _remove(secrets + [lib])
        _write_state(folder, {**answer, "code": code})
        noted = os.stat(folder).st_mtime
        if not _wait(lambda: os.stat(folder).st_mtime != noted, ALONE_S):  # nobody is there to ask for it
            _remove([folder])


def _watch_lease(folder: str, popen: Any, lease_s: float) -> None:
    """End the process when whoever it belongs to has been away for too long, whatever clocks are set to meanwhile."""
    renewed, since = 0.0, time.monotonic()
    while True:
        time.sleep(LEASE_LOOK_S)
        with contextlib.suppress(OSError):
            before, renewed = renewed, os.stat(folder).st_mtime
            if renewed != before:
                since = time.monotonic()
            if time.monotonic() - since > lease_s:
                popen.terminate()
                time.sleep(10 * LEASE_LOOK_S)
                for pid in below(popen.pid):
                    _kill(pid, signal.SIGKILL)


def _remove(paths: List[str]) -> None:
    for path in paths:
        shutil.rmtree(path, ignore_errors=True) if os.path.isdir(path) else _unlink(path)


def _unlink(path: str) -> None:
    with contextlib.suppress(OSError):
        os.unlink(path)


def state_of(folder: str) -> Dict[str, Any]:
    """What has become of a process; its end will be told."""
    state = _read_state(folder)
    running = alive(state)
    if running:
        _watched[folder] = state
    return {**state, "alive": running}


def log_of(folder: str, log: str, lines: int, depth: int) -> str:
    """The last lines of a log, and of those of the engines that run."""
    state, texts = _read_state(folder), [tail(log, lines)]
    if depth and alive(state):
        start = log.rpartition(f"-{state['host']}-")[0]
        texts += [tail(f"{start}-{pid}.log", lines) for pid in engines_of(state["pid"], depth)]
    return "\n".join(filter(None, texts))


def send_signal(folder: str, signum: int, depth: int) -> int:
    """Signal a process, or the engines below it; returns how many got it."""
    state = _read_state(folder)
    found = engines_of(state["pid"], depth) if alive(state) else []
    for pid in found:
        _kill(pid, signum)
    return len(found)


def stop(folder: str, signum: int, grace_s: float, also: List[str], lines: int) -> Dict[str, Any]:
    """End a process, and with force what has not ended after `grace_s`; then remove its folder, its secrets, and what
    `also` names."""
    _watched.pop(folder, None)
    state = _read_state(folder)
    if alive(state):
        family = below(state["pid"])
        _kill(state["pid"], signum)
        if not _wait(lambda: not alive(state), grace_s):
            for pid in sorted({*family, *below(state["pid"])}):
                _kill(pid, signal.SIGKILL)
        _wait(lambda: "code" in _read_state(folder), SETTLE_S)
        state = _read_state(folder) or state
    last = tail(state.get("log", ""), lines)
    _remove([*state.get("secrets", []), *also, folder])
    return {**state, "tail": last}


OPERATIONS: Dict[str, Callable[..., Any]] = {
    "look": look, "open": open_folder, "unpack": unpack, "put": put, "get": get, "start": start, "state": state_of,
    "log": log_of, "signal": send_signal, "stop": stop}


# ---------------------------------------------------------------- the conversation


def _say(answer: Dict[str, Any]) -> None:
    sys.stdout.write(MARK + json.dumps(answer) + "\n")
    sys.stdout.flush()


def _answer(request: Dict[str, Any]) -> None:
    operation = OPERATIONS[request.pop("do")]
    try:
        _say({"ok": operation(**request)})
    except OSError as e:
        _say({"error": ": ".join(filter(None, (str(e.filename or ""), e.strerror or str(e))))})


def _look_after(lines: int) -> None:
    """Show that somebody is there, and tell what has ended."""
    for folder, state in list(_watched.items()):
        if not state.get("told") and not alive(state):
            _wait(lambda folder=folder: "code" in _read_state(folder), SETTLE_S)  # type: ignore[misc]
            _say({"ended": folder, **_read_state(folder), "tail": tail(state["log"], lines)})
            state["told"] = True
        with contextlib.suppress(OSError):
            now = time.time()
            os.utime(folder, (now, now))


def serve(lines: Optional[int] = None) -> None:
    """Answer until stdin ends."""
    _say({"ok": "ready"})
    while True:
        if select.select([sys.stdin], [], [], LOOK_S)[0]:
            line = sys.stdin.readline()
            if not line:
                return
            _answer(json.loads(line))
        _look_after(lines or 100)
