"""`ipcluster`: start, stop, list, ask and clean clusters from the shell.

    words ──► config.parse ──► Settings ──► one function per command (`COMMANDS`) ──► exit code

Rules that hold here: what is asked for is done, or fails with one sentence and the exit code of its error; whatever
ends `start` or `engines`, nothing of theirs is left running, unless they were told to `--daemonize`.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import signal
import sys
import time
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Callable, Dict, Iterable, Iterator, List, NoReturn, Optional, Tuple, Type

from . import config, launchers
from .cluster import Cluster, all_profile_dirs, clean_cluster_files, cluster_files, label, profile_name
from .errors import (EXIT_FAILURE, AlreadyStopped, ConfigError, ConnectionFileError, IPythonError, NoCluster, UserError)


FOLLOW_S = 0.1  # between two looks for what was written to a log


class Signalled(BaseException):
    """SIGINT, SIGTERM or SIGHUP arrived: stop everything."""


def _on_signal(signum: int, frame: Any) -> NoReturn:
    raise Signalled(signal.Signals(signum))


def _set_signals(handler: Any) -> None:
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        signum = getattr(signal, name, None)
        if signum is not None and signal.getsignal(signum) != signal.SIG_IGN:  # which nohup asks for
            signal.signal(signum, handler)


def _start(settings: config.Settings) -> int:
    def start(cluster: Cluster) -> None:
        cluster.start_and_connect_sync().close()

    def serve(detach: Optional[Callable[[], None]] = None) -> int:
        cluster = Cluster.from_settings(settings, shutdown_atexit=detach is not None or not settings["Cluster.daemonize"])
        _check_job_flags(settings, cluster.controller_launcher_class, cluster.engine_launcher_class)
        if settings["Cluster.dry_run"]:
            return _show_scripts(cluster, "controller", "engine")
        return _serve(cluster, settings, start, detach)

    watched = settings["Cluster.keep_engines"] or settings["Cluster.restart_controller"]
    return _in_background(settings, serve) if settings["Cluster.daemonize"] and watched else serve()


def _check_job_flags(settings: config.Settings, *chosen: Type[launchers.BaseLauncher]) -> None:
    """Refuse flags that say what jobs need when nothing is to be a job."""
    vain = [given.origin for name, given in settings.layers[-1].items() if name.startswith("BatchSystemLauncher.")]
    if vain and not any(launcher.queued for launcher in chosen):
        raise ConfigError(f"{vain[0]} is for the jobs of a batch system: name it, as in --engines=slurm, or leave the flag out.")


def _engines(settings: config.Settings) -> int:
    def start(cluster: Cluster) -> None:
        with cluster.connect_client_sync() as client:
            before = len(client.ids)
            cluster.start_engines_sync()
            if cluster.engine_launcher_class.queued:
                cluster.note_engines()  # at once: `ipcluster stop` is to find the jobs, whatever becomes of us
            cluster.wait_for_engines(client, before + cluster.size)
        if settings["Cluster.daemonize"] and not cluster.engine_launcher_class.queued:
            cluster.note_engines()

    cluster = Cluster.from_settings(settings, shutdown_atexit=not settings["Cluster.daemonize"], cluster_file="")
    _check_job_flags(settings, cluster.engine_launcher_class)
    return _show_scripts(cluster, "engine") if settings["Cluster.dry_run"] else _serve(cluster, settings, start)


def _show_scripts(cluster: Cluster, *roles: str) -> int:
    """Print what would be run or submitted."""
    for role in roles:
        print(f"# ---- {role}\n{cluster.job_script(role)}")
    return 0


def _relay_signals(cluster: Cluster) -> None:
    """What the system leaves to programs, and is sent to us, is meant for the engines."""
    for name in ("SIGUSR1", "SIGUSR2", "SIGINFO"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), lambda signum, _: cluster.signal_engines_sync(signum))


def _in_background(settings: config.Settings, serve: Callable[[Callable[[], None]], int]) -> int:
    """Have a process of its own `serve`, which watches the cluster as long as that runs; returns once it calls `detach`, or
    has ended."""
    read, write = os.pipe()
    pid = os.fork()
    if pid:
        os.close(write)
        return 0 if os.read(read, 1) else os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) & 0xFF

    def detach() -> None:
        path = config.log_file(settings.profile_dir, "ipcluster", settings["Application.cluster_id"], os.getpid())
        log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        for fd, onto in ((os.open(os.devnull, os.O_RDONLY), 0), (log, 1), (log, 2)):
            os.dup2(fd, onto)
        os.write(write, b"!")

    code = EXIT_FAILURE
    try:
        os.setsid()
        os.close(read)
        code = config.run_main("ipcluster", lambda argv: serve(detach), [])
    finally:
        sys.stdout.flush()
        os._exit(code)


def _serve(cluster: Cluster, settings: config.Settings, start: Callable[[Cluster], None],
           detach: Optional[Callable[[], None]] = None) -> int:
    """Start; then return if we are to daemonize, else stay until something ends or a signal comes. `detach` is called in
    between by who stays in the background."""
    _set_signals(_on_signal)
    ready = keep = False
    try:
        start(cluster)
        ready = True
        _relay_signals(cluster)
        _tell_ready(cluster, settings)
        keep = settings["Cluster.daemonize"] and detach is None
        if detach is not None:
            detach()
        return 0 if keep else _stay(cluster)
    except Signalled as e:
        print(f"Got {e.args[0].name}, stopping.", flush=True)
        return 0 if ready else 128 + e.args[0]
    finally:
        _set_signals(signal.SIG_IGN)
        if not keep:
            cluster.stop_cluster_sync()


def _tell_ready(cluster: Cluster, settings: config.Settings) -> None:
    words = {"profile": settings["Application.profile"], "profile_dir": settings["Application.profile_dir"],
             "cluster_id": cluster.cluster_id}
    arguments = ", ".join(f"{key}={value!r}" for key, value in words.items() if value)
    flags = "".join(f" --{key.replace('_', '-')}={value}" for key, value in words.items() if value)
    copied = "." in (__package__ or "")  # into a project, where no command of this name need be
    program = f"python -m {__package__}.cluster" if copied else "ipcluster"
    print(f"{cluster.size} engines are ready. Logs are in {cluster.profile_dir / 'log'}\n"
          f"Connect:  import {__package__} as ipp; rc = ipp.Client({arguments})\n"
          f"Stop:     {'' if settings['Cluster.daemonize'] else 'Ctrl-C, or '}{program} stop{flags}", flush=True)


def _stay(cluster: Cluster) -> int:
    """Wait until the controller or the engines have ended; returns the exit code."""
    ends: "SimpleQueue[Tuple[launchers.BaseLauncher, Dict[str, Any]]]" = SimpleQueue()
    watched: List[launchers.BaseLauncher] = [*filter(None, [cluster.controller])]
    if not (cluster.keep_engines and watched):
        watched += cluster.engines.values()
    for launcher in watched:
        launcher.on_stop(functools.partial(lambda launcher, data: ends.put((launcher, data)), launcher))
    launcher, data = ends.get()
    while cluster.controller not in (None, launcher) and launcher.role == "controller" and cluster.controller.running:
        launcher = cluster.controller  # it was started anew
        launcher.on_stop(functools.partial(lambda launcher, data: ends.put((launcher, data)), launcher))
        launcher, data = ends.get()
    if cluster.controller is not None and not cluster.controller.running:  # the engines end because of that
        launcher, data = cluster.controller, cluster.controller.stop_data
    name = {"controller": "controller", "engine": "engines"}[launcher.role]
    if data.get("exit_code") == 0:
        print(f"The {name} stopped; stopping the rest.", flush=True)
        return 0
    print(f"The {name} {data['reason']}; stopping the rest.{cluster._tails([launcher])}", file=sys.stderr, flush=True)
    return EXIT_FAILURE


def _stop(settings: config.Settings) -> int:
    ids = settings.args or [settings["Application.cluster_id"]]
    if settings["IPClusterStop.all_cluster_ids"]:
        paths = cluster_files([settings.profile_dir])
        if not paths:
            raise NoCluster(f"There is no cluster in {settings.profile_dir}.")
    else:
        paths = [config.cluster_file(settings.profile_dir, cluster_id) for cluster_id in ids]
    for path in paths:
        cluster = Cluster.from_file(path)
        alive = cluster.running
        for launcher in filter(None, [cluster.controller, *cluster.engines.values()]):
            launcher.stop_signal = settings["IPClusterStop.signal"]
        cluster.stop_cluster_sync()
        if not alive:
            raise AlreadyStopped(f"{label(cluster.cluster_id)} is not running any more; its files are removed. "
                                 f"{cluster.reason}".rstrip())
        print(f"Stopped {label(cluster.cluster_id)}.")
    return 0


def _list(settings: config.Settings) -> int:
    named = settings["Application.profile"] or settings["Application.profile_dir"]
    folders = [settings.profile_dir] if named else all_profile_dirs(settings["Application.ipython_dir"])
    wanted = settings["Application.cluster_id"]
    paths = [path for path in cluster_files(folders) if not wanted or path.name == f"cluster-{wanted}.json"]
    launchers.foresee_jobs(_states_in(paths))
    rows = [row for row in map(_row, paths) if row]
    if settings["IPClusterList.output_format"] == "json":
        print(json.dumps(rows, indent=2))
        return 0
    table: List[Tuple[Any, ...]] = [("PROFILE", "CLUSTER ID", "STATE", "ENGINES", "LAUNCHER", "HOST", "AGE", "REASON")]
    for row in rows:
        ready = "?" if row["engines_ready"] is None else row["engines_ready"]
        table.append((row["profile"], row["cluster_id"] or "''", row["state"], f"{ready}/{row['engines']}",
                      row["launcher"], row["host"], _age(row["age"]), row["reason"]))
    print_table(table)
    return 0


def _states_in(paths: Iterable[Path]) -> Iterator[Dict[str, Any]]:
    """What cluster files hold of launchers."""
    for path in paths:
        with contextlib.suppress(ConnectionFileError, AttributeError):  # who reads it again complains
            found = config.read_json(path)
            yield from [*found.get("engines", {}).get("sets", {}).values(), found.get("controller", {}).get("state", {})]


def _row(path: Path) -> Optional[Dict[str, Any]]:
    """What `list` shows of a cluster file; None if it can't be read."""
    row: Dict[str, Any] = {"state": "running", "engines_ready": None, "reason": "", "file": os.fspath(path)}
    try:
        cluster = Cluster.from_file(path)
    except NoCluster:
        return None  # it has just been stopped
    except UserError as e:
        config.log("cluster").warning("%s", e)
        return None
    jobs = _jobs(cluster)
    waiting = [job for job in jobs if job["state"] == "pending"]
    if waiting:
        row["reason"] = f"{len(waiting)} of {len(jobs)} jobs wait; {waiting[0]['id']}: {waiting[0]['reason'] or 'no reason is given'}"
    if cluster.controller is None and (cluster.reason or not cluster.running):
        left = f"; its jobs ({', '.join(job['id'] for job in jobs)}) are left, `ipcluster stop` cancels them" if jobs else ""
        row.update(state="stopped", reason=cluster.reason + left, engines_ready=0)
    elif any(job["role"] == "controller" for job in waiting):
        row.update(state="pending", engines_ready=0)
    else:
        try:
            with cluster.connect_client_sync(timeout=2) as client:
                row["engines_ready"] = len(client.ids)
            if cluster.controller is None:
                row["reason"] = "its controller was started by itself"
            if waiting and len(waiting) == len([job for job in jobs if job["role"] == "engine"]):
                row["state"] = "pending"
        except IPythonError as e:
            row.update(state="not answering", reason=str(e))
    engines = sum(launcher.n for launcher in cluster.engines.values()) or cluster.n
    return {"profile": profile_name(cluster.profile_dir), "profile_dir": os.fspath(cluster.profile_dir),
            "cluster_id": cluster.cluster_id, "engines": engines, "host": cluster.host,
            "launcher": launchers.launcher_name(cluster.engine_launcher_class),
            "age": round(time.time() - (cluster.started or time.time())), "jobs": jobs, **row}


