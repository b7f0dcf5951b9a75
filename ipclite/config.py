"""Profiles, config files, logging: what every role needs to know before it starts.

    OPTIONS ──► defaults ──┐
    <profile>/ip*_config.py ──► file layer ──┼──► Settings {"Section.key": value}
    sys.argv ──► command-line layer ─────────┘

Rules that hold here:
- precedence is command line, file, default; within a layer the most specific section wins (`CHAINS`);
- a config file is Python, executed into plain dicts;
- what other modules need of `options.py` and `files.py` is to be had here, too.
"""

from __future__ import annotations

import contextlib
import copy
import json
import logging
import os
import socket
import stat
import sys
import time
import traceback
from pathlib import Path
from typing import Any, Callable, Dict, Iterable, List, Mapping, NoReturn, Optional, Tuple, Union

from .errors import EXIT_FAILURE, ConfigError, UserError
from .files import (PROGRAM, SOCKET_NAME_MAX, SOCKET_PATH_MAX, PathLike, check_connection, cluster_file,  # noqa: F401
                    connection_file, dead_run, locked, memory_limit, proc_stat, process_alive, process_start,
                    names_jobs, raise_file_limit, read_connection, read_json, remove_sockets, runtime_dir,
                    write_json, write_text)
from .options import (APPS, ARGUMENTS, CHAINS, CLUSTER, COMMAND_LINE_ONLY, ENGINES, KINDS, OPTIONS,  # noqa: F401
                      PROFILE, PROGRAMS, START, Given, Layer, Option, app_of, as_path, chain_of, config_text, convert,
                      help_text, is_absent, is_custom, is_unneeded, known_names, options_of, read_argv, suggest, version)

# Config files of the whole machine, weakest first; those of the profile win over them.
SYSTEM_DIRS = (Path("/etc/ipython"), Path("/usr/local/etc/ipython"), Path(sys.prefix, "etc", "ipython"))
LOGS_KEPT = 100  # per profile, of processes that have ended
LOG_AGE_S = 86400  # younger ones are kept, too: a process on another host may be writing there


# ---------------------------------------------------------------- settings


class Settings(Dict[str, Any]):
    """`{"Section.key": value}` for every option of one role.

    Attributes:
        role: what was asked for, as in `PROGRAMS`.
        profile_dir: the profile's directory, absolute.
        args: words of the command line that are no flags. rest: what followed `--`.
        layers: what was set in the files and on the command line, in this order. origins: who set each value.
    """

    def __init__(self, role: str, profile_dir: Path, layers: List[Layer]):
        super().__init__()
        self.role, self.profile_dir, self.layers = role, profile_dir, layers
        self.origins: Dict[str, str] = {}
        self.args: List[str] = []
        self.rest: List[str] = []
        for option in options_of(role):
            self[option.name] = self._resolve(option, chain_of(option.section, role))

    @property
    def log_file(self) -> Optional[Path]:
        """Where `--log-to-file` says to log, or None."""
        if not self.get("Application.log_to_file"):
            return None
        program = PROGRAMS[self.role][0].split()[0]
        return log_file(self.profile_dir, program, self.get("Application.cluster_id", ""))

    def section(self, *names: str) -> Dict[str, Any]:
        """`{key: value}` of sections, weakest first, and of what they inherit."""
        chain = [link for name in names for link in chain_of(name, self.role)]
        found = {o.key: self._resolve(o, chain) for o in options_of(self.role) if o.section in chain}
        known = set(found)
        for layer in self.layers:  # what a launcher of the user's has, and nobody else
            for name in chain:
                for full, given in layer.items():
                    section, _, key = full.partition(".")
                    if section == name and key not in known:
                        found[key] = given.value
        return found

    def _resolve(self, option: Option, chain: Iterable[str]) -> Any:
        value = convert(option, copy.copy(option.default), option.name)
        for layer in self.layers:
            for section in chain:
                given = layer.get(f"{section}.{option.key}")
                if given is None:
                    continue
                found = given.value
                if isinstance(found, Deferred):
                    found = found.applied_to(value, given.origin)
                value = convert(option, found, given.origin)
                self.origins[option.name] = given.origin
        return value

    def table(self) -> Dict[str, Dict[str, Any]]:
        """`{"Section.key": {"value": ..., "from": ...}}`, as `--show-config` prints it."""
        shown = {option.name: option for option in options_of(self.role) if option.key not in COMMAND_LINE_ONLY}
        table = {name: {"value": self[name], "from": self.origins.get(name, "default")} for name in shown}
        table["Application.profile_dir"] = {"value": os.fspath(self.profile_dir), "from": "command line or environment"}
        known = known_names(app_of(self.role))
        for name, given in [item for layer in self.layers for item in layer.items()]:
            section, _, key = name.partition(".")
            if any(o.key == key and section in chain_of(o.section, self.role) for o in options_of(self.role)):
                continue  # it is in one of the rows above
            option, value = known.get(section, {}).get(key), given.value
            if isinstance(value, Deferred):
                value = value.applied_to(copy.copy(option.default) if option else None, given.origin)
            table[name] = {"value": convert(option, value, given.origin) if option else value, "from": given.origin}
        return table


