"""Every setting there is: `OPTIONS`, one literal table that is schema, parser, help text and commented config files.

    OPTIONS ──► KINDS (what a value must be) ──► defaults
       │  └───► CHAINS (which sections of a config file set it)
       └──► flags ──► read_argv(words) ──► layer {"Section.key": Given(value, origin)}, arguments, rest

Rules that hold here:
- an option is one row, and nothing else knows its flags, its kind or its default;
- a name that nobody knows is an error with a suggestion; one that IPython Parallel has and we do not need (`UNNEEDED`)
  is a warning.
"""

from __future__ import annotations

import logging
import os
import sys
from typing import Any, Callable, Dict, Iterable, List, NamedTuple, Optional, Tuple

from .errors import ConfigError

START, ENGINES = "cluster start", "cluster engines"
CLUSTER = (START, ENGINES, "cluster stop", "cluster list", "cluster status", "cluster logs", "cluster clean")
CONFIGURED = CLUSTER + ("controller", "engine")  # these read config files
PROFILE = ("profile create", "profile list", "profile locate")
SERVING = (START, ENGINES, "controller", "engine")  # these stay and log
RECORDS = ("db stats", "db query", "db export", "db vacuum")
STORING = ("controller", *RECORDS)  # these open databases
EVERY = CONFIGURED + PROFILE + RECORDS + ("logger", "doctor")

# Role -> (program, what it does). The first word of a role names its config file, `ip<word>_config.py`.
PROGRAMS = {
    START: ("ipcluster start", "Start a controller and engines; Ctrl-C stops them."),
    ENGINES: ("ipcluster engines", "Start engines for a controller that runs already."),
    "cluster stop": ("ipcluster stop", "Stop clusters."),
    "cluster list": ("ipcluster list", "List clusters, the stopped ones with the reason."),
    "cluster status": ("ipcluster status", "Show what each engine has to do."),
    "cluster logs": ("ipcluster logs", "Show the end of the logs: of engines, or of all processes."),
    "cluster clean": ("ipcluster clean", "Remove what dead clusters left behind, and old logs."),
    "controller": ("ipcontroller", "Start a controller, to which engines and clients connect."),
    "engine": ("ipengine", "Start engines on this host and connect them to a controller."),
    "profile create": ("ipclite profile create", "Make a profile, with commented config files."),
    "profile list": ("ipclite profile list", "List the profiles."),
    "profile locate": ("ipclite profile locate", "Show the directory of a profile."),
    "db stats": ("ipclite db stats", "Show which database has the records of tasks, and how many."),
    "db query": ("ipclite db query", "Show the records that meet conditions."),
    "db export": ("ipclite db export", "Write records as JSON, one to a line."),
    "db vacuum": ("ipclite db vacuum", "Give back the room of records that were dropped."),
    "logger": ("ipclite logger", "Show the log lines of processes that were started with --log-url."),
    "doctor": ("ipclite doctor", "Check, step by step, why engines or clients do not connect."),
}
ARGUMENTS = {"cluster stop": "CLUSTER_ID ...", "cluster logs": "ENGINE ...", "profile create": "NAME",
             "profile locate": "NAME", "db query": "CONDITION ...", "db export": "CONDITION ..."}
APPS = {"cluster": "Cluster", "controller": "IPController", "engine": "IPEngine"}  # their sections

# Section -> the sections that set its keys, weakest first: old names, base classes, itself.
CHAINS: Dict[str, Tuple[str, ...]] = {
    "Cluster": ("IPClusterEngines", "IPClusterStart", "Cluster"),
    "IPController": ("HubFactory", "IPControllerApp", "IPController"),
    "IPEngine": ("EngineFactory", "IPEngineApp", "IPEngine"),
    "IPKernelApp": ("InteractiveShellApp", "IPKernelApp"),
    "LocalControllerLauncher": ("BaseLauncher", "ControllerLauncher", "LocalProcessLauncher",
                                "LocalControllerLauncher"),
    "LocalEngineSetLauncher": ("BaseLauncher", "EngineLauncher", "LocalProcessLauncher", "LocalEngineLauncher",
                               "LocalEngineSetLauncher"),
    "SSHControllerLauncher": ("BaseLauncher", "ControllerLauncher", "SSHLauncher", "SSHControllerLauncher"),
    "SSHEngineLauncher": ("BaseLauncher", "EngineLauncher", "SSHLauncher", "SSHEngineLauncher"),
    "SSHEngineSetLauncher": ("BaseLauncher", "EngineLauncher", "SSHLauncher", "SSHEngineLauncher", "SSHEngineSetLauncher"),
    "SSHProxyEngineSetLauncher": ("BaseLauncher", "EngineLauncher", "SSHLauncher", "SSHProxyEngineSetLauncher"),
    "MPILauncher": ("MPIExecLauncher", "MPILauncher"),
    "MPIControllerLauncher": ("BaseLauncher", "ControllerLauncher", "LocalProcessLauncher", "MPIExecLauncher",
                              "MPILauncher", "MPIExecControllerLauncher", "MPIControllerLauncher"),
    "MPIEngineSetLauncher": ("BaseLauncher", "EngineLauncher", "LocalProcessLauncher", "MPIExecLauncher",
                             "MPILauncher", "MPIExecEngineSetLauncher", "MPIEngineSetLauncher"),
}