def _jobs(cluster: Cluster) -> List[Dict[str, Any]]:
    """The batch jobs of a cluster: of its controller, and of its engines."""
    status = cluster.status()
    found = [("controller", job) for job in (status["controller"] or {}).get("jobs", ())]
    found += [("engine", job) for each in status["engines"].values() for job in each.get("jobs", ())]
    return [{"role": role, **job} for role, job in found]


def print_table(rows: List[Tuple[Any, ...]]) -> None:
    """Print rows with aligned columns; the first holds the titles."""
    table = [[str(word) for word in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*table)]
    for line in table:
        print("  ".join(word.ljust(width) for word, width in zip(line, widths)).rstrip())


def _age(seconds: int) -> str:
    for size, unit in ((86400, "d"), (3600, "h"), (60, "m")):
        if seconds >= size:
            return f"{seconds // size}{unit}"
    return f"{seconds}s"


def _client(settings: config.Settings) -> Any:
    from .client import Client

    path = config.connection_file(settings.profile_dir, settings["Application.cluster_id"], "client")
    if not path.exists():
        raise NoCluster(f"There is no {path}: no controller of {label(settings['Application.cluster_id'])} runs in this "
                        "profile. `ipcluster list` shows what runs, `ipcluster start` starts a cluster.")
    return Client(profile_dir=os.fspath(settings.profile_dir), cluster_id=settings["Application.cluster_id"], timeout=5)