# ---------------------------------------------------------------- config files


class Deferred:
    """Stands for a list or dict that the file changes without having set it: `c.X.args.append("--reuse")`."""

    def __init__(self) -> None:
        self.calls: List[Tuple[str, Tuple[Any, ...]]] = []

    def applied_to(self, value: Any, origin: str) -> Any:
        """`value`, changed as the file said."""
        for method, args in self.calls:
            try:
                if method == "prepend":
                    value[:0] = args[0]
                else:
                    getattr(value, method)(*args)
            except (AttributeError, TypeError):
                raise ConfigError(f"{origin} has no {method}: it is {value!r}; assign a value.") from None
        return value

    def __getattr__(self, method: str) -> Callable[..., None]:
        if method not in ("append", "extend", "insert", "prepend", "update", "add"):
            raise AttributeError(f"{method!r} of a value that this file has not set")
        return lambda *args: self.calls.append((method, args))

    def __setitem__(self, key: Any, item: Any) -> None:
        self.calls.append(("__setitem__", (key, item)))


class Section(Dict[str, Any]):
    """`c.X` of a config file: keys are attributes too."""

    def __getattr__(self, key: str) -> Any:
        if key.startswith("__"):
            raise AttributeError(key)
        return self.setdefault(key, Deferred())

    def __setattr__(self, key: str, value: Any) -> None:
        self[key] = value


class Config(Dict[str, Section]):
    """`c` of a config file: `c.X` makes its section."""

    def __getattr__(self, name: str) -> Section:
        if name.startswith("__"):
            raise AttributeError(name)
        return self[name]

    def __missing__(self, name: str) -> Section:
        return self.setdefault(name, Section())


def run_config_file(path: Path, config: Config) -> None:
    """Execute the config file `path` into `config`.

    Raises:
        ConfigError: it can't be read, has a syntax error or raises; names file and line.
    """
    def load_subconfig(name: str, folder: Optional[str] = None, profile: Optional[str] = None) -> None:
        where = profile_path(profile) if profile else Path(folder) if folder else path.parent
        run_config_file(where / name, config)

    names = {"__file__": str(path), "__name__": "__config__", "c": config, "get_config": lambda: config,
             "load_subconfig": load_subconfig}
    try:
        exec(compile(path.read_bytes(), str(path), "exec"), names)
    except SyntaxError as e:
        raise ConfigError(f"{e.filename}, line {e.lineno}: {e.msg}.") from None
    except UserError:
        raise
    except Exception as e:
        lines = [f.lineno for f in traceback.extract_tb(e.__traceback__) if f.filename == str(path)]
        if not lines:
            raise ConfigError(f"The config file {path} can't be read: {e}.") from None
        name = getattr(e, "name", None)
        known = isinstance(e, NameError) and any(name in known_names(app) for app in APPS)
        advice = f"; write c.{name}." if known else "."
        raise ConfigError(f"{path}, line {lines[-1]}: {type(e).__name__}: {e}{advice}") from e


def _read_json_config(path: Path, config: Config) -> None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        for section, keys in found.items():
            if section != "version":  # which some writers put there
                config[section].update(dict(keys.items()))
    except OSError as e:
        raise ConfigError(f"The config file {path} can't be read: {e.strerror}.") from None
    except (ValueError, AttributeError) as e:
        line = f", line {e.lineno}: {e.msg}" if isinstance(e, json.JSONDecodeError) else \
            " needs the form {\"Section\": {\"key\": value}}"
        raise ConfigError(f"{path}{line}.") from None