for _system in ("", "PBS", "SGE", "Slurm", "LSF", "HTCondor"):
    _common = tuple(dict.fromkeys(("BatchSystemLauncher", f"{_system or 'BatchSystem'}Launcher")))
    for _role, _kind in (("Controller", "ControllerLauncher"), ("Engine", "EngineSetLauncher")):
        CHAINS[(_system or "Batch") + _kind] = ("BaseLauncher", f"{_role}Launcher", *_common,
                                                *((f"Batch{_kind}",) if _system else ()), (_system or "Batch") + _kind)

# What IPython Parallel has and we do not need: accepted with a warning. "*" stands for the whole section.
UNNEEDED: Dict[str, Tuple[str, ...]] = {
    "Session": ("*",),
    **dict.fromkeys(("IPKernelApp", "IPythonKernel", "Kernel", "InteractiveShell", "ZMQInteractiveShell",
                     "ConnectionFileMixin", "HistoryManager", "Completer", "IPCompleter", "ProfileDir", "InlineBackend",
                     "StoreMagics"), ("*",)),
    "Hub": ("*",),
    "DictDB": ("cull_fraction",),
    "Application": ("log_format", "log_datefmt", "logging_config", "overwrite", "verbose_crash",
                    "add_ipython_dir_to_sys_path", "auto_create"),
    "HeartMonitor": ("debug",),
    "Cluster": ("early_shutdown", "cluster_file", "load_profile", "shutdown_atexit", "engine_set_id"),
    "IPController": ("broadcast_scheduler_depth", "use_threads", "enable_curve", "curve_publickey", "curve_secretkey",
                     "monitor_ip", "monitor_transport", "registration_timeout", "hb", "mux", "task", "control",
                     "iopub", "mon_port", "notifier_port", "regport", "client_json_file", "engine_json_file"),
    "IPEngine": ("enable_nanny", "wait_for_url_file", "max_heartbeat_misses", "curve_serverkey", "curve_publickey",
                 "curve_secretkey", "out_stream_factory", "display_hook_factory", "mpi_registration_delay",
                 "url_file_name", "connection_info_env", "paramiko"),
    **dict.fromkeys(("SSHControllerLauncher", "SSHEngineSetLauncher", "SSHProxyEngineSetLauncher"), (
        "ssh_cmd", "scp_cmd", "scp_args", "poll_seconds", "remote_output_file", "delay", "stop_timeout", "output_file")),
    "LocalEngineSetLauncher": ("delay", "poll_seconds"),
    "LocalControllerLauncher": ("poll_seconds", "connection_info_timeout", "stop_timeout"),
    "MPIEngineSetLauncher": ("poll_seconds", "stop_timeout"),
    **dict.fromkeys([f"{system}ControllerLauncher" for system in ("Batch", "PBS", "SGE", "Slurm", "LSF", "HTCondor")],
                    ("connection_info_timeout",)),
    "MPIControllerLauncher": ("poll_seconds", "connection_info_timeout", "stop_timeout"),
}

# The same for flags that scripts still give: whether a value follows, and what to do about it.
UNNEEDED_FLAGS: Dict[str, Tuple[bool, str]] = {
    "--usethreads": (False, "the controller is one process"),
    "--secure": (False, "connections are always encrypted and authenticated"),
    "--no-secure": (False, "connections are always encrypted and authenticated"),
    "--ident": (True, "messages carry no session name"),
    "--user": (True, "messages carry no user name"),
    "--keyfile": (True, "each connection file holds the keys of its role"),
}

# Settings of launchers that this version does not have: a profile that holds them loads, with one warning.
_COMMON = ("controller_args", "controller_cmd", "engine_args", "engine_cmd", "work_dir", "environment", "n",
           "stop_timeout", "output_limit", "connection_info_timeout")