def _status(settings: config.Settings) -> int:
    """What each engine has to do, as a client sees it, and how batch jobs are."""
    jobs = _jobs_of(settings)
    status: Dict[Any, Any] = {}
    engines: Dict[Any, Any] = {}
    try:
        with _client(settings) as client:
            status, engines = client.queue_status(), client.engine_info()
    except IPythonError:
        if not any(job["role"] == "controller" and job["state"] == "pending" for job in jobs):
            raise
    unassigned = status.pop("unassigned", 0)
    rows = [{"engine": id, "host": engines.get(id, {}).get("host"), "pid": engines.get(id, {}).get("pid"), **counts}
            for id, counts in sorted(status.items())]
    if settings["IPClusterList.output_format"] == "json":
        print(json.dumps({"engines": rows, "unassigned": unassigned, "jobs": jobs}, indent=2))
        return 0
    titles = ("engine", "host", "pid", "queue", "tasks", "completed")
    print_table([tuple(map(str.upper, titles))] + [tuple(row[title] for title in titles) for row in rows])
    print(f"{unassigned} tasks wait for any engine.")
    if jobs:
        titles = ("id", "role", "n", "state", "nodes", "reason")
        print()
        print_table([("JOB", "OF", "ENGINES", "STATE", "NODES", "REASON")]
                    + [tuple(job[title] if title != "n" or job["role"] == "engine" else "" for title in titles) for job in jobs])
    return 0