def _file_layers(app: str, profile_dir: Path, extra: str = "") -> List[Layer]:
    """What the config files of `app` set, weakest first: the system's, the profile's, `extra`."""
    if app not in APPS:
        return []
    paths = [folder / f"ip{app}_config.{kind}" for folder in (*SYSTEM_DIRS, profile_dir) for kind in ("py", "json")]
    if extra and not os.path.exists(extra):
        raise ConfigError(f"There is no config file {extra}.")
    return [_file_layer(app, path) for path in paths + ([Path(extra)] if extra else []) if path.exists()]


def layer_of(role: str, sections: Mapping[str, Mapping[str, Any]], where: str = "config") -> Layer:
    """The layer of `{"Section": {"key": value}}`; `where` is what errors call it.

    Raises:
        ConfigError: nobody knows a section or key.
    """
    app = app_of(role)
    known = known_names(app)
    elsewhere = {name: other for other in APPS if other != app for name in known_names(other) if name not in known}
    absent: List[str] = []
    unneeded: List[str] = []
    layer: Layer = {}
    for section, keys in sections.items():
        for key, value in keys.items():
            origin = f"c.{section}.{key} in {where}"
            if isinstance(value, Deferred) and not value.calls:
                continue
            if key in known.get(section, {}) and key not in COMMAND_LINE_ONLY:
                layer[f"{section}.{key}"] = Given(value, origin)
            elif key in COMMAND_LINE_ONLY or is_unneeded(section, key, app):
                unneeded.append(f"c.{section}.{key}")
            elif is_absent(section, key, app):
                absent.append(f"c.{section}.{key}")
            elif section in elsewhere:
                log().warning("%s has no effect here: it belongs in ip%s_config.py.", origin, elsewhere[section])
            elif section in known:
                raise ConfigError(f"unknown key {origin}" + suggest(key, known[section]))
            elif is_custom(section, app):
                layer[f"{section}.{key}"] = Given(value, origin)
            else:
                raise ConfigError(f"unknown section {origin}" + suggest(section, known))
    if unneeded:
        log().warning("%s in %s %s not needed and %s no effect.", ", ".join(unneeded), where,
                      *(("is", "has") if len(unneeded) == 1 else ("are", "have")))
    if absent:
        log().warning("%s in %s: this version does not have what these settings are for, so they have no effect.",
                      ", ".join(absent), where)
    return layer


def _file_layer(app: str, path: Path) -> Layer:
    config = Config()
    (_read_json_config if path.suffix == ".json" else run_config_file)(path, config)
    return layer_of(app, config, os.fspath(path))


# ---------------------------------------------------------------- command lines


def parse(role: str, argv: Iterable[str]) -> Settings:
    """Read the command line of `role`, its profile and its config file.

    Forms: `-n 4`, `-n4`, `--n=4`, `--n 4`, `--ip=*`, `profile=mpi`, `--IPController.ip=*`, `--debug`, `-- rest`.

    Raises:
        ConfigError: an unknown flag, a bad value, an unknown profile, a bad config file.
        SystemExit: `--help`, `--help-all`, `--version` and `--show-config`, after printing.
    """
    layer, args, rest = read_argv(role, list(argv))
    extra = ([] if role in ARGUMENTS else args) + ([] if role == START else rest)
    if extra:
        raise ConfigError(f"unexpected argument {extra[0]!r} for {PROGRAMS[role][0]}. See --help")
    where = {key: given.value for key in ("profile", "profile_dir", "ipython_dir")
             for given in [layer.get(f"Application.{key}")] if given and given.value}
    creates = role in (START, "controller")
    profile_dir = profile_path(**where) if creates or role in PROFILE else find_profile_dir(**where)
    settings = load(role, profile_dir, layer)
    settings.args, settings.rest = args, rest
    if settings.get("Application.show_config") or settings.get("Application.show_config_json"):
        _show(settings)
        raise SystemExit(0)
    if settings.get("Application.copy_config_files"):
        write_config_files(profile_dir)
    if creates:
        if where and not profile_dir.is_dir() and not settings[f"{APPS[app_of(role)]}.auto_create"]:
            no_such_profile(profile_dir)
        make_profile_dir(profile_dir)
        clean_logs(profile_dir, LOGS_KEPT, LOG_AGE_S)
    if settings.get("Application.clean_logs"):
        clean_logs(profile_dir)
    return settings


def load(role: str, profile_dir: PathLike, given: Optional[Layer] = None) -> Settings:
    """The settings of `role` in a profile; `given` is the layer of the command line, or what stands for it."""
    path = Path(os.path.abspath(profile_dir))
    extra = (given or {}).get("Application.extra_config_file")
    return Settings(role, path, [*_file_layers(app_of(role), path, extra.value if extra else ""), given or {}])


