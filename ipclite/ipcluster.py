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
from typing import Any, Callable, Dict, List, NoReturn, Optional, Tuple

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

    return _serve(Cluster.from_settings(settings, shutdown_atexit=not settings["Cluster.daemonize"]), settings, start)


def _engines(settings: config.Settings) -> int:
    def start(cluster: Cluster) -> None:
        with cluster.connect_client_sync() as client:
            before = len(client.ids)
            cluster.start_engines_sync()
            cluster.wait_for_engines(client, before + cluster.n)

    return _serve(Cluster.from_settings(settings, shutdown_atexit=not settings["Cluster.daemonize"], cluster_file=""),
                  settings, start)


def _relay_signals(cluster: Cluster) -> None:
    """What the system leaves to programs, and is sent to us, is meant for the engines."""
    for name in ("SIGUSR1", "SIGUSR2", "SIGINFO"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), lambda signum, _: cluster.signal_engines_sync(signum))


def _serve(cluster: Cluster, settings: config.Settings, start: Callable[[Cluster], None]) -> int:
    """Start; then return if we are to daemonize, else stay until something ends or a signal comes."""
    if settings["Application.work_dir"]:
        config.enter_work_dir(settings["Application.work_dir"])
    _set_signals(_on_signal)
    ready = keep = False
    try:
        start(cluster)
        ready = True
        _relay_signals(cluster)
        _tell_ready(cluster, settings)
        keep = settings["Cluster.daemonize"]
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
    print(f"{cluster.n} engines are ready. Logs are in {cluster.profile_dir / 'log'}\n"
          f"Connect:  import {__package__} as ipp; rc = ipp.Client({arguments})\n"
          + (f"Stop:     Ctrl-C, or ipcluster stop{flags}" if cluster.shutdown_atexit else
             f"Stop:     ipcluster stop{flags}"), flush=True)


def _stay(cluster: Cluster) -> int:
    """Wait until the controller or the engines have ended; returns the exit code."""
    ends: "SimpleQueue[Tuple[launchers.BaseLauncher, Dict[str, Any]]]" = SimpleQueue()
    watched: List[launchers.BaseLauncher] = [*filter(None, [cluster.controller]), *cluster.engines.values()]
    for launcher in watched:
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
        cluster.stop_cluster_sync()
        if not alive:
            raise AlreadyStopped(f"{label(cluster.cluster_id)} is not running any more; its files are removed. "
                                 f"{cluster.reason}".rstrip())
        print(f"Stopped {label(cluster.cluster_id)}.")
    return 0


def _list(settings: config.Settings) -> int:
    named = settings["Application.profile"] or settings["Application.profile_dir"]
    folders = [settings.profile_dir] if named else all_profile_dirs(settings["Application.ipython_dir"])
    rows = [row for row in map(_row, cluster_files(folders)) if row]
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
    if cluster.controller is None:
        row.update(state="stopped", reason=cluster.reason, engines_ready=0)
    else:
        try:
            with cluster.connect_client_sync(timeout=2) as client:
                row["engines_ready"] = len(client.ids)
        except IPythonError as e:
            row.update(state="not answering", reason=str(e))
    engines = sum(launcher.n for launcher in cluster.engines.values()) or cluster.n
    return {"profile": profile_name(cluster.profile_dir), "profile_dir": os.fspath(cluster.profile_dir),
            "cluster_id": cluster.cluster_id, "engines": engines, "host": cluster.host,
            "launcher": launchers.launcher_name(cluster.engine_launcher_class),
            "age": round(time.time() - (cluster.started or time.time())), **row}


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

    return Client(profile_dir=os.fspath(settings.profile_dir), cluster_id=settings["Application.cluster_id"], timeout=5)