def _jobs_of(settings: config.Settings) -> List[Dict[str, Any]]:
    """The batch jobs of the cluster that the command line names, if it has any."""
    path = config.cluster_file(settings.profile_dir, settings["Application.cluster_id"])
    if not config.names_jobs(path):
        return []
    with contextlib.suppress(NoCluster):  # it is just being stopped
        return _jobs(Cluster.from_file(path))
    return []


def _logs(settings: config.Settings) -> int:
    """The end of logs: of the engines that were named, or of every process of the cluster."""
    paths, far = _log_files(settings), _ssh_launchers(settings)
    if not paths and not far:
        raise NoCluster(f"There are no logs of {label(settings['Application.cluster_id'])} in "
                        f"{settings.profile_dir / 'log'}; `ipcontroller --log-to-file` writes its own there.")
    lines = settings["IPClusterLogs.lines"]
    ends = {}
    for path, name in paths.items():
        if not path.exists():
            found = next(filter(None, (launcher.find_log(path.name, lines) for launcher in far)), "")
            if not found:
                raise ConfigError(f"{path}, the log of {name}, is not on this host.")
            print(f"==> {name} <==\n{found}")
            continue
        with open(path, "rb") as file:
            text = file.read()
        ends[path] = len(text)
        print(f"==> {name}: {path} <==")
        for line in text.decode(errors="replace").splitlines()[-lines:]:
            print(line)
    for launcher in far if not settings.args else ():
        print(launcher.get_output(lines))
    sys.stdout.flush()
    while settings["IPClusterLogs.follow"]:
        time.sleep(FOLLOW_S)
        for path, end in list(ends.items()):
            ends[path] = _print_news(path, paths[path], end)
    return 0


def _ssh_launchers(settings: config.Settings) -> List[launchers.SSHLauncher]:
    """Those of the cluster whose logs are on other hosts."""
    try:
        cluster = Cluster.from_file(profile_dir=settings.profile_dir, cluster_id=settings["Application.cluster_id"])
    except (NoCluster, ConnectionFileError):
        return []
    return [launcher for launcher in (cluster.controller, *cluster.engines.values())
            if isinstance(launcher, launchers.SSHLauncher)]