def _show(settings: Settings) -> None:
    table = settings.table()
    if settings["Application.show_config_json"]:
        print(json.dumps(table, indent=2, default=str))
        return
    for name, row in table.items():
        print(f"{name} = {row['value']!r}  ({row['from']})")


def dispatch(program: str, purpose: str, roles: Dict[str, str], run: Callable[[str, List[str]], int], argv: List[str],
             more: str = "") -> int:
    """The command line of a program of several commands; returns the exit code.

    Args:
        roles: each command's role, as in `PROGRAMS`.
        run: runs a command, given the words after its name.
        more: the end of the help text.
    """
    command = argv[0] if argv else "--help"
    if command == "--version":
        print(version())
        return 0
    if command in ("-h", "--help", "--help-all"):
        print(f"{purpose}\n\nusage: {program} <command> [flags]\n")
        for name, role in roles.items():
            print(f"  {name:<10} {PROGRAMS[role][1]}")
        if more:
            print(more)
        return 0 if argv else EXIT_FAILURE
    if command not in roles:
        raise ConfigError(f"unknown command {command!r}; choose from {', '.join(roles)}. See --help")
    return run(command, argv[1:])


def run_main(program: str, main: Callable[[List[str]], Optional[int]], argv: Optional[List[str]] = None) -> int:
    """Run `main(argv)` and return the exit code of the process.

    A `UserError` becomes one line on stderr, Ctrl-C becomes 130; a traceback is shown for bugs and with `--debug`.
    """
    words = sys.argv[1:] if argv is None else list(argv)
    try:
        return main(words) or 0
    except UserError as e:
        if "--debug" in words:
            traceback.print_exc()
        print(f"{program}: {e}", file=sys.stderr)
        return e.exit_code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `ipcluster list | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILURE


# ---------------------------------------------------------------- profiles


def profile_path(profile: Optional[str] = None, profile_dir: Optional[PathLike] = None,
                 ipython_dir: Optional[PathLike] = None) -> Path:
    """Where the profile is or would be, absolute: `profile_dir`, or `profile_<profile>` below `ipython_dir`,
    `$IPYTHONDIR` or `~/.ipython`."""
    if profile_dir:
        return Path(as_path(profile_dir))
    if profile and (profile != os.path.basename(profile) or profile.startswith(".")):
        raise ConfigError(f"A profile's name has no slashes, unlike {profile!r}; use --profile-dir for a path.")
    return Path(as_path(ipython_dir or os.environ.get("IPYTHONDIR") or "~/.ipython"), f"profile_{profile or 'default'}")


def find_profile_dir(profile: Optional[str] = None, profile_dir: Optional[PathLike] = None,
                     ipython_dir: Optional[PathLike] = None, create: bool = False) -> Path:
    """The directory of a profile, absolute. The default profile need not exist.

    Args:
        profile: its name (default: "default").
        profile_dir: or its directory.
        ipython_dir: where profiles are (default: `$IPYTHONDIR` or `~/.ipython`).
        create: make it, with its subdirectories, if it does not exist.

    Raises:
        ConfigError: the profile was named and does not exist, or it can't be created.
    """
    path = profile_path(profile, profile_dir, ipython_dir)
    if create:
        make_profile_dir(path)
    elif (profile_dir or profile not in (None, "", "default")) and not path.is_dir():
        no_such_profile(path)
    return path


def no_such_profile(path: Path) -> NoReturn:
    """Raise the error about a profile that is not there."""
    raise ConfigError(f"There is no profile {path}; `{PROGRAM} profile create --profile-dir={path}` makes it, and so "
                      "does starting a cluster with this profile.")


def make_profile_dir(path: PathLike) -> None:
    """Make a profile's directory and what it needs: security/ and pid/ (0700) and log/.

    Raises:
        ConfigError: it can't be written.
    """
    missing = [folder for folder in (Path(path), *Path(path).absolute().parents) if not os.path.exists(folder)]
    for name, mode in (("security", 0o700), ("pid", 0o700), ("log", 0o755)):
        folder = Path(path, name)
        try:
            while missing:  # not by parents=True, which lets a generous umask have its way
                missing.pop().mkdir(mode=0o755, exist_ok=True)
            folder.mkdir(mode=mode, exist_ok=True)
            if mode == 0o700 and stat.S_IMODE(folder.stat().st_mode) != mode:
                folder.chmod(mode)
        except OSError as e:
            raise ConfigError(f"The profile directory {folder} can't be written ({e.strerror}); choose another one "
                              "with --profile-dir or $IPYTHONDIR.") from None


def write_config_files(path: PathLike, reset: bool = False) -> List[Path]:
    """Write the commented config files into a profile, over existing ones only with `reset`; returns what was written.

    Raises:
        ConfigError: it can't be written.
    """
    make_profile_dir(path)
    written = []
    for app in APPS:
        file = Path(path, f"ip{app}_config.py")
        if reset or not file.exists():
            write_text(file, config_text(app), 0o644)
            written.append(file)
    return written


def enter_work_dir(path: PathLike) -> None:
    """Make `path` the working directory and put it on `sys.path`.

    Raises:
        ConfigError: there is no such directory.
    """
    try:
        os.chdir(path)
    except OSError as e:
        raise ConfigError(f"The working directory {path} can't be entered: {e.strerror}.") from None
    sys.path.insert(0, os.fspath(path))


# ---------------------------------------------------------------- logging


def log_file(profile_dir: PathLike, program: str, cluster_id: str = "", pid: Optional[int] = None) -> Path:
    """`<profile>/log/<program>[-<cluster_id>]-<pid>.log`; `pid` is ours by default."""
    return Path(profile_dir, "log", "-".join(filter(None, (program, cluster_id, str(pid or os.getpid())))) + ".log")


def clean_logs(profile_dir: PathLike, keep: int = 0, age_s: float = 0.0) -> List[Path]:
    """Remove the logs of processes that have ended; returns what was removed.

    Args:
        keep: how many to keep, the newest.
        age_s: only those that nobody has written to for so many seconds.
    """
    found = []
    for path in Path(profile_dir, "log").glob("*.log*"):
        pid = path.stem.rpartition("-")[2]
        with contextlib.suppress(FileNotFoundError):  # somebody else cleans, too
            written = path.stat().st_mtime
            busy = process_alive(int(pid)) if pid.isdigit() else pid.startswith("job") and time.time() - written < LOG_AGE_S
            if not busy:
                found.append((written, path))
    old = [path for written, path in sorted(found, reverse=True)[keep:] if time.time() - written >= age_s]
    for path in old:
        path.unlink(missing_ok=True)
    return old


def log(role: str = "") -> logging.Logger:
    """The logger of a role, or of the package."""
    return logging.getLogger(".".join(filter(None, (__package__, role))))


def setup_logging(role: str, level: Union[int, str], file: Optional[PathLike] = None) -> logging.Logger:
    """Log everything of this process to stderr, or to `file`; calling it again replaces what was set up before.

    Args:
        role: how the process calls itself in each line, as in "controller" or "engine 3".

    Raises:
        ConfigError: the file can't be written.
    """
    handler: logging.Handler = logging.StreamHandler()
    if file is not None:
        try:
            Path(file).parent.mkdir(parents=True, exist_ok=True)
            os.close(os.open(file, os.O_WRONLY | os.O_CREAT, 0o600))
            handler = logging.FileHandler(file, encoding="utf-8")
        except OSError as e:
            raise ConfigError(f"The log file {file} can't be written ({e.strerror}); choose another profile with "
                              "--profile-dir, or do not log to a file.") from None
    handler.setFormatter(logging.Formatter(f"%(asctime)s.%(msecs)03d [{role}] %(levelname)s: %(message)s",
                                           "%Y-%m-%d %H:%M:%S"))
    package = log()
    for old in package.handlers[:]:
        package.removeHandler(old)
        old.close()
    package.addHandler(handler)
    package.setLevel(level)
    package.propagate = False
    return log(role)


def log_start(log: logging.Logger, settings: Settings) -> None:
    """For `--debug`: what runs here, and every setting that is no default, with where it comes from."""
    log.debug("%s %s, Python %s on %s, %s, pid %d in %s: %s", PROGRAM, version(), sys.version.split()[0], sys.platform,
              socket.gethostname(), os.getpid(), os.getcwd(), " ".join(sys.argv))
    for name, origin in sorted(settings.origins.items()):
        secret = name.startswith("MongoDB.") or name.endswith(".environment")  # it may be
        log.debug("%s = %s (%s)", name, "..." if secret else repr(settings[name]), origin)


def main(argv: Optional[List[str]] = None) -> int:
    """`python -m <package>.config create ...` is `profile create ...`, which builds on this file."""
    from importlib import import_module

    return int(import_module(".profiles", __package__).main(argv))


if __name__ == "__main__":
    sys.exit(main())
