"""Files that processes find each other by: connection files, cluster files, sockets; and is their writer alive?

    controller ──write_json──► <profile>/security/ipcontroller[-<id>]-{client,engine}.json ──read_connection──► others
               ──► runtime_dir()/<run>/{client,engine}, the sockets

Rules that hold here:
- what is written is written whole, by a rename, or not at all;
- files with secrets are 0600, in 0700 directories, and refused when others can read them;
- a process is its pid and its start time, so that a recycled pid is never taken for it.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import stat
import threading
import time
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Union

from .errors import ConfigError, ConnectionFileError

PROGRAM = "ipclite"  # marks our files, so that another program's are told apart
SOCKET_PATH_MAX = 107  # bytes, the limit of sun_path
SOCKET_NAME_MAX = 40  # bytes left below runtime_dir() for the name of a socket
LOCK_PATIENCE_S = 30.0
LOCK_AGE_S = 60.0  # nobody holds a lock for so long
PathLike = Union[str, "os.PathLike[str]"]


@contextlib.contextmanager
def locked(path: PathLike) -> Iterator[None]:
    """Keep out of the block who else locks the file `path`, also on other hosts that see it.

    A hard link is made or not made at once, even on network file systems that lock nothing. A lock whose holder is
    dead, or that is older than any holder needs, is broken.

    Raises:
        ConfigError: the directory can't be written, or somebody holds the lock for `LOCK_PATIENCE_S`.
    """
    path = Path(path)
    own = path.with_name(f"{path.name}.{socket.gethostname()}.{os.getpid()}.{threading.get_ident()}")
    write_json(own, {"host": socket.gethostname(), "pid": os.getpid(), "pid_start": process_start(os.getpid())})
    deadline = time.monotonic() + LOCK_PATIENCE_S
    try:
        while not _take_lock(own, path):
            if time.monotonic() > deadline:
                raise ConfigError(f"{path} is held by another process; remove it if no cluster is being started.")
            if not _break_lock(path, own.with_name(own.name + ".stale")):
                time.sleep(0.01)
    finally:
        own.unlink()
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


def _take_lock(own: Path, path: Path) -> bool:
    try:
        os.link(own, path)
    except FileExistsError:
        return own.stat().st_nlink == 2  # it was made, but the answer got lost
    except OSError:  # a file system without hard links
        try:
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
        except FileExistsError:
            return False
        path.write_bytes(own.read_bytes())
    return True


def _break_lock(path: Path, aside: Path) -> bool:
    """Remove the lock `path` if nobody holds it any more; tells whether to try at once."""
    try:
        before, age_s = path.read_bytes(), time.time() - path.stat().st_mtime
        holder = json.loads(before)
        dead = holder["host"] == socket.gethostname() and not process_alive(holder["pid"], holder["pid_start"])
    except FileNotFoundError:
        return True
    except (ValueError, KeyError, TypeError):
        dead = False  # it is being written, or garbage that grows old
    if not dead and age_s < LOCK_AGE_S:
        return False
    _remove_lock(path, aside, before)
    return True


def _remove_lock(path: Path, aside: Path, before: bytes) -> None:
    with contextlib.suppress(FileNotFoundError):  # others are breaking it as well
        path.rename(aside)
        if aside.read_bytes() != before:  # they were quicker, and this is the next holder's
            with contextlib.suppress(FileExistsError):
                os.link(aside, path)
        aside.unlink()


def take_hold(path: PathLike) -> str:
    """Lock the file `path` for as long as this process lives, also against other hosts that see it.

    A holder on this host that has ended does not count; nor does one on another host that has not called `keep_hold` for
    `LOCK_AGE_S`.

    Returns:
        "", or who holds it.

    Raises:
        ConfigError: the directory can't be written.
    """
    path = Path(path)
    own = path.with_name(f"{path.name}.{socket.gethostname()}.{os.getpid()}.{threading.get_ident()}")
    write_json(own, {"host": socket.gethostname(), "pid": os.getpid(), "pid_start": process_start(os.getpid())})
    try:
        while not _take_lock(own, path):
            try:
                before, age_s = path.read_bytes(), own.stat().st_mtime - path.stat().st_mtime
                holder = json.loads(before)
                here = holder["host"] == socket.gethostname()
                if process_alive(holder["pid"], holder["pid_start"]) if here else age_s < LOCK_AGE_S:
                    return f"pid {holder['pid']} on {holder['host']}"
            except FileNotFoundError:
                continue
            except (ValueError, KeyError, TypeError):
                if own.stat().st_mtime - path.stat().st_mtime < LOCK_AGE_S:  # it is being written, or garbage that grows old
                    return f"whoever has just written {path}"
            _remove_lock(path, own.with_name(own.name + ".stale"), before)
    finally:
        own.unlink()
    return ""


def keep_hold(path: PathLike) -> bool:
    """Say that we still hold a lock; False if another process has taken it."""
    try:
        holder = json.loads(Path(path).read_bytes())
        os.utime(path)
    except (OSError, ValueError):
        return False
    return bool((holder["host"], holder["pid"]) == (socket.gethostname(), os.getpid()))


def runtime_dir() -> Path:
    """The directory of our sockets, 0700 and ours: `$IPCLITE_RUNTIME_DIR` or `$TMPDIR/ipclite-<uid>`.

    Raises:
        ConfigError: it can't be written, is open to others, or is too long for a socket's path.
    """
    chosen = os.environ.get("IPCLITE_RUNTIME_DIR")
    longest = SOCKET_PATH_MAX - SOCKET_NAME_MAX
    name = f"{PROGRAM}-{os.getuid() if hasattr(os, 'getuid') else os.environ.get('USERNAME', 'user')}"
    path = Path(os.path.abspath(chosen) if chosen else os.path.join(os.environ.get("TMPDIR") or "/tmp", name))
    if len(os.fsencode(path)) > longest:
        if chosen:
            raise ConfigError(f"$IPCLITE_RUNTIME_DIR, {path}, is longer than {longest} bytes; choose a shorter one.")
        path = Path("/tmp", name)
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = path.lstat()
        if not os.access(path, os.W_OK | os.X_OK):
            raise PermissionError(0, "permission denied")
    except OSError as e:
        raise ConfigError(f"The runtime directory {path} can't be written ({e.strerror}); set IPCLITE_RUNTIME_DIR "
                          "to a directory of yours.") from None
    if not stat.S_ISDIR(found.st_mode) or (hasattr(os, "getuid") and found.st_uid != os.getuid()):
        raise ConfigError(f"The runtime directory {path} is not a directory of yours; set IPCLITE_RUNTIME_DIR to one.")
    if os.name == "posix" and found.st_mode & 0o077:
        raise ConfigError(f"The runtime directory {path} is open to others; run `chmod 700 {path}`.")
    return path


# ---------------------------------------------------------------- connection files


def connection_file(profile_dir: PathLike, cluster_id: str, role: str) -> Path:
    """`<profile>/security/ipcontroller[-<cluster_id>]-<role>.json`; `role` is "client" or "engine"."""
    return Path(profile_dir, "security", "-".join(filter(None, ("ipcontroller", cluster_id, role))) + ".json")


def cluster_file(profile_dir: PathLike, cluster_id: str) -> Path:
    """`<profile>/security/cluster-<cluster_id>.json`"""
    return Path(profile_dir, "security", f"cluster-{cluster_id}.json")


def names_jobs(path: PathLike) -> bool:
    """Does a cluster file name jobs of a batch system? They can be cancelled from anywhere, by who reads it."""
    try:
        found = read_json(path)
        states = [*found.get("engines", {}).get("sets", {}).values(), found.get("controller", {}).get("state", {})]
        return any("jobs" in state for state in states)
    except (ConnectionFileError, AttributeError, TypeError):
        return False


def remove_sockets(info: Dict[str, Any]) -> None:
    """Remove the sockets, and their directory, of a run that has ended; `info` is what its connection file says."""
    if info["ipc"]:
        folder = Path(info["ipc"]).parent
        for role in ("client", "engine"):
            (folder / role).unlink(missing_ok=True)
        try:
            folder.rmdir()
        except FileNotFoundError:
            pass


def write_json(path: PathLike, obj: Any, mode: int = 0o600) -> None:
    """Write `obj` to `path` so that a reader sees the whole of it or nothing.

    Raises:
        ConfigError: it can't be written; no partial file is left.
    """
    write_text(path, json.dumps(obj, indent=2, default=os.fspath) + "\n", mode)


def write_text(path: PathLike, text: str, mode: int = 0o600) -> None:
    """Write `text` to `path` so that a reader sees the whole of it or nothing.

    Raises:
        ConfigError: it can't be written; no partial file is left.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with open(temporary, "w", encoding="utf-8", opener=lambda name, flags: os.open(name, flags, mode)) as file:
            file.write(text)
        os.chmod(temporary, mode)
        os.replace(temporary, path)
    except OSError as e:
        with contextlib.suppress(OSError):  # what can't be written may be impossible to remove, too
            temporary.unlink()
        raise ConfigError(f"{path} can't be written: {e.strerror}.") from None