def _status(settings: config.Settings) -> int:
    """What each engine has to do, as a client sees it."""
    with _client(settings) as client:
        status, engines = client.queue_status(), client.engine_info()
    unassigned = status.pop("unassigned", 0)
    rows = [{"engine": id, "host": engines.get(id, {}).get("host"), "pid": engines.get(id, {}).get("pid"), **counts}
            for id, counts in sorted(status.items())]
    if settings["IPClusterList.output_format"] == "json":
        print(json.dumps({"engines": rows, "unassigned": unassigned}, indent=2))
        return 0
    titles = ("engine", "host", "pid", "queue", "tasks", "completed")
    print_table([tuple(map(str.upper, titles))] + [tuple(row[title] for title in titles) for row in rows])
    print(f"{unassigned} tasks wait for any engine.")
    return 0


def _logs(settings: config.Settings) -> int:
    """The end of logs: of the engines that were named, or of every process of the cluster."""
    paths = _log_files(settings)
    if not paths:
        raise NoCluster(f"There are no logs of {label(settings['Application.cluster_id'])} in "
                        f"{settings.profile_dir / 'log'}; `ipcontroller --log-to-file` writes its own there.")
    lines = settings["IPClusterLogs.lines"]
    ends = {}
    for path, name in paths.items():
        with open(path, "rb") as file:
            text = file.read()
        ends[path] = len(text)
        print(f"==> {name}: {path} <==")
        for line in text.decode(errors="replace").splitlines()[-lines:]:
            print(line)
    sys.stdout.flush()
    while settings["IPClusterLogs.follow"]:
        time.sleep(FOLLOW_S)
        for path, name in paths.items():
            ends[path] = _print_news(path, name, ends[path])
    return 0


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
        return {config.log_file(folder, "ipengine", cluster_id, engines[id]["pid"]): f"engine {id}" for id in wanted}
    try:
        since = config.read_json(config.cluster_file(folder, cluster_id))["cluster"]["started"] or 0.0
    except (ConnectionFileError, KeyError, TypeError):
        since = 0.0
    name = re.compile(rf"ip(cluster|controller|engine){'-' + re.escape(cluster_id) if cluster_id else ''}-(\d+)\.log")
    found = []
    for path in folder.glob("log/*.log"):
        match, written = name.fullmatch(path.name), path.stat().st_mtime
        if match and written >= since - 1:
            found.append((written, path, f"{match[1]}, pid {match[2]}"))
    return {path: its_name for _, path, its_name in sorted(found)}


def _clean(settings: config.Settings) -> int:
    everywhere = settings["IPClusterClean.all_profiles"]
    removed = clean_cluster_files(all_profile_dirs(settings["Application.ipython_dir"]) if everywhere else
                                  [settings.profile_dir], force=settings["IPClusterClean.force"])
    print(f"Removed {len(removed)} files.")
    return 0


COMMANDS = {"start": _start, "engines": _engines, "stop": _stop, "list": _list, "status": _status, "logs": _logs,
            "clean": _clean}


def _dispatch(argv: List[str]) -> int:
    command = argv[0] if argv else "--help"
    if command == "--version":
        print(config.version())
        return 0
    if command in ("-h", "--help", "--help-all"):
        print("Start, stop and list clusters.\n\nusage: ipcluster <command> [flags]\n")
        for name in COMMANDS:
            print(f"  {name:<10} {config.PROGRAMS['cluster ' + name][1]}")
        print("\nexit codes: 0 done, 1 failed, 2 wrong flag or setting, 10 runs already, 11 stopped already, "
              "12 no such cluster")
        print("\nipcluster <command> --help shows its flags.")
        return 0 if argv else EXIT_FAILURE
    if command not in COMMANDS:
        raise ConfigError(f"unknown command {command!r}; choose from {', '.join(COMMANDS)}. See --help")
    settings = config.parse(f"cluster {command}", argv[1:])
    config.setup_logging("ipcluster", settings["Application.log_level"], settings.log_file)
    return COMMANDS[command](settings)


def main(argv: Optional[List[str]] = None) -> int:
    """`ipcluster`: the command line."""
    return config.run_main("ipcluster", _dispatch, argv)


if __name__ == "__main__":
    sys.exit(main())