def _print_news(path: Path, name: str, end: int) -> int:
    """Print the whole lines that were written to a log after `end`; returns where they end."""
    with contextlib.suppress(FileNotFoundError), open(path, "rb") as file:  # it may have been cleaned
        file.seek(end)
        news = file.read()
        news = news[:news.rfind(b"\n") + 1]
        for line in news.decode(errors="replace").splitlines():
            print(f"[{name}] {line}", flush=True)
        return end + len(news)
    return end


def _engine_log(settings: config.Settings, info: Dict[str, Any]) -> Path:
    """Where an engine writes; ranks of MPI write all to one file."""
    cluster_id, folder = settings["Application.cluster_id"], settings.profile_dir
    if "mpi" in info:
        with contextlib.suppress(NoCluster):
            for launcher in Cluster.from_file(profile_dir=folder, cluster_id=cluster_id).engines.values():
                if launcher.tag == info.get("set"):
                    return Path(launcher.to_dict()["output_file"])
        raise ConfigError(f"Engine {info['id']} is a rank of MPI, and this cluster did not start it: what did has its output.")
    return config.log_file(folder, "ipengine", cluster_id, info["pid"])


def _log_files(settings: config.Settings) -> Dict[Path, str]:
    """{log file: what it is called} in the order of their ages, of the cluster's present or last run."""
    cluster_id, folder = settings["Application.cluster_id"], settings.profile_dir
    if settings.args:
        with _client(settings) as client:
            engines = client.engine_info()
        wanted = [int(word) if word.isdigit() else word for word in settings.args]
        unknown = [word for word in wanted if word not in engines]
        if unknown:
            raise ConfigError(f"There is no engine {unknown[0]}; there are {', '.join(map(str, engines)) or 'none'}.")
        return {_engine_log(settings, engines[id]): f"engine {id}" for id in wanted}
    try:
        since = config.read_json(config.cluster_file(folder, cluster_id))["cluster"]["started"] or 0.0
    except (ConnectionFileError, KeyError, TypeError):
        since = 0.0
    name = re.compile(rf"ip(cluster|controller|engine){'-' + re.escape(cluster_id) if cluster_id else ''}"
                      r"-(\d+|job[0-9a-f]+\.\d+)\.log(?:\.\d+)?")
    found = []
    for path in folder.glob("log/*.log*"):
        match, written = name.fullmatch(path.name), path.stat().st_mtime
        if match and written >= since - 1:
            found.append((written, path, f"{match[1]}, {'' if match[2].startswith('job') else 'pid '}{match[2]}"))
    return {path: its_name for _, path, its_name in sorted(found)}


def _clean(settings: config.Settings) -> int:
    everywhere = settings["IPClusterClean.all_profiles"]
    removed = clean_cluster_files(all_profile_dirs(settings["Application.ipython_dir"]) if everywhere else
                                  [settings.profile_dir], force=settings["IPClusterClean.force"])
    print(f"Removed {len(removed)} files.")
    return 0


COMMANDS = {"start": _start, "engines": _engines, "stop": _stop, "list": _list, "status": _status, "logs": _logs,
            "clean": _clean}


def _run(command: str, argv: List[str]) -> int:
    settings = config.parse(f"cluster {command}", argv)
    log = config.setup_logging("ipcluster", settings["Application.log_level"], settings.log_file)
    config.log_start(log, settings)
    if settings.get("Application.log_url"):
        from .logger import forward

        forward(settings, "ipcluster")
    if settings["Application.work_dir"]:
        config.enter_work_dir(settings["Application.work_dir"])
    return COMMANDS[command](settings)


def _dispatch(argv: List[str]) -> int:
    return config.dispatch("ipcluster", "Start, stop and list clusters.", {name: f"cluster {name}" for name in COMMANDS}, _run, argv,
                           "\nexit codes: 0 done, 1 failed, 2 wrong flag or setting, 10 runs already, 11 stopped already, "
                           "12 no such cluster\n\nipcluster <command> --help shows its flags.")


def main(argv: Optional[List[str]] = None) -> int:
    """`ipcluster`: the command line."""
    return config.run_main("ipcluster", _dispatch, argv)


if __name__ == "__main__":
    sys.exit(main())