def read_json(path: PathLike) -> Dict[str, Any]:
    """The object in a JSON file.

    Raises:
        ConnectionFileError: there is no such file, it is empty, cut short, or no JSON object.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConnectionFileError(f"There is no file {path}; is the controller running?") from None
    except (OSError, UnicodeDecodeError) as e:
        raise ConnectionFileError(f"{path} can't be read: {getattr(e, 'strerror', None) or e}.") from None
    if not text.strip():
        raise ConnectionFileError(f"{path} is empty; restart the controller, which writes it.")
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as e:
        raise ConnectionFileError(f"{path} is cut short or no JSON ({e}); restart the controller, which writes "
                                  "it.") from None
    if not isinstance(found, dict):
        raise ConnectionFileError(f"{path} is no connection file: it holds a JSON {type(found).__name__}.")
    return found


def read_connection(path: PathLike, role: Optional[str] = None, protocol: Optional[int] = None) -> Dict[str, Any]:
    """The content of a connection file.

    Args:
        role: "client" or "engine"; another role's file is refused.
        protocol: `wire.VERSION`; a file of another version is refused.

    Raises:
        ConnectionFileError: names what is wrong with it.
    """
    try:
        found = read_json(path)
    except ConnectionFileError as e:
        raise ConnectionFileError(f"{e}{_others(Path(path))}") from None
    info = check_connection(found, os.fspath(path), role, protocol)
    with contextlib.suppress(FileNotFoundError):  # it has gone since it was read
        if os.name == "posix" and Path(path).stat().st_mode & 0o077:
            raise ConnectionFileError(f"{path} can be read by others, who could use its keys; run `chmod 600 {path}`.")
    return info


def _others(path: Path) -> str:
    """What to say about a connection file that is not there: which clusters do have one, or how to start one."""
    match = re.fullmatch(r"ipcontroller(?:-.+)?-(client|engine)\.json", path.name)
    if match is None or path.exists():
        return ""
    names = sorted(other.name for other in path.parent.glob(f"ipcontroller*-{match[1]}.json"))
    ids = [name[len("ipcontroller"):-len(f"-{match[1]}.json")].lstrip("-") or "''" for name in names]
    if ids:
        return f" There are files of --cluster-id={', '.join(ids)} (cluster_id=)."
    return " `ipcluster start` starts one, with engines." if match[1] == "client" else ""


def check_connection(info: Dict[str, Any], where: str, role: Optional[str] = None,
                     protocol: Optional[int] = None) -> Dict[str, Any]:
    """`info` if it is what a controller writes into a connection file; `where` is what the error calls it.

    Raises:
        ConnectionFileError: names what is wrong with it.
    """
    if info.get("program") != PROGRAM:
        whose = "of IPython Parallel" if "registration" in info or "exec_key" in info else "of another program"
        raise ConnectionFileError(f"{where} is {whose}; give the connection file that the {PROGRAM} controller wrote.")
    wanted = {"role": str, "url": str, "ipc": str, "run_id": str, "protocol": int, "pid": int, "host": str}
    missing = [key for key, kind in wanted.items() if not isinstance(info.get(key), kind)]
    if missing:
        raise ConnectionFileError(f"{where} lacks {', '.join(missing)}; restart the controller, which writes it.")
    if role and info["role"] != role:
        raise ConnectionFileError(f"{where} is for the role of {info['role']}, not {role}; give the file whose name "
                                  f"ends in -{role}.json.")
    if protocol is not None and info["protocol"] != protocol:
        age = "newer" if info["protocol"] > protocol else "older"
        raise ConnectionFileError(f"{where} is of a controller with a {age} protocol ({PROGRAM} {info.get('version')}, "
                                  f"protocol {info['protocol']}; ours is {protocol}); install the same version here.")
    return info


def dead_run(info: Dict[str, Any]) -> str:
    """Why the controller that wrote the connection file `info` is known to be gone, or "" if it may be alive."""
    if info["host"] == socket.gethostname() and not process_alive(info["pid"], info.get("pid_start")):
        return f"its controller (pid {info['pid']} on {info['host']}) is gone"
    return ""


# ---------------------------------------------------------------- processes


def process_start(pid: int) -> Optional[str]:
    """When process `pid` started, as a text that only serves to compare; None if there is no such process."""
    fields = proc_stat(pid)
    if fields is not None:
        return fields[19] if fields else None
    import subprocess

    done = subprocess.run(["ps", "-o", "lstart=", "-p", str(pid)], stdout=subprocess.PIPE, check=False)
    return done.stdout.decode().strip() or None


def process_alive(pid: int, started: Optional[str] = None) -> bool:
    """Is process `pid` running, and the one that had `process_start(pid) == started`? A zombie is not."""
    if not 0 < pid < 1 << 31:
        return False
    if os.name == "posix":
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            pass  # it exists, and is another user's
    fields = proc_stat(pid)
    if fields is not None and (not fields or fields[0] in "ZX"):
        return False
    return started is None or process_start(pid) == started


def proc_stat(pid: int) -> Optional[List[str]]:
    """Fields of /proc/<pid>/stat from the state on; [] if there is no such process, None if there is no /proc."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return file.read().decode(errors="replace").rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return [] if os.path.exists("/proc/self/stat") else None


def raise_file_limit() -> int:
    """Allow this process as many open files as it may ask for; returns how many (0: unknown)."""
    try:
        import resource
    except ImportError:
        return 0
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(ValueError, OSError):  # some systems call a limit unlimited and mean another one
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return int(resource.getrlimit(resource.RLIMIT_NOFILE)[0])


def memory_limit() -> int:
    """Bytes of memory that this process may use: the machine's, or the limit of its control group."""
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 1 << 62]
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):  # there is none, or it is "max"
            limits.append(int(Path(path).read_text()))
    return min(limits)
