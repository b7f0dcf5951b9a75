"""Profiles, config files, command lines, connection files, logging: what every role needs to know before it starts.

    OPTIONS ──► defaults ──┐
    <profile>/ip*_config.py ──► file layer ──┼──► Settings {"Section.key": value}
    sys.argv ──► command-line layer ─────────┘

Rules that hold here:
- `OPTIONS` is the schema, the help text and the parser: an option is one row, and nothing else knows its flags.
- Precedence is command line, file, default. Within a layer the most specific section wins (`CHAINS`).
- A config file is Python, executed into plain dicts. A key that nobody knows is an error with a suggestion; a key
  that IPython Parallel has and we do not need (`UNNEEDED`) is a warning.
- Files with secrets are written atomically, 0600, in 0700 directories, and refused when others can read them.
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
import traceback
from pathlib import Path
from typing import Any, Callable, Dict, Iterable, Iterator, List, NamedTuple, NoReturn, Optional, Tuple, Union

from .errors import EXIT_FAILURE, ConfigError, ConnectionFileError, UserError

PROGRAM = "ipclite"  # marks our files, so that another program's are told apart
SOCKET_PATH_MAX = 107  # bytes, the limit of sun_path
SOCKET_NAME_MAX = 40  # bytes left below runtime_dir() for the name of a socket
PathLike = Union[str, "os.PathLike[str]"]

START, ENGINES = "cluster start", "cluster engines"
CLUSTER = (START, ENGINES, "cluster stop", "cluster list", "cluster clean")
EVERY = CLUSTER + ("controller", "engine")

# Role -> (program, what it does). The first word of a role names its config file, `ip<word>_config.py`.
PROGRAMS = {
    START: ("ipcluster start", "Start a controller and engines; Ctrl-C stops them."),
    ENGINES: ("ipcluster engines", "Start engines for a controller that runs already."),
    "cluster stop": ("ipcluster stop", "Stop clusters: stop [CLUSTER_ID ...]."),
    "cluster list": ("ipcluster list", "List clusters, the stopped ones with the reason."),
    "cluster clean": ("ipcluster clean", "Remove what dead clusters left behind, and old logs."),
    "controller": ("ipcontroller", "Start a controller, to which engines and clients connect."),
    "engine": ("ipengine", "Start engines on this host and connect them to a controller."),
}
APPS = {"cluster": "Cluster", "controller": "IPController", "engine": "IPEngine"}  # their sections

# Section -> the sections that set its keys, weakest first: old names, base classes, itself.
CHAINS: Dict[str, Tuple[str, ...]] = {
    "Cluster": ("IPClusterEngines", "IPClusterStart", "Cluster"),
    "IPController": ("HubFactory", "IPControllerApp", "IPController"),
    "IPEngine": ("EngineFactory", "IPEngineApp", "IPEngine"),
    "LocalControllerLauncher": ("BaseLauncher", "ControllerLauncher", "LocalProcessLauncher",
                                "LocalControllerLauncher"),
    "LocalEngineSetLauncher": ("BaseLauncher", "EngineLauncher", "LocalProcessLauncher", "LocalEngineLauncher",
                               "LocalEngineSetLauncher"),
}

# What IPython Parallel has and we do not need: accepted with a warning. "*" stands for the whole section.
UNNEEDED: Dict[str, Tuple[str, ...]] = {
    "Session": ("*",),
    "IPKernelApp": ("*",),
    "Hub": ("*",),
    "Application": ("log_format", "log_datefmt", "logging_config", "show_config", "show_config_json"),
    "HeartMonitor": ("max_heartmonitor_misses", "debug"),
    "TaskScheduler": ("scheme_name",),
    "Cluster": ("delay", "send_engines_connection_env", "early_shutdown", "clean_logs"),
    "IPController": ("broadcast_scheduler_depth", "use_threads", "enable_curve", "curve_publickey", "curve_secretkey",
                     "monitor_ip", "monitor_transport", "registration_timeout", "hb", "mux", "task", "control",
                     "iopub", "mon_port", "notifier_port", "regport"),
    "IPEngine": ("enable_nanny", "wait_for_url_file", "max_heartbeat_misses", "curve_serverkey", "curve_publickey",
                 "curve_secretkey", "out_stream_factory", "display_hook_factory", "mpi_registration_delay"),
    "LocalEngineSetLauncher": ("delay", "poll_seconds"),
    "LocalControllerLauncher": ("poll_seconds", "connection_info_timeout"),
}


class Option(NamedTuple):
    """One row of `OPTIONS`.

    `flags` is a list of words: `--flag` takes a value (or, of kind "switch", none), `--flag=CONSTANT` is a switch that
    sets that constant. An option without flags is set as `--Section.key=value` or in a config file.
    """

    section: str
    key: str
    flags: str
    kind: str
    default: Any
    roles: Tuple[str, ...]
    help: str

    @property
    def name(self) -> str:
        """As in a config file, without the `c.`"""
        return f"{self.section}.{self.key}"


OPTIONS = (
    Option("Application", "profile", "--profile", "text", "", EVERY, "name of the profile (default: default)"),
    Option("Application", "profile_dir", "--profile-dir", "path", "", EVERY, "directory of the profile"),
    Option("Application", "ipython_dir", "--ipython-dir", "path", "", EVERY,
           "where profiles are (default: $IPYTHONDIR or ~/.ipython)"),
    Option("Application", "cluster_id", "--cluster-id", "id", "",
           (START, ENGINES, "cluster stop", "controller", "engine"),
           "tells apart the clusters of one profile"),
    Option("Application", "log_level", "--log-level --debug=DEBUG --quiet=ERROR", "level", "INFO", EVERY,
           "DEBUG, INFO, WARNING, ERROR or CRITICAL"),
    Option("Application", "log_to_file", "--log-to-file", "switch", False, (START, ENGINES, "controller", "engine"),
           "log to <profile>/log instead of stderr"),
    Option("Application", "work_dir", "--work-dir", "path", "", (START, ENGINES, "controller", "engine"),
           "run in this directory"),

    Option("Cluster", "n", "-n --n", "count", None, (START, ENGINES),
           "number of engines (default: the CPUs that we may use)"),
    Option("Cluster", "engine_launcher_class", "--engines", "any", "local", (START, ENGINES),
           "launcher of the engines"),
    Option("Cluster", "controller_launcher_class", "--controller", "any", "local", (START,),
           "launcher of the controller"),
    Option("Cluster", "controller_ip", "--ip", "text", "", (START,), "address the controller listens on; * for all"),
    Option("Cluster", "controller_location", "--location", "text", "", (START,),
           "name or address by which others reach the controller"),
    Option("Cluster", "controller_args", "", "list", [], (START,), "more arguments for the controller; also after --"),
    Option("Cluster", "engine_timeout", "--timeout", "seconds", 60.0, (START, ENGINES),
           "seconds to wait for the engines"),
    Option("Cluster", "daemonize", "--daemonize", "switch", False, (START, ENGINES),
           "return once the engines are ready, and leave them running"),
    Option("Cluster", "auto_create", "", "switch", True, (START,), "create the profile if there is none"),
    Option("IPClusterStop", "all_cluster_ids", "--all", "switch", False, ("cluster stop",),
           "stop all clusters of the profile"),
    Option("IPClusterList", "output_format", "-o --output-format", "format", "text", ("cluster list",),
           "text or json"),
    Option("IPClusterClean", "force", "--force", "switch", False, ("cluster clean",),
           "clean even where clusters run"),
    Option("IPClusterClean", "all_profiles", "--all", "switch", False, ("cluster clean",), "clean all profiles"),

    Option("BaseLauncher", "work_dir", "", "path", "", (START, ENGINES), "directory of the processes"),
    Option("BaseLauncher", "environment", "", "dict", {}, (START, ENGINES), "more environment variables"),
    Option("BaseLauncher", "output_limit", "", "count", 100, (START, ENGINES), "lines of output that get_output gives"),
    Option("ControllerLauncher", "controller_cmd", "", "list", [], (START,),
           "command in place of `python -m <package>.controller`"),
    Option("ControllerLauncher", "controller_args", "", "list", [], (START,), "more arguments for the controller"),
    Option("EngineLauncher", "engine_cmd", "", "list", [], (START, ENGINES),
           "command in place of `python -m <package>.engine`"),
    Option("EngineLauncher", "engine_args", "", "list", [], (START, ENGINES), "more arguments for the engines"),
    Option("LocalProcessLauncher", "stop_seconds_until_kill", "", "seconds", 5.0, (START, ENGINES),
           "seconds between SIGTERM and SIGKILL"),

    Option("IPController", "ip", "--ip", "text", "127.0.0.1", ("controller",), "address to listen on; * for all"),
    Option("IPController", "ports", "--ports", "ports", [], ("controller",),
           "ports to choose from, as in 10101-10120,10130 (default: any free one)"),
    Option("IPController", "location", "--location", "text", "", ("controller",),
           "name or address by which others reach this host (default: its name)"),
    Option("IPController", "transport", "--transport", "transport", "auto", ("controller",),
           "ipc (this host only, no port), tcp, or auto: both"),
    Option("IPController", "reuse_files", "--reuse", "switch", False, ("controller",),
           "keep keys and ports of the previous run, so that its connection files stay valid"),
    Option("IPController", "auto_create", "", "switch", True, ("controller",), "create the profile if there is none"),
    Option("IPController", "parent", "--parent", "number", 0, ("controller",), "exit when this process is gone"),
    Option("HeartMonitor", "period", "--ping", "count", 2000, ("controller",), "milliseconds between heartbeats"),
    Option("TaskScheduler", "hwm", "--hwm", "number", None, ("controller",),
           "tasks sent ahead to an engine; 0 for no limit (default: adapts to their run time)"),
    Option("TaskScheduler", "crash_limit", "--crash-limit", "number", 1, ("controller",),
           "how often a task may be run again after its engine died"),

    Option("IPEngine", "n", "-n --n", "count", 1, ("engine",), "number of engines"),
    Option("IPEngine", "url_file", "--file", "path", "", ("engine",),
           "the controller's connection file (default: the one in the profile)"),
    Option("IPEngine", "timeout", "--timeout", "seconds", 300.0, ("engine",),
           "seconds to wait for the connection file and the controller"),
    Option("IPEngine", "startup_command", "-c", "text", "", ("engine",), "Python code to run first"),
    Option("IPEngine", "startup_script", "-s", "path", "", ("engine",), "Python file to run first"),
    Option("IPEngine", "parent", "--parent", "number", 0, ("engine",), "exit when this process is gone"),
)
COMMAND_LINE_ONLY = ("profile", "profile_dir", "ipython_dir")  # they say which file to read


# ---------------------------------------------------------------- kinds of values


def _whole(value: Any, least: int) -> int:
    if isinstance(value, (bool, float)):
        raise ValueError
    number = int(value)
    if number < least:
        raise ValueError
    return number


def _seconds(value: Any) -> float:
    if isinstance(value, bool) or not 0 <= float(value) < 1e9:
        raise ValueError
    return float(value)


def _text(value: Any) -> str:
    if not isinstance(value, (str, os.PathLike)):
        raise ValueError
    return os.fspath(value)


def _path(value: Any) -> str:
    text = _text(value)
    return os.path.abspath(os.path.expanduser(text)) if text else ""


def _cluster_id(value: Any) -> str:
    text = _text(value)
    if text != os.path.basename(text) or text.startswith(".") or not text.isprintable():
        raise ValueError
    return text


def _switch(value: Any) -> bool:
    if isinstance(value, str):
        return {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}[value.lower()]
    if value not in (True, False):
        raise ValueError
    return bool(value)


def _level(value: Any) -> int:
    number = int(value) if str(value).isdigit() else logging.getLevelName(str(value).upper())
    if not isinstance(number, int):
        raise ValueError
    return number


def _one_of(*words: str) -> Callable[[Any], str]:
    def convert(value: Any) -> str:
        if value not in words:
            raise ValueError
        return str(value)
    return convert


def _literal(kind: type) -> Callable[[Any], Any]:
    def convert(value: Any) -> Any:
        if isinstance(value, str):
            import ast

            value = ast.literal_eval(value)
        if isinstance(value, tuple) and kind is list:
            value = list(value)
        if not isinstance(value, kind):
            raise ValueError
        return value
    return convert


def _ports(value: Any) -> List[int]:
    """[10101, 10102, 10130] of "10101-10102,10130", an int or a list."""
    ports: List[int] = []
    for part in str(value).split(",") if isinstance(value, (str, int)) else map(str, value):
        low, _, high = part.strip().partition("-")
        span = range(int(low), int(high or low) + 1)
        if not span:
            raise ValueError
        ports += span
    if not all(0 < port < 65536 for port in ports):
        raise ValueError
    return ports


KINDS: Dict[str, Tuple[Callable[[Any], Any], str]] = {
    "any": (lambda value: value, "a value"),
    "text": (_text, "a text"),
    "path": (_path, "a path"),
    "id": (_cluster_id, "a name without slashes"),
    "count": (lambda value: _whole(value, 1), "a whole number above 0"),
    "number": (lambda value: _whole(value, 0), "a whole number, 0 or more"),
    "seconds": (_seconds, "a number of seconds"),
    "switch": (_switch, "True or False"),
    "level": (_level, "DEBUG, INFO, WARNING, ERROR, CRITICAL or a number"),
    "list": (_literal(list), "a list like ['a', 'b']"),
    "dict": (_literal(dict), "a dict like {'a': 'b'}"),
    "ports": (_ports, "ports like 10101-10120,10130"),
    "transport": (_one_of("auto", "ipc", "tcp"), "auto, ipc or tcp"),
    "format": (_one_of("text", "json"), "text or json"),
}


def convert(option: Option, value: Any, origin: str) -> Any:
    """`value` as the kind of `option`; `origin` (a flag, or a name in a file) is what the error speaks of."""
    function, wanted = KINDS[option.kind]
    if value is None and option.default is None:
        return None
    try:
        return function(value)
    except (ValueError, TypeError, KeyError, SyntaxError):
        raise ConfigError(f"{origin} needs {wanted}, not {value!r}.") from None


# ---------------------------------------------------------------- settings


class Given(NamedTuple):
    """A value that somebody set, and where: a flag, or a file and name."""

    value: Any
    origin: str


Layer = Dict[str, Given]  # "Section.key" -> what was set there


class Settings(Dict[str, Any]):
    """`{"Section.key": value}` for every option of one role.

    Attributes:
        role: what was asked for, as in `PROGRAMS`.
        profile_dir: the profile's directory, absolute.
        args: words of the command line that are no flags. rest: what followed `--`.
        layers: what was set in the file and on the command line, in this order.
    """

    def __init__(self, role: str, profile_dir: Path, layers: List[Layer]):
        super().__init__()
        self.role, self.profile_dir, self.layers = role, profile_dir, layers
        self.args: List[str] = []
        self.rest: List[str] = []
        for option in _options(role):
            self[option.name] = self._resolve(option, _chain(option.section, role))

    @property
    def log_file(self) -> Optional[Path]:
        """Where `--log-to-file` says to log, or None."""
        if not self.get("Application.log_to_file"):
            return None
        program = PROGRAMS[self.role][0].split()[0]
        return log_file(self.profile_dir, program, self.get("Application.cluster_id", ""))

    def section(self, *names: str) -> Dict[str, Any]:
        """`{key: value}` of sections, weakest first, and of what they inherit."""
        chain = [link for name in names for link in _chain(name, self.role)]
        return {o.key: self._resolve(o, chain) for o in _options(self.role) if o.section in chain}

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
        return value


def _options(role: str) -> List[Option]:
    return [o for o in OPTIONS if role in o.roles]


def _app(role: str) -> str:
    return role.split()[0]


def _chain(section: str, role: str) -> Tuple[str, ...]:
    if section == "Application":
        app = APPS[_app(role)]
        return ("Application", "BaseIPythonApplication", "BaseParallelApplication") + CHAINS[app]
    return CHAINS.get(section, (section,))


def _known(app: str) -> Dict[str, Dict[str, Option]]:
    """`{section: {key: option}}`: every name that the config file and command line of `app` may set."""
    known: Dict[str, Dict[str, Option]] = {}
    for option in OPTIONS:
        if app not in map(_app, option.roles):
            continue
        names = [option.section, *_chain(option.section, app)]
        for chain in CHAINS.values():
            if option.section in chain:
                names += chain[chain.index(option.section):]
        for name in names:
            known.setdefault(name, {})[option.key] = option
    return known


def _unneeded(section: str, key: str, app: str) -> bool:
    return any(section in _chain(name, app) and ("*" in keys or key in keys) for name, keys in UNNEEDED.items())


def _suggest(word: str, words: Iterable[str]) -> str:
    import difflib

    close = difflib.get_close_matches(word, list(words), 1, 0.6)
    return f"; did you mean {close[0]}?" if close else "."


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
        raise ConfigError(f"{path}, line {lines[-1]}: {type(e).__name__}: {e}.") from e


def _file_layer(app: str, profile_dir: Path) -> Layer:
    path = profile_dir / f"ip{app}_config.py"
    if not path.exists():
        return {}
    config = Config()
    run_config_file(path, config)
    known = _known(app)
    elsewhere = {name: other for other in APPS if other != app for name in _known(other) if name not in known}
    layer: Layer = {}
    for section, keys in config.items():
        for key, value in keys.items():
            origin = f"c.{section}.{key} in {path}"
            if isinstance(value, Deferred) and not value.calls:
                continue
            if key in known.get(section, {}) and key not in COMMAND_LINE_ONLY:
                layer[f"{section}.{key}"] = Given(value, origin)
            elif key in COMMAND_LINE_ONLY or _unneeded(section, key, app):
                log().warning("%s is not needed and has no effect.", origin)
            elif section in elsewhere:
                log().warning("%s has no effect here: it belongs in ip%s_config.py.", origin, elsewhere[section])
            elif section in known:
                raise ConfigError(f"unknown key {origin}" + _suggest(key, known[section]))
            else:
                raise ConfigError(f"unknown section {origin}" + _suggest(section, known))
    return layer


# ---------------------------------------------------------------- command lines


def parse(role: str, argv: Iterable[str]) -> Settings:
    """Read the command line of `role`, its profile and its config file.

    Forms: `-n 4`, `-n4`, `--n=4`, `--n 4`, `--ip=*`, `profile=mpi`, `--IPController.ip=*`, `--debug`, `-- rest`.

    Raises:
        ConfigError: an unknown flag, a bad value, an unknown profile, a bad config file.
        SystemExit: `--help`, `--help-all` and `--version`, after printing.
    """
    layer, args, rest = _read_argv(role, list(argv))
    extra = ([] if role == "cluster stop" else args) + ([] if role == START else rest)
    if extra:
        raise ConfigError(f"unexpected argument {extra[0]!r} for {PROGRAMS[role][0]}. See --help")
    where = {key: given.value for key in COMMAND_LINE_ONLY
             for given in [layer.get(f"Application.{key}")] if given and given.value}
    creates = role in (START, "controller")
    profile_dir = profile_path(**where) if creates else find_profile_dir(**where)
    settings = load(role, profile_dir, layer)
    settings.args, settings.rest = args, rest
    if creates:
        if where and not profile_dir.is_dir() and not settings[f"{APPS[_app(role)]}.auto_create"]:
            _no_such_profile(profile_dir)
        make_profile_dir(profile_dir)
    return settings


def load(role: str, profile_dir: PathLike, given: Optional[Layer] = None) -> Settings:
    """The settings of `role` in a profile; `given` is the layer of the command line, or what stands for it."""
    path = Path(os.path.abspath(profile_dir))
    return Settings(role, path, [_file_layer(_app(role), path), given or {}])


def _flags(role: str) -> Dict[str, Tuple[Option, Optional[str]]]:
    """`{flag: (option, constant that the flag sets, or None if it takes a value)}`"""
    flags: Dict[str, Tuple[Option, Optional[str]]] = {}
    for option in _options(role):
        for word in option.flags.split():
            flag, _, constant = word.partition("=")
            flags[flag] = (option, constant or ("True" if option.kind == "switch" else None))
    return flags


def _read_argv(role: str, argv: List[str]) -> Tuple[Layer, List[str], List[str]]:
    flags, known = _flags(role), _known(_app(role))
    layer: Layer = {}
    args: List[str] = []
    while argv:
        word = argv.pop(0)
        if word == "--":
            break
        if word in ("-h", "--help", "--help-all", "--version"):
            print(version() if word == "--version" else help_text(role, word == "--help-all"))
            raise SystemExit(0)
        if not word.startswith("-"):
            if "=" not in word or "--" + word.partition("=")[0] not in flags:
                args.append(word)
                continue
            word = "--" + word  # profile=mpi
        elif word[1:2] != "-" and word[:2] in flags and len(word) > 2:
            word = word[:2] + "=" + word[2:].lstrip("=")  # -n4
        flag, equals, value = word.partition("=")
        option, constant, name = _find_flag(flag, flags, known, role)
        if equals and constant is not None and option.kind != "switch":
            raise ConfigError(f"{flag} takes no value.")
        if not equals and constant is None:
            if not argv or argv[0].startswith("--"):
                raise ConfigError(f"{flag} needs {KINDS[option.kind][1]}. See --help")
            value = argv.pop(0)
        layer[name] = Given(convert(option, value if equals or constant is None else constant, flag), flag)
    return layer, args, argv


def _find_flag(flag: str, flags: Dict[str, Tuple[Option, Optional[str]]], known: Dict[str, Dict[str, Option]],
               role: str) -> Tuple[Option, Optional[str], str]:
    """(option, constant, name to set) of `--flag` or `--Section.key`."""
    if "." in flag:
        section, _, key = flag.lstrip("-").partition(".")
        if section not in known:
            raise ConfigError(f"unknown section in {flag}" + _suggest(section, known))
        if key not in known[section]:
            raise ConfigError(f"unknown key in {flag}" + _suggest(key, known[section]))
        return known[section][key], None, f"{section}.{key}"
    if flag not in flags and "--" + flag[2:].replace("_", "-") not in flags:
        raise ConfigError(f"unknown flag {flag} for {PROGRAMS[role][0]}" + _suggest(flag, flags) + " See --help")
    option, constant = flags[flag if flag in flags else flag.replace("_", "-")]
    return option, constant, option.name


def version() -> str:
    """The version of the package."""
    return str(getattr(sys.modules.get(__package__ or ""), "__version__", "unknown"))


def help_text(role: str, everything: bool = False) -> str:
    """What `--help` and `--help-all` print."""
    program, purpose = PROGRAMS[role]
    lines = [purpose, "", f"usage: {program} [flags]", ""]
    for option in _options(role):
        value = "" if option.kind == "switch" else f" <{option.kind}>"
        shown = ", ".join(w.partition("=")[0] + ("" if "=" in w else value) for w in option.flags.split())
        if everything:
            shown = (shown + ", " if shown else "") + f"--{option.name}={option.default!r}"
            lines += [f"  {shown}", f"      {option.help}"]
        elif shown:
            lines.append(f"  {shown:<34} {option.help}" if len(shown) < 34 else f"  {shown}\n{'':37}{option.help}")
    lines += ["", "--Section.key is a name of the config files." if everything else
              "--help-all shows every setting, --version the version."]
    return "\n".join(lines)


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
        return Path(_path(profile_dir))
    if profile and (profile != os.path.basename(profile) or profile.startswith(".")):
        raise ConfigError(f"A profile's name has no slashes, unlike {profile!r}; use --profile-dir for a path.")
    return Path(_path(ipython_dir or os.environ.get("IPYTHONDIR") or "~/.ipython"), f"profile_{profile or 'default'}")


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
        _no_such_profile(path)
    return path


def _no_such_profile(path: Path) -> NoReturn:
    raise ConfigError(f"There is no profile {path}; `mkdir -p {path}` creates it, and so does starting a cluster with "
                      "this profile.")


def make_profile_dir(path: PathLike) -> None:
    """Make a profile's directory and what it needs: security/ and pid/ (0700) and log/.

    Raises:
        ConfigError: it can't be written.
    """
    for name, mode in (("security", 0o700), ("pid", 0o700), ("log", 0o755)):
        folder = Path(path, name)
        try:
            folder.mkdir(mode=mode, parents=True, exist_ok=True)
            if mode == 0o700 and stat.S_IMODE(folder.stat().st_mode) != mode:
                folder.chmod(mode)
        except OSError as e:
            raise ConfigError(f"The profile directory {folder} can't be written ({e.strerror}); choose another one "
                              "with --profile-dir or $IPYTHONDIR.") from None


@contextlib.contextmanager
def locked(folder: PathLike) -> Iterator[None]:
    """Keep other processes out of the same block; where directories can't be locked (some network file systems, Windows)
    nobody is kept out."""
    try:
        import fcntl

        fd = os.open(folder, os.O_RDONLY)
    except (ImportError, OSError):
        yield
        return
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def log_file(profile_dir: PathLike, program: str, cluster_id: str = "", pid: Optional[int] = None) -> Path:
    """`<profile>/log/<program>[-<cluster_id>]-<pid>.log`; `pid` is ours by default."""
    return Path(profile_dir, "log", "-".join(filter(None, (program, cluster_id, str(pid or os.getpid())))) + ".log")


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
    path = Path(path)
    text = json.dumps(obj, indent=2, default=os.fspath) + "\n"
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
    except ValueError as e:
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
    info = check_connection(read_json(path), os.fspath(path), role, protocol)
    if os.name == "posix" and Path(path).stat().st_mode & 0o077:
        raise ConnectionFileError(f"{path} can be read by others, who could use its keys; run `chmod 600 {path}`.")
    return info


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
    if pid <= 0:
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


def memory_limit() -> int:
    """Bytes of memory that this process may use: the machine's, or the limit of its control group."""
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 1 << 62]
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):  # there is none, or it is "max"
            limits.append(int(Path(path).read_text()))
    return min(limits)


# ---------------------------------------------------------------- logging


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