_KINDS_OF_LAUNCHER = ("Launcher", "ControllerLauncher", "EngineLauncher", "EngineSetLauncher")
ABSENT: Dict[str, Tuple[str, ...]] = {
    **{system + kind: ("*",) for system in ("WindowsHPC", "IPControllerJob", "IPEngineSetJob", "WinHPCJob")
       for kind in ("", *_KINDS_OF_LAUNCHER)},
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


def _limits(section: str) -> Tuple[Option, ...]:
    """How long a database that lasts keeps records of finished tasks."""
    return (Option(section, "record_limit", "", "number", 0, STORING,
                   "finished tasks on record, of which the oldest are dropped first; 0 for no limit"),
            Option(section, "size_limit", "", "number", 0, STORING,
                   "bytes that all records may take, of which those of finished tasks are dropped, oldest first; 0 for no limit"),
            Option(section, "record_age", "", "seconds", 0.0, STORING,
                   "seconds after which the record of a finished task is dropped; 0 for never"))


OPTIONS = (
    Option("Application", "profile", "--profile", "text", "", EVERY, "name of the profile (default: default)"),
    Option("Application", "profile_dir", "--profile-dir", "path", "", EVERY, "directory of the profile"),
    Option("Application", "ipython_dir", "--ipython-dir", "path", "", EVERY,
           "where profiles are (default: $IPYTHONDIR or ~/.ipython)"),
    Option("Application", "cluster_id", "--cluster-id", "id", "",
           (*SERVING, "cluster stop", "cluster list", "cluster status", "cluster logs", *RECORDS, "doctor"),
           "tells apart the clusters of one profile"),
    Option("Application", "extra_config_file", "--config", "path", "", CONFIGURED,
           "one more config file, over those of the profile"),
    Option("Application", "log_level", "--log-level --debug=DEBUG --quiet=ERROR", "level", "INFO", EVERY,
           "DEBUG, INFO, WARNING, ERROR or CRITICAL"),
    Option("Application", "log_to_file", "--log-to-file", "switch", False, CONFIGURED,
           "log to <profile>/log instead of stderr"),
    Option("Application", "log_url", "--log-url", "text", "", SERVING,
           "send log lines to the `ipclite logger` at this address as well"),
    Option("Application", "clean_logs", "--clean-logs", "switch", False, CONFIGURED,
           "first remove the logs of all processes that have ended"),
    Option("Application", "work_dir", "--work-dir", "path", "", CONFIGURED, "run in this directory"),
    Option("Application", "copy_config_files", "--init", "switch", False, CONFIGURED,
           "first write commented config files into the profile, where it has none"),
    Option("Application", "show_config", "--show-config", "switch", False, CONFIGURED,
           "print every setting and where it comes from, and exit"),
    Option("Application", "show_config_json", "--show-config-json", "switch", False, CONFIGURED, "the same as JSON"),

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
    Option("Cluster", "delay", "--delay", "seconds", 0.0, (START,),
           "seconds between the start of the controller and that of the engines"),
    Option("Cluster", "send_engines_connection_env", "", "switch", False, (START, ENGINES),
           "give engines the connection file's content in $IPP_CONNECTION_INFO, for hosts that do not see the file"),
    Option("Cluster", "keep_engines", "--keep-engines", "switch", False, (START, ENGINES),
           "start engines anew in place of those whose job or process has ended"),
    Option("Cluster", "restart_controller", "--restart-controller", "switch", False, (START,),
           "start the controller anew when it was killed, with its keys and ports (--reuse); with --sqlitedb nothing is lost"),
    Option("Cluster", "daemonize", "--daemonize", "switch", False, (START, ENGINES),
           "return once the engines are ready, and leave them running"),
    Option("Cluster", "dry_run", "--dry-run", "switch", False, (START, ENGINES),
           "only print what would be run or submitted"),
    Option("Cluster", "auto_create", "", "switch", True, (START,), "create the profile if there is none"),
    Option("IPClusterStop", "all_cluster_ids", "--all", "switch", False, ("cluster stop",),
           "stop all clusters of the profile"),
    Option("IPClusterStop", "signal", "--signal", "signal", 15, ("cluster stop",),
           "what to stop processes with, as in SIGKILL; those that go on after five seconds are killed"),
    Option("IPClusterList", "output_format", "-o --output-format --json=json", "format", "text",
           ("cluster list", "cluster status", "db stats", "db query", "doctor"), "text or json"),
    Option("IPClusterLogs", "lines", "-n --lines", "number", 20, ("cluster logs",), "lines of each log; 0 for all"),
    Option("IPClusterLogs", "follow", "-f --follow", "switch", False, ("cluster logs",),
           "go on to show what is written, until Ctrl-C"),
    Option("IPClusterClean", "force", "--force", "switch", False, ("cluster clean",),
           "clean even where clusters run"),
    Option("IPClusterClean", "all_profiles", "--all", "switch", False, ("cluster clean",), "clean all profiles"),

    Option("LogWatcher", "url", "--url", "text", "tcp://127.0.0.1:0", ("logger",),
           "where to listen, as in tcp://*:20202; port 0 for any"),
    Option("LogWatcher", "topics", "--topics", "text", "", ("logger",),
           "which lines to show, as in ipengine,ipcontroller.ERROR (default: all)"),

    Option("Records", "keys", "--keys", "text", "", ("db query", "db export"),
           "what of each record to show, separated by commas"),
    Option("Records", "output", "--output", "path", "", ("db export",), "file to write to (default: stdout)"),

    Option("Profile", "parallel", "--parallel", "switch", True, ("profile create",),
           "write the config files of ipcluster, ipcontroller and ipengine"),
    Option("Profile", "reset", "--reset", "switch", False, ("profile create",), "write them anew where they are there"),

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
    Option("MPILauncher", "mpi_cmd", "", "list", ["mpiexec"], (START, ENGINES),
           "command that starts ranks, as in ['mpirun'] or ['srun', '--mpi=pmix']"),
    Option("MPILauncher", "mpi_args", "", "list", [], (START, ENGINES), "more arguments for it"),
    Option("SSHLauncher", "hostname", "", "text", "", (START, ENGINES), "the other host"),
    Option("SSHLauncher", "user", "", "text", "", (START, ENGINES), "the user there (default: what ~/.ssh/config says, or ours)"),
    Option("SSHLauncher", "location", "", "text", "", (START, ENGINES), "the two in one, as in user@host:port"),
    Option("SSHLauncher", "sshkey", "", "path", "", (START, ENGINES), "private key to try first"),
    Option("SSHLauncher", "ssh_args", "", "list", [], (START, ENGINES),
           "arguments as for the ssh program: -p, -l, -i, -J and most of -o; better put these into ~/.ssh/config"),
    Option("SSHLauncher", "remote_python", "", "text", "", (START, ENGINES), "Python there (default: python3)"),
    Option("SSHLauncher", "remote_profile_dir", "", "text", "", (START, ENGINES),
           "profile directory there; made if need be (default: as here, below the home directory there)"),
    Option("SSHLauncher", "to_send", "", "list", None, (START, ENGINES),
           "pairs (path here, path there) of files to send first; [] for none (default: the connection files)"),
    Option("SSHLauncher", "to_fetch", "", "list", None, (START, ENGINES),
           "pairs (path there, path here) of files to fetch from the controller's host; [] for none (default: the "
           "connection files)"),
    Option("SSHLauncher", "connection_info_timeout", "", "seconds", 60.0, (START,),
           "seconds to wait for the files that are to be fetched"),
    Option("SSHLauncher", "stop_seconds_until_kill", "", "seconds", 5.0, (START, ENGINES),
           "seconds between SIGTERM and SIGKILL"),
    Option("SSHEngineSetLauncher", "engines", "", "dict", {}, (START, ENGINES),
           "{'host': n}, {'user@host:port': (n, ['--flag'])} or {'host': {'n': n, 'remote_python': 'python3.12'}}"),
    Option("SSHProxyEngineSetLauncher", "ipcluster_cmd", "", "list", [], (START, ENGINES),
           "command there in place of `python -m <package>.cluster`"),
    Option("SSHProxyEngineSetLauncher", "ipcluster_args", "", "list", [], (START, ENGINES),
           "more arguments for `ipcluster engines` there, as in ['--engines=slurm']"),

    Option("BatchSystemLauncher", "queue", "--queue", "label", "", (START, ENGINES), "queue or partition to submit to"),
    Option("BatchSystemLauncher", "account", "--account", "label", "", (START, ENGINES),
           "account or project that jobs are charged to"),
    Option("BatchSystemLauncher", "qos", "--qos", "label", "", (START, ENGINES), "quality of service of jobs"),
    Option("BatchSystemLauncher", "timelimit", "--timelimit", "label", "", (START, ENGINES),
           "time that jobs may run, as the batch system writes it"),
    Option("BatchSystemLauncher", "memory", "--memory", "label", "", (START, ENGINES),
           "memory of each node, as in 16G; of each engine, if engines_per_node is not given"),
    Option("BatchSystemLauncher", "gpus", "--gpus", "label", "", (START, ENGINES),
           "GPUs of each node; of each engine, if engines_per_node is not given"),
    Option("BatchSystemLauncher", "constraint", "--constraint", "label", "", (START, ENGINES),
           "what nodes must have, as the batch system writes it"),
    Option("BatchSystemLauncher", "engines_per_job", "--engines-per-job", "number", 0, (START, ENGINES),
           "split the engines into jobs of so many, usable as each of them starts (default: one job)"),
    Option("BatchSystemLauncher", "engines_per_node", "--engines-per-node", "number", 0, (START, ENGINES),
           "engines on each node of a job (default: as the batch system likes)"),
    Option("BatchSystemLauncher", "options", "", "lines", [], (START, ENGINES),
           "more options for the job script, as in ['--exclusive', '--nice=100']"),
    Option("BatchSystemLauncher", "prologue", "", "text", "", (START, ENGINES),
           "shell commands that jobs run first, as in 'module load python'"),
    Option("BatchSystemLauncher", "parallel_environment", "", "text", "smp", (START, ENGINES),
           "Grid Engine's parallel environment for several engines on one node"),
    Option("BatchSystemLauncher", "batch_template", "", "text", "", (START, ENGINES),
           "job script in place of ours, with fields like {n}, {n//4}, {queue}, {profile_dir}, {program_and_args}"),
    Option("BatchSystemLauncher", "batch_template_file", "", "text", "", (START, ENGINES),
           "file that holds it, here or in the profile"),
    Option("BatchSystemLauncher", "namespace", "", "dict", {}, (START, ENGINES), "more fields for it"),
    Option("BatchSystemLauncher", "batch_file_name", "", "text", "", (START, ENGINES),
           "name of the job script in the work directory (default: one in <profile>/batch)"),
    Option("BatchSystemLauncher", "output_file", "", "text", "", (START, ENGINES),
           "where jobs write what they print (default: a file in <profile>/log)"),
    Option("BatchSystemLauncher", "submit_command", "", "list", [], (START, ENGINES),
           "command that submits a job (default: the batch system's)"),
    Option("BatchSystemLauncher", "delete_command", "", "list", [], (START, ENGINES),
           "command that cancels jobs, whose ids are appended or put where it says IDS"),
    Option("BatchSystemLauncher", "signal_command", "", "list", [], (START, ENGINES),
           "command that signals jobs; {signal} and the ids are appended unless it names them"),
    Option("BatchSystemLauncher", "status_command", "", "list", [], (START, ENGINES),
           "command that shows the state of the jobs IDS, in the form of the batch system's own"),
    Option("BatchSystemLauncher", "job_id_regexp", "", "pattern", "", (START, ENGINES),
           "finds the id of a job in what submit_command prints"),
    Option("BatchSystemLauncher", "job_id_regexp_group", "", "number", 0, (START, ENGINES), "its group that is the id"),
    Option("BatchSystemLauncher", "submit_rate", "", "rate", 10.0, (START, ENGINES), "jobs to submit in a second at most"),
    Option("BatchSystemLauncher", "poll_seconds", "", "seconds", 10.0, (START, ENGINES),
           "seconds at most between two looks at the state of jobs"),
    Option("BatchSystemLauncher", "stop_timeout", "", "seconds", 60.0, (START, ENGINES),
           "seconds to wait for cancelled jobs to be gone"),

    Option("IPController", "ip", "--ip", "text", "127.0.0.1", ("controller",), "address to listen on; * for all"),
    Option("IPController", "ports", "--ports --port", "ports", [], ("controller",),
           "ports to choose from, as in 10101-10120,10130 (default: any free one)"),
    Option("IPController", "location", "--location", "text", "", ("controller",),
           "name or address by which others reach this host (default: its name)"),
    Option("IPController", "ssh_server", "--ssh", "text", "", ("controller",),
           "ssh server through which clients reach this controller, as in user@host:port"),
    Option("IPController", "engine_ssh_server", "--enginessh", "text", "", ("controller",),
           "ssh server through which engines reach this controller"),
    Option("IPController", "client_ports", "--client-ports", "ports", [], ("controller",),
           "ports to choose from for clients (default: those of --ports)"),
    Option("IPController", "engine_ports", "--engine-ports", "ports", [], ("controller",),
           "ports to choose from for engines (default: those of --ports)"),
    Option("IPController", "client_ip", "", "text", "", ("controller",), "address for clients (default: ip)"),
    Option("IPController", "engine_ip", "", "text", "", ("controller",), "address for engines (default: ip)"),
    Option("IPController", "transport", "--transport", "transport", "auto", ("controller",),
           "ipc (this host only, no port), tcp, or auto: both"),
    Option("IPController", "client_transport", "", "transport", None, ("controller",),
           "transport for clients (default: transport)"),
    Option("IPController", "engine_transport", "", "transport", None, ("controller",),
           "transport for engines (default: transport)"),
    Option("IPController", "reuse_files", "--reuse", "switch", False, ("controller",),
           "keep keys and ports of the previous run, so that its connection files stay valid; with records that last, carry on its tasks"),
    Option("IPController", "restore_engines", "--restore", "switch", False, ("controller",),
           "carry on a run that was broken off: --reuse, and an error if records do not last"),
    Option("IPController", "auto_create", "", "switch", True, ("controller",), "create the profile if there is none"),
    Option("IPController", "parent", "--parent", "number", 0, ("controller",), "exit when this process is gone"),
    Option("IPController", "owner", "", "text", "", ("controller",),
           "the same for one that is not the parent, as host:pid:start; it counts on that host only"),
    Option("IPController", "db_class", "--dictdb=DictDB --nodb=NoDB --sqlitedb=SQLiteDB --mongodb=MongoDB", "any",
           "DictDB", STORING, "where records of tasks are kept: DictDB (in memory), SQLiteDB (a file), MongoDB (a server), "
           "NoDB (nowhere), or the dotted path of a class of yours"),
    Option("DictDB", "record_limit", "", "number", 10_000, STORING,
           "finished tasks on record, of which the oldest are dropped first; 0 for no limit"),
    Option("DictDB", "size_limit", "", "number", 64 * 1024 * 1024, STORING,
           "bytes of arguments, results and output that the records of finished tasks may hold; 0 for no limit"),
    Option("DictDB", "record_age", "", "seconds", 0.0, STORING,
           "seconds after which the record of a finished task is dropped; 0 for never"),
    Option("SQLiteDB", "filename", "", "text", "", STORING,
           "file of the records (default: tasks.db, or tasks-<cluster id>.db if the cluster has an id and no table is chosen)"),
    Option("SQLiteDB", "location", "", "text", "", STORING, "directory of that file (default: the profile's)"),
    Option("SQLiteDB", "table", "", "text", "", STORING,
           "table of the records; one that is chosen is shared by all clusters of the profile, one after the other"),
    *_limits("SQLiteDB"),
    Option("MongoDB", "database", "", "text", "", STORING,
           "database of the records (default: ipython-tasks, or ipython-tasks-<cluster id>)"),
    Option("MongoDB", "connection_args", "", "list", [], STORING, "arguments of pymongo.MongoClient"),
    Option("MongoDB", "connection_kwargs", "", "dict", {}, STORING, "named arguments of pymongo.MongoClient"),
    *_limits("MongoDB"),
    Option("HeartMonitor", "period", "--ping", "count", 2000, ("controller",), "milliseconds between heartbeats"),
    Option("HeartMonitor", "max_heartmonitor_misses", "", "count", 3, ("controller",),
           "heartbeats without an answer after which a host counts as gone"),
    Option("TaskScheduler", "hwm", "--hwm", "number", None, ("controller",),
           "tasks sent ahead to an engine; 0 for no limit (default: adapts to their run time)"),
    Option("TaskScheduler", "scheme_name", "--scheme", "scheme", "leastload", ("controller",),
           "which engine gets the next task: leastload, lru, plainrandom, twobin, weighted or pure"),
    Option("TaskScheduler", "crash_limit", "--crash-limit", "number", 1, ("controller",),
           "how often a task may be run again after its engine died"),
    Option("TaskScheduler", "restore_grace", "--restore-grace", "seconds", 5.0, ("controller",),
           "seconds that a restarted controller waits for engines and clients of the run before, so that nothing is run twice"),
    Option("TaskScheduler", "no_engine_timeout", "--no-engine-timeout", "seconds", 30.0, ("controller",),
           "seconds that tasks wait for an engine when there is none, before they fail; 0 for no limit"),

    Option("IPEngine", "n", "-n --n", "count", 1, ("engine",), "number of engines"),
    Option("IPEngine", "url_file", "--file", "path", "", ("engine",),
           "the controller's connection file (default: the one in the profile)"),
    Option("IPEngine", "timeout", "--timeout", "seconds", 300.0, ("engine",),
           "seconds to wait for the connection file and the controller"),
    Option("IPEngine", "sshserver", "--ssh", "text", "", ("engine",),
           "reach the controller through this ssh server (default: what the connection file says)"),
    Option("IPEngine", "sshkey", "--sshkey", "path", "", ("engine",), "private key to try first at the ssh server"),
    Option("IPEngine", "location", "--location", "text", "", ("engine",),
           "name or address of the controller (default: what the connection file says)"),
    Option("IPEngine", "registration_url", "--url", "text", "", ("engine",),
           "address of the controller, as in tcp://10.0.1.5:10101 (default: what the connection file says)"),
    Option("IPEngine", "id", "", "number", None, ("engine",),
           "id to ask for, and with several engines of the first; one that is taken is not given (default: the next)"),
    Option("IPEngine", "use_mpi", "--mpi", "switch", False, ("engine",),
           "this process is a rank of MPI, started by mpiexec or its like: set MPI up, and ask for the rank as id"),
    Option("IPEngine", "init_mpi", "", "text", "", ("engine",),
           "Python code that sets MPI up (default: imports mpi4py, if it is there)"),
    Option("IPEngine", "engine_set", "", "text", "", ("engine",), "name that tells the engines of one set from others"),
    Option("IPEngine", "startup_command", "-c", "text", "", ("engine",), "Python code to run first"),
    Option("IPEngine", "startup_script", "-s", "path", "", ("engine",), "Python file to run first"),
    Option("IPKernelApp", "exec_files", "", "list", [], ("engine",), "more Python files to run first"),
    Option("IPKernelApp", "exec_lines", "", "list", [], ("engine",), "more Python code to run first"),
    Option("IPEngine", "lifetime", "--lifetime", "seconds", 0.0, ("engine",),
           "seconds after which the engines end (default: with the job that they run in, if it says when that is)"),
    Option("IPEngine", "drain", "--drain", "seconds", 30.0, ("engine",),
           "seconds before that end in which engines take no more tasks, finish what they run and leave"),
    Option("IPEngine", "restarts", "--restarts", "number", 0, ("engine",),
           "how often in a row a new engine takes the place of one that crashed, at once and then after longer and longer; the count "
           "begins anew when an engine has lived for a minute"),
    Option("IPEngine", "max_tasks", "--max-tasks", "number", 0, ("engine",),
           "tasks (chunks of a map) after which a new process takes an engine's place, between tasks; 0: any number"),
    Option("IPEngine", "max_rss", "--max-rss", "number", 0, ("engine",),
           "MiB of memory above which a new process takes an engine's place, between tasks; 0: any size"),
    Option("IPEngine", "threads", "--threads", "number", None, ("engine",),
           "threads of numerical libraries in each engine, by OMP_NUM_THREADS and its kin; 0 leaves them alone (default: "
           "the CPUs that we may use, divided among the engines of this host)"),
    Option("IPEngine", "gpus", "--gpus-per-engine", "number", 0, ("engine",),
           "GPUs that each engine sees, by CUDA_VISIBLE_DEVICES, in the order of the engines of this host; 0 leaves it alone"),
    Option("IPEngine", "parent", "--parent", "number", 0, ("engine",), "exit when this process is gone"),
    Option("MPI", "use", "", "mpi", "", ("engine",), "what sets MPI up, mpi4py or pytrilinos; implies --mpi"),
    Option("MPI", "init_script", "", "text", "", ("engine",), "the same as IPEngine.init_mpi"),
)
# They say which file to read, or are wishes of the moment.
COMMAND_LINE_ONLY = ("profile", "profile_dir", "ipython_dir", "extra_config_file", "show_config", "show_config_json")


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


def as_path(value: Any) -> str:
    """An absolute path, "~" expanded; "" stays."""
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


def _signal(value: Any) -> int:
    import signal

    if str(value).isdigit():
        return int(signal.Signals(int(value)))
    name = str(value).upper()
    return int(signal.Signals[name if name.startswith("SIG") else "SIG" + name])


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


def _label(value: Any) -> str:
    return _text(value) if not isinstance(value, int) or isinstance(value, bool) else str(value)


def _lines(value: Any) -> List[str]:
    """A text's lines, or a list of texts."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        value = _literal(list)(value)
    return [_text(line).strip() for line in (value.splitlines() if isinstance(value, str) else value)]


def _rate(value: Any) -> float:
    if not 0 < _seconds(value):
        raise ValueError
    return float(value)


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
    "pattern": (lambda value: _text(getattr(value, "pattern", value)), "a regular expression"),
    "label": (_label, "a text or a whole number"),
    "lines": (_lines, "a text or a list of texts"),
    "rate": (_rate, "a number above 0"),
    "path": (as_path, "a path"),
    "id": (_cluster_id, "a name without slashes"),
    "count": (lambda value: _whole(value, 1), "a whole number above 0"),
    "number": (lambda value: _whole(value, 0), "a whole number, 0 or more"),
    "seconds": (_seconds, "a number of seconds"),
    "switch": (_switch, "True or False"),
    "level": (_level, "DEBUG, INFO, WARNING, ERROR, CRITICAL or a number"),
    "signal": (_signal, "a signal's name or number, like SIGTERM"),
    "list": (_literal(list), "a list like ['a', 'b']"),
    "dict": (_literal(dict), "a dict like {'a': 'b'}"),
    "ports": (_ports, "ports like 10101-10120,10130"),
    "transport": (_one_of("auto", "ipc", "tcp"), "auto, ipc or tcp"),
    "format": (_one_of("text", "json"), "text or json"),
    "scheme": (_one_of("leastload", "lru", "plainrandom", "twobin", "weighted", "pure"),
               "leastload, lru, plainrandom, twobin, weighted or pure"),
    "mpi": (_one_of("", "mpi4py", "pytrilinos"), "mpi4py, pytrilinos or nothing"),
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


# ---------------------------------------------------------------- names


def options_of(role: str) -> List[Option]:
    """The rows of `OPTIONS` that a role has."""
    return [o for o in OPTIONS if role in o.roles]


def app_of(role: str) -> str:
    """"cluster", "controller" or "engine": which config file and section name a role goes by."""
    return role.split()[0]


def chain_of(section: str, role: str) -> Tuple[str, ...]:
    """The sections that set the keys of `section`, weakest first."""
    if section == "Application":
        app = APPS.get(app_of(role), "")
        return ("Application", "BaseIPythonApplication", "BaseParallelApplication") + CHAINS.get(app, ())
    return CHAINS.get(section, (section,))


def known_names(app: str) -> Dict[str, Dict[str, Option]]:
    """`{section: {key: option}}`: every name that the config file and command line of `app` may set."""
    known: Dict[str, Dict[str, Option]] = {}
    for option in OPTIONS:
        if app not in map(app_of, option.roles):
            continue
        names = [option.section, *chain_of(option.section, app)]
        for chain in CHAINS.values():
            if option.section in chain:
                names += chain[chain.index(option.section):]
        for name in names:
            known.setdefault(name, {})[option.key] = option
    return known


def is_custom(section: str, app: str) -> bool:
    """May it be the section of a launcher of the user's? If it is nearly the name of one of ours, it is a mistake."""
    import difflib

    if app != "cluster" or not section.endswith("Launcher"):
        return False
    ours = [name for name in known_names(app) if name.endswith("Launcher")]
    return any(section.endswith(name) for name in ours) or not difflib.get_close_matches(section, ours, 1, 0.9)


def is_unneeded(section: str, key: str, app: str) -> bool:
    """Is it a setting that IPython Parallel has and we do not need?"""
    if key in known_names(app).get(section, {}):
        return False
    return any(section in chain_of(name, app) and ("*" in keys or key in keys) for name, keys in UNNEEDED.items())


def is_absent(section: str, key: str, app: str) -> bool:
    """Is it a setting of a launcher that this version does not have?"""
    sections = [section] + [home for home in [APPS.get(app, "")] if section in CHAINS.get(home, ())]
    return any(key in ABSENT.get(name, ()) or "*" in ABSENT.get(name, ()) for name in sections)


def suggest(word: str, words: Iterable[str]) -> str:
    """The end of a sentence about an unknown word: the one that was probably meant."""
    import difflib

    close = difflib.get_close_matches(word, list(words), 1, 0.6)
    return f"; did you mean {close[0]}?" if close else "."


# ---------------------------------------------------------------- command lines


class Given(NamedTuple):
    """A value that somebody set, and where: a flag, or a file and name."""

    value: Any
    origin: str


Layer = Dict[str, Given]  # "Section.key" -> what was set there


def flags_of(role: str) -> Dict[str, Tuple[Option, Optional[str]]]:
    """`{flag: (option, constant that the flag sets, or None if it takes a value)}`"""
    flags: Dict[str, Tuple[Option, Optional[str]]] = {}
    for option in options_of(role):
        for word in option.flags.split():
            flag, _, constant = word.partition("=")
            flags[flag] = (option, constant or ("True" if option.kind == "switch" else None))
    return flags


def read_argv(role: str, argv: List[str]) -> Tuple[Layer, List[str], List[str]]:
    """The words of a command line: what its flags set, its arguments, and what follows `--`. Consumes `argv`."""
    flags, known = flags_of(role), known_names(app_of(role))
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
        if flag not in flags and _not_needed(flag, app_of(role)):
            if not equals and UNNEEDED_FLAGS.get(flag, (True,))[0] and argv:
                argv.pop(0)
            continue
        option, constant, name = _find_flag(flag, flags, known, role)
        if equals and constant is not None and option.kind != "switch":
            raise ConfigError(f"{flag} takes no value.")
        if not equals and constant is None:
            if not argv or argv[0].startswith("--"):
                raise ConfigError(f"{flag} needs {KINDS[option.kind][1]}. See --help")
            value = argv.pop(0)
        layer[name] = Given(convert(option, value if equals or constant is None else constant, flag), flag)
    return layer, args, argv


def _not_needed(flag: str, app: str) -> bool:
    """Is it a flag, or a `--Section.key`, that has no effect? Warns if so."""
    section, _, key = flag.lstrip("-").partition(".")
    reason = UNNEEDED_FLAGS.get(flag, (True, ""))[1]
    if not reason and key and key not in known_names(app).get(section, {}):
        reason = ("it is not needed" if is_unneeded(section, key, app) else
                  "this version does not have what it is for" if is_absent(section, key, app) else "")
    if reason:
        logging.getLogger(__package__).warning("%s has no effect: %s.", flag, reason)
    return bool(reason)


def _find_flag(flag: str, flags: Dict[str, Tuple[Option, Optional[str]]], known: Dict[str, Dict[str, Option]],
               role: str) -> Tuple[Option, Optional[str], str]:
    """(option, constant, name to set) of `--flag` or `--Section.key`."""
    if "." in flag:
        section, _, key = flag.lstrip("-").partition(".")
        if section not in known and is_custom(section, app_of(role)):
            return Option(section, key, "", "any", None, (), ""), None, f"{section}.{key}"
        if section not in known:
            raise ConfigError(f"unknown section in {flag}" + suggest(section, known))
        if key not in known[section]:
            raise ConfigError(f"unknown key in {flag}" + suggest(key, known[section]))
        return known[section][key], None, f"{section}.{key}"
    if flag not in flags and "--" + flag[2:].replace("_", "-") not in flags:
        if role == START and flag in flags_of("controller"):
            raise ConfigError(f"{flag} is a flag of ipcontroller: give it behind --, as in `ipcluster start -- {flag}`.")
        raise ConfigError(f"unknown flag {flag} for {PROGRAMS[role][0]}" + suggest(flag, flags) + " See --help")
    option, constant = flags[flag if flag in flags else flag.replace("_", "-")]
    return option, constant, option.name


def version() -> str:
    """The version of the package."""
    return str(getattr(sys.modules.get(__package__ or ""), "__version__", "unknown"))


def help_text(role: str, everything: bool = False) -> str:
    """What `--help` and `--help-all` print."""
    program, purpose = PROGRAMS[role]
    arguments = f" [{ARGUMENTS[role]}]" if role in ARGUMENTS else ""
    rest = " [-- flags of the controller]" if role == START else ""
    lines = [purpose, "", f"usage: {program} [flags]{arguments}{rest}", ""]
    brief = []
    for option in sorted(options_of(role), key=lambda option: option.section == "Application"):
        value = "" if option.kind == "switch" else f" <{option.kind}>"
        shown = ", ".join(w.partition("=")[0] + ("" if "=" in w else value) for w in option.flags.split())
        if everything:
            shown = (shown + ", " if shown else "") + f"--{option.name}={option.default!r}"
            lines += [f"  {shown}", f"      {option.help}"]
        elif option.section == "Application" and option.key not in ("profile", "cluster_id", "log_level"):
            brief.append(option.flags.partition(" ")[0])
        elif shown:
            lines.append(f"  {shown:<34} {option.help}" if len(shown) < 34 else f"  {shown}\n{'':37}{option.help}")
    lines += ["", "--Section.key is a name of the config files." if everything else
              f"As everywhere: {', '.join(brief)}; --version.\n--help-all explains these and every setting."]
    return "\n".join(lines)


def config_text(app: str) -> str:
    """A config file of `app` ("cluster", "controller" or "engine") with every setting, commented out."""
    lines = [f"# Settings of ip{app}. Remove the # in front of a line to change its value.",
             "# The command line wins over this file.", "", "c = get_config()  # noqa"]
    section = ""
    for option in OPTIONS:
        if app not in map(app_of, option.roles) or option.key in COMMAND_LINE_ONLY or option.key == "parent":
            continue
        home = APPS[app] if option.section == "Application" else option.section
        if home != section:
            section = home
            lines += ["", f"# {'-' * 20} {section}"]
        flags = ", ".join(word.partition("=")[0] for word in option.flags.split())
        lines += ["", f"# {option.help}" + (f" ({flags})" if flags else ""),
                  f"# c.{home}.{option.key} = {option.default!r}"]
    return "\n".join(lines) + "\n"
