"""What batch systems differ in, and nothing else: text in, text out, no processes.

    Job (settings) ──render(dialect)──► job script ──► submit command ──parse_job_id──► "123"
    output of the status command ──Dialect.parse──► {"123": Status("pending", "Priority")}

`DIALECTS` is the table: one row per scheduler, with its commands, the header lines that carry our settings, and what
its words for the state of a job mean. `launchers.py` runs the commands.

Rules that hold here:
- rendering is a function of its arguments: no clock, no environment, no file;
- a template of the user's is left as it is, but for its fields; a setting that a scheduler has no line for is an error;
- fields are arithmetic on known names, evaluated by `Formatter`, never by `eval`.

Schedulers count differently, so we count for them: `memory` and `gpus` are of each node where `engines_per_node` is
given, else of each engine.
"""

from __future__ import annotations

import ast
import json
import operator
import re
import shlex
import string
from typing import Any, Callable, Dict, Iterable, Iterator, List, Mapping, NamedTuple, Optional, Sequence, Tuple

from .errors import ConfigError, LauncherError

HELD = "held: "  # begins the reason of a job that waits until somebody releases it
ENDED = ("done", "failed", "cancelled", "lost")


class Status(NamedTuple):
    """What a scheduler says of a job. `state` is "pending", "running" or one of `ENDED`."""

    state: str
    reason: str = ""
    nodes: str = ""


class Job(NamedTuple):
    """What is to run: the settings that a script is rendered from.

    `nodes` and `engines_per_node` are 0 if the scheduler may place the engines as it likes. `command` is the program
    and its arguments, without the number of engines. `script` is where the script will lie.
    """

    role: str
    command: Sequence[str]
    profile_dir: str
    cluster_id: str
    n: int = 1
    nodes: int = 0
    engines_per_node: int = 0
    name: str = ""
    script: str = ""
    output_file: str = ""
    work_dir: str = ""
    must_enter: bool = False  # is it an error if the work directory is missing on a node?
    environment: Mapping[str, str] = {}
    queue: str = ""
    account: str = ""
    qos: str = ""
    timelimit: str = ""
    memory: str = ""
    gpus: str = ""
    constraint: str = ""
    parallel_environment: str = ""
    options: Sequence[str] = ()
    prologue: str = ""
    namespace: Mapping[str, Any] = {}
    template: str = ""


class Dialect(NamedTuple):
    """One scheduler. `IDS` in a command stands for job ids, `{ids}` for ids with commas, `{id}` for one at a time.

    `lines` are (settings that must be given, or with "!" must not be, and the line, which with "+" goes on with the one
    before); `setting` is the line of an entry
    of `options`; `body` is what the script runs; `last` ends a submit file. `spread` says that one job may reach over
    several nodes; otherwise it is made of `tasks`, each on one node. `why` tells more of a job that has come to the
    state `why_of`.
    """

    name: str
    title: str
    submit: Tuple[str, ...]
    delete: Tuple[str, ...]
    signal: Tuple[str, ...]  # () if there is none
    release: str  # what a person runs to release a held job
    job_id: str
    lines: Tuple[Tuple[str, str], ...]
    setting: str
    status: Tuple[str, ...]
    parse: Callable[[str], Dict[str, Status]]
    ended: Tuple[str, ...]  # the command that remembers jobs which the other one has forgotten
    parse_ended: Callable[[str], Dict[str, Status]]
    body: str
    last: str = ""
    spread: bool = True
    by_stdin: bool = False  # does the submit command read the script from its standard input?
    suffix: str = ""  # of script files
    why: Tuple[str, ...] = ()
    why_of: str = ""
    parse_why: Callable[[str], str] = str
    companion: bool = False  # is there a shell script besides the submit file?
    clock: Tuple[Tuple[int, ...], ...] = ((1,), (60, 1), (3600, 60, 1))  # s that "1", "1:1" and "1:1:1" count as a timelimit


# ---------------------------------------------------------------- templates

_OPERATORS: Dict[type, Callable[..., Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod, ast.USub: operator.neg, ast.UAdd: operator.pos,
    ast.Eq: operator.eq, ast.NotEq: operator.ne, ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}
_FUNCTIONS: Dict[str, Callable[..., Any]] = {"int": int, "max": max, "min": min, "round": round, "str": str}
_FIELD = re.compile(r"(?P<expression>(?:[^:!]|!=)*)(?:!(?P<conversion>[rsa]))?(?::(?P<spec>.*))?", re.DOTALL)


class Formatter(string.Formatter):
    """Renders templates whose fields may be arithmetic: `{n}`, `{n//4}`, `{min(n, 8)}`, `{n:04d}`.

    Doubled braces are literal ones, as everywhere in Python; the shell's `${VAR}` passes through as it is.
    """

    def parse(self, text: str) -> Iterator[Tuple[str, Optional[str], Optional[str], Optional[str]]]:
        """(literal, field, format, conversion) of each piece."""
        literal, at = "", 0
        while at < len(text):
            char, pair = text[at], text[at:at + 2]
            if pair in ("{{", "}}"):
                literal, at = literal + char, at + 2
            elif pair == "${" and text[at + 2:at + 3] != "{":
                end = _closing(text, at + 1)
                literal, at = literal + text[at:end + 1], end + 1
            elif char == "{":
                end = _closing(text, at)
                match = _FIELD.fullmatch(text[at + 1:end])
                if match is None or not match["expression"].strip():
                    raise _fault(text, at, f"{text[at:end + 1]!r} is no field")
                self.where = (text, at)
                yield literal, match["expression"], match["spec"] or "", match["conversion"]
                literal, at = "", end + 1
            elif char == "}":
                raise _fault(text, at, "'}' closes nothing")
            else:
                literal, at = literal + char, at + 1
        if literal:
            yield literal, None, None, None

    def get_field(self, field_name: str, args: Any, kwargs: Any) -> Tuple[Any, str]:
        """The value of a field."""
        text, at = self.where
        try:
            value = _evaluate(ast.parse(field_name.strip(), mode="eval").body, kwargs)
        except KeyError as e:
            raise _fault(text, at, f"there is no field {e.args[0]!r}; there are {', '.join(sorted(kwargs))}") from None
        except (SyntaxError, ValueError):
            raise _fault(text, at, f"{'{' + field_name + '}'} is no arithmetic on fields") from None
        except (ArithmeticError, TypeError) as e:
            raise _fault(text, at, f"{'{' + field_name + '}'} can't be computed ({e})") from None
        return value, field_name


def _closing(text: str, start: int) -> int:
    """Where the brace that opens at `start` is closed."""
    depth = 0
    for at in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[at], 0)
        if depth == 0:
            return at
    raise _fault(text, start, "'{' is never closed")


def _fault(text: str, at: int, trouble: str) -> ConfigError:
    return ConfigError(f"The batch template, line {text.count(chr(10), 0, at) + 1}: {trouble}. Braces that are no field "
                       "of ours need to be doubled: {{ }}.")


def _evaluate(node: ast.AST, names: Mapping[str, Any]) -> Any:
    """The value of an expression of names, constants, arithmetic, comparisons and a few functions."""
    if isinstance(node, ast.Constant) and isinstance(node.value, (int, float, str)):
        return node.value
    if isinstance(node, ast.Name):
        return names[node.id]
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        return _OPERATORS[type(node.op)](_evaluate(node.left, names), _evaluate(node.right, names))
    if isinstance(node, ast.UnaryOp) and type(node.op) in _OPERATORS:
        return _OPERATORS[type(node.op)](_evaluate(node.operand, names))
    if isinstance(node, ast.Compare) and len(node.ops) == 1 and type(node.ops[0]) in _OPERATORS:
        return _OPERATORS[type(node.ops[0])](_evaluate(node.left, names), _evaluate(node.comparators[0], names))
    if isinstance(node, ast.IfExp):
        return _evaluate(node.body if _evaluate(node.test, names) else node.orelse, names)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not node.keywords:
        if node.func.id not in _FUNCTIONS:
            raise KeyError(node.func.id)
        return _FUNCTIONS[node.func.id](*(_evaluate(arg, names) for arg in node.args))
    raise ValueError("not allowed")


# ---------------------------------------------------------------- rendering


def plan(n: int, engines_per_job: int = 0, engines_per_node: int = 0) -> List[Tuple[int, int, int]]:
    """How `n` engines are split: (engines, nodes, engines per node) of each job, the latter two 0 if they are free.

    All nodes of a job have as many engines; what is left over is a job of its own.
    """
    jobs: List[Tuple[int, int, int]] = []
    while n > 0:
        size = min(n, engines_per_job or n)
        n -= size
        if not engines_per_node:
            jobs.append((size, 0, 0))
            continue
        nodes, rest = divmod(size, engines_per_node)
        jobs += [(nodes * engines_per_node, nodes, engines_per_node)] * bool(nodes) + [(rest, 1, rest)] * bool(rest)
    return jobs


_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}


def share_of(size: str, parts: int) -> str:
    """A size of memory, as in "16G", divided by `parts`, in whole megabytes: "4096M". Text of another form stays."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([kmgt]?)i?b?", size.strip().lower())
    if match is None or parts <= 1 or not match[2]:
        return size
    return f"{max(1, int(float(match[1]) * _UNITS[match[2]] / parts) >> 20)}M"


def fields_of(dialect: Dialect, job: Job) -> Dict[str, Any]:
    """What templates may name."""
    program, *args = job.command
    counted = [] if job.role == "controller" else ["-n", str(job.n)]
    per_task = job.engines_per_node or (job.n if dialect.spread else 1)
    return {
        "n": job.n, "nodes": job.nodes or 1, "engines_per_node": job.engines_per_node, "tasks": job.n // per_task,
        "engines_per_task": per_task, "is_shared": per_task > 1, "is_controller": job.role == "controller",
        "queue": job.queue, "account": job.account, "qos": job.qos, "timelimit": job.timelimit,
        "timelimit_s": seconds_of(dialect, job.timelimit) or job.timelimit, "memory": job.memory, "gpus": job.gpus,
        "constraint": job.constraint,
        "memory_per_engine": share_of(job.memory, job.engines_per_node),
        "parallel_environment": job.parallel_environment, "options": "\n".join(job.options), "prologue": job.prologue,
        "profile_dir": job.profile_dir, "cluster_id": job.cluster_id, "job_name": job.name, "script": job.script,
        "output_file": job.output_file, "work_dir": job.work_dir, "program": shlex.quote(program),
        "program_args": shlex.join([*args, *counted]), "program_and_args": shlex.join([program, *args, *counted]),
        "environment_json": json.dumps(dict(job.environment)), **job.namespace,
    }


def render(dialect: Dialect, job: Job) -> str:
    """The text of the job: the user's template with its fields filled in, or ours.

    Raises:
        ConfigError: the template has a fault, or the scheduler has no place for one of the settings.
    """
    fields = fields_of(dialect, job)
    if job.template:
        return Formatter().vformat(job.template, (), fields)
    text = _header(dialect, fields, job)
    if not dialect.companion:
        text += "\n" + _body(dialect, job, fields)
    return text + (Formatter().vformat(dialect.last, (), fields) + "\n" if dialect.last else "")


def companion(dialect: Dialect, job: Job) -> str:
    """The shell script that a submit file names, or "" if there is none."""
    if not dialect.companion or job.template:
        return ""
    return "#!/bin/bash\n" + _body(dialect, job, fields_of(dialect, job))


def _header(dialect: Dialect, fields: Dict[str, Any], job: Job) -> str:
    quoted = {**fields, "output_file": shlex.quote(job.output_file), "script": shlex.quote(job.script)}
    lines, told = [] if dialect.companion else ["#!/bin/bash"], set()
    for needed, line in dialect.lines:
        words = needed.split()
        told.update(words)
        if all(bool(fields[word.lstrip("!")]) != word.startswith("!") for word in words):
            text = Formatter().vformat(line.lstrip("+"), (), fields if dialect.companion else quoted)
            if line.startswith("+"):
                lines[-1] += text
            else:
                lines.append(text)
    for key in ("queue", "account", "qos", "timelimit", "memory", "gpus", "constraint"):
        if fields[key] and key not in told:
            raise ConfigError(f"{dialect.title} has nothing like {key!r} = {fields[key]!r}; remove it, or say what you "
                              "mean in `options` or with a template of your own.")
    return "\n".join(lines + [dialect.setting.format(option) for option in job.options]) + "\n"


def seconds_of(dialect: Dialect, timelimit: str) -> int:
    """A time limit, as the scheduler reads it, in s; 0 if it is of another form."""
    days, dash, rest = timelimit.strip().rpartition("-")
    parts = rest.split(":")
    clock = ((3600,), (3600, 60), (3600, 60, 1)) if dash else dialect.clock
    if not all(part.isdigit() for part in [*parts, days or "0"]) or len(parts) > len(clock):
        return 0
    return 86400 * int(days or 0) + sum(int(part) * unit for part, unit in zip(parts, clock[len(parts) - 1]))


def _body(dialect: Dialect, job: Job, fields: Dict[str, Any]) -> str:
    lines = [f"export {name}={shlex.quote(value)}" for name, value in job.environment.items()]
    limit_s = seconds_of(dialect, job.timelimit)
    if limit_s and job.role != "controller":  # so that the engines leave in time
        lines.append(f"export IPP_JOB_END_TIME=$(($(date +%s) + {limit_s}))")
    if job.work_dir:
        folder = shlex.quote(job.work_dir)
        trouble = f"echo {shlex.quote(f'The work directory {job.work_dir} is missing on this node:')} \"$(hostname)\" >&2"
        lines.append(f"cd {folder} || {{ {trouble}; exit 1; }}" if job.must_enter else f"cd {folder} 2>/dev/null")
    if job.prologue:
        lines.append(job.prologue)
    command = shlex.join(job.command)
    if job.role == "controller":
        lines.append(f"exec {command}")
    else:
        here = job.n if dialect.spread else fields["engines_per_task"]  # those of several nodes may be one host, too
        lines.append(dialect.body.replace("@COMMAND@", command).replace("@N@", str(here))
                     .replace("@SCRIPT@", shlex.quote(job.script)))
    return "\n".join(lines) + "\n"


def parse_job_id(dialect: Dialect, text: str, regexp: str = "", group: int = 0) -> str:
    """The id in what the submit command printed.

    Raises:
        LauncherError: there is none; shows the output.
    """
    match = re.search(regexp or dialect.job_id, text, re.MULTILINE)
    found = match and match.group(group if regexp else match.re.groups and 1)
    if not found:
        raise LauncherError(f"The output of {dialect.submit[0]} has no job id, so that the job can't be watched or "
                            f"cancelled; set job_id_regexp if it looks different here. It was: {text.strip() or 'empty'}")
    return found


def check_regexp(regexp: str, group: int) -> None:
    """Raise ConfigError if `parse_job_id` can't use a regular expression of the user's."""
    try:
        if group > re.compile(regexp).groups:
            raise re.error(f"it has no group {group}")
    except re.error as e:
        raise ConfigError(f"job_id_regexp {regexp!r} can't be used: {e}.") from None


def commands(template: Sequence[str], ids: Iterable[str]) -> List[List[str]]:
    """The command lines for some jobs: one for all, or one for each where the command takes no more."""
    several = list(ids)
    if any("{id}" in word for word in template):
        return [[word.replace("{id}", one) for word in template] for one in several]
    line: List[str] = []
    for word in template:
        line += several if word == "IDS" else [word.replace("{ids}", ",".join(several))]
    return [line]


# ---------------------------------------------------------------- what schedulers say


def explained(status: Status, why: str) -> Status:
    """The status with what the scheduler said of it when it was asked."""
    if not why or status.reason in ("NonZeroExitCode", ""):
        return status._replace(reason=why or status.reason)
    return status._replace(reason=f"{status.reason}: {why}")


def combined(parts: Iterable[Status]) -> Status:
    """The status of a job of several tasks: pending until one runs, running until the last has ended, failed if one
    has."""
    found = list(parts)
    for state in ("running", "pending", "failed", "lost", "cancelled", "done"):
        of_it = [part for part in found if part.state == state]
        if of_it:
            nodes = ",".join(dict.fromkeys(part.nodes for part in found if part.nodes))
            return Status(state, next((part.reason for part in of_it if part.reason), ""), nodes)
    return Status("lost")


def _gather(pairs: Iterable[Tuple[str, Status]]) -> Dict[str, Status]:
    tasks: Dict[str, List[Status]] = {}
    for job_id, status in pairs:
        tasks.setdefault(job_id, []).append(status)
    return {job_id: combined(several) for job_id, several in tasks.items()}


_SLURM_STATES = {
    **dict.fromkeys(("PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "RESV_DEL_HOLD",
                     "SPECIAL_EXIT"), "pending"),
    **dict.fromkeys(("RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "SIGNALING", "RESIZING", "STAGE_OUT"), "running"),
    "COMPLETED": "done", "CANCELLED": "cancelled",
    **dict.fromkeys(("FAILED", "TIMEOUT", "OUT_OF_MEMORY", "NODE_FAIL", "BOOT_FAIL", "DEADLINE", "PREEMPTED",
                     "REVOKED"), "failed"),
}
_SLURM_WORDS = {"TIMEOUT": "it reached its time limit", "OUT_OF_MEMORY": "it ran out of memory",
                "NODE_FAIL": "a node failed", "PREEMPTED": "it was preempted", "DEADLINE": "it reached its deadline",
                "BOOT_FAIL": "a node did not boot"}


def _slurm_status(word: str, reason: str, nodes: str) -> Status:
    name = word.split()[0] if word else ""
    state = _SLURM_STATES.get(name, "running")
    reason = "" if reason in ("None", "(null)") else reason
    if state == "pending":
        if "held" in reason.lower() or name in ("REQUEUE_HOLD", "SPECIAL_EXIT"):
            reason = HELD + (reason or name)
    elif name in _SLURM_WORDS:
        reason = _SLURM_WORDS[name] + (f" ({reason})" if reason else "")
    elif name == "SUSPENDED":
        reason = "suspended"
    elif state == "running":
        reason = ""
    return Status(state, reason, nodes)


def parse_squeue(text: str) -> Dict[str, Status]:
    """Lines of `squeue --format=%A|%T|%D|%N|%r`."""
    rows = (line.split("|", 4) for line in text.splitlines() if line.count("|") >= 4)
    return _gather((job_id.strip(), _slurm_status(word, reason.strip(), nodes)) for job_id, word, _, nodes, reason in rows)


def parse_scontrol(text: str) -> str:
    """What `scontrol show job` says of how a job ended."""
    match = re.search(r"\bExitCode=(\d+):(\d+)", text)
    if match is None or match.group(0).endswith("=0:0"):
        return ""
    return f"exit code {match[1]}" if match[2] == "0" else f"killed by signal {match[2]}"


def parse_sacct(text: str) -> Dict[str, Status]:
    """Lines of `sacct --format=JobIDRaw,State,ExitCode,NodeList`."""
    rows = (line.split("|") for line in text.splitlines() if line.count("|") == 3)
    return _gather((job_id, _slurm_status(word, f"exit code {code.partition(':')[0]}" if word == "FAILED" else "", nodes))
                   for job_id, word, code, nodes in rows)


def _blocks(text: str, title: str) -> Iterator[Tuple[str, Dict[str, str]]]:
    """(id, attributes) of each job in the long form of `qstat -f`, whose lines may be folded."""
    unfolded = re.sub(r"\n\t(?![\w.]+ = )", "", text)  # Torque's commands over Slurm begin attributes with a tab
    for block in re.split(rf"^{title}\s*", unfolded, flags=re.MULTILINE)[1:]:
        head, *lines = block.splitlines()
        pairs = (line.partition("=") for line in lines if "=" in line)
        yield head.strip(), {key.strip(): value.strip() for key, _, value in pairs}


_PBS_STATES = {"Q": "pending", "W": "pending", "H": "pending", "T": "pending", "M": "pending", "R": "running",
               "B": "running", "E": "running", "S": "running", "U": "running", "C": "done", "F": "done", "X": "done"}
_PBS_EXITS = {-29: "it reached its time limit", -11: "it ran out of time or memory", 271: ""}


def parse_pbs(text: str) -> Dict[str, Status]:
    """`qstat -f` of PBS Pro and Torque; also with `-x`, which is XML in Torque."""
    if "<Job_Id>" in text:
        text = re.sub(r"<Job_Id>([^<]*)</Job_Id>", r"\nJob Id: \1\n", text)
        text = re.sub(r"<(\w+)>([^<]*)</\1>", r"    \1 = \2\n", text)
    found = {}
    for job_id, job in _blocks(text, "Job Id:"):
        state, reason = _PBS_STATES.get(job.get("job_state", "")[:1], "running"), job.get("comment", "")
        if job.get("job_state") == "H":
            reason = HELD + (reason or "released by `qrls`")
        code = job.get("exit_status") or job.get("Exit_status")
        if state == "done":
            state, reason = _pbs_end(code, reason)
        elif state == "running":
            reason = ""
        nodes = ",".join(dict.fromkeys(part.partition("/")[0] for part in job.get("exec_host", "").split("+") if part))
        found[job_id] = Status(state, reason, nodes)
    return found


def _pbs_end(code: Optional[str], comment: str) -> Tuple[str, str]:
    """(state, reason) of a job that has ended."""
    if code is None or not code.lstrip("-").isdigit():
        ended = comment.lower()
        return ("cancelled", comment) if "delet" in ended or "terminated" in ended else ("done", comment)
    number = int(code)
    if number in (0,):
        return "done", ""
    if number in _PBS_EXITS:
        return ("failed", _PBS_EXITS[number]) if _PBS_EXITS[number] else ("cancelled", "deleted")
    if number > 256:
        return "cancelled" if number - 256 == 15 else "failed", f"killed by signal {number - 256}"
    return "failed", f"exit code {number}" + (f" ({comment})" if comment and number < 0 else "")


def parse_sge(text: str) -> Dict[str, Status]:
    """`qstat -xml -g d`: one `<job_list>` for each task."""
    def one(block: str) -> Tuple[str, Status]:
        values = dict(re.findall(r"<(\w+)[^>]*>([^<]*)</\1>", block))
        word, host = values.get("state", ""), values.get("queue_name", "").partition("@")[2]
        if "E" in word:
            return values["JB_job_number"], Status("pending", HELD + f"error state {word}", host)
        if "h" in word:
            return values["JB_job_number"], Status("pending", HELD + f"state {word}", host)
        if "q" in word:
            return values["JB_job_number"], Status("pending", "", host)
        return values["JB_job_number"], Status("running", "suspended" if set(word) & set("sST") else "", host)

    blocks = re.findall(r"<job_list\b.*?</job_list>", text, re.DOTALL)
    return _gather(one(block) for block in blocks if "JB_job_number" in block)


def parse_qstat_j(text: str) -> str:
    """What `qstat -j` says of why a job does not run."""
    errors = re.findall(r"^error reason\s+\d+:\s*(?:\d\S* \d\S* \[[^]]*\]:\s*)?(.*)$", text, re.MULTILINE)
    info = re.search(r"^scheduling info:\s*(.*(?:\n {10,}.*)*)", text, re.MULTILINE)
    found = errors or ([" ".join(line.split()) for line in info[1].splitlines()] if info else [])
    return "; ".join(dict.fromkeys(line for line in found if line and "turned off" not in line))


def parse_qacct(text: str) -> Dict[str, Status]:
    """`qacct -j`: a block of "key value" lines for each task."""
    def one(block: str) -> Tuple[str, Status]:
        values = {line.split(None, 1)[0]: (line.split(None, 1) + [""])[1].strip() for line in block.splitlines() if line.split()}
        failed, code = values.get("failed", "0"), values.get("exit_status", "0").split()[0]
        nodes = values.get("hostname", "")
        if values.get("deleted_by", "NONE") not in ("NONE", ""):
            return values["jobnumber"], Status("cancelled", f"deleted by {values['deleted_by']}", nodes)
        if failed.split()[0] != "0":
            number, _, why = failed.partition(" ")
            cancelled = number == "100" and code in ("137", "143")
            return values["jobnumber"], Status("cancelled" if cancelled else "failed", why.strip(" :") or failed, nodes)
        return values["jobnumber"], Status("done", "", nodes) if code == "0" else Status("failed", f"exit code {code}", nodes)

    return _gather(one(block) for block in re.split(r"^=+$", text, flags=re.MULTILINE) if "jobnumber" in block)


_LSF_STATES = {"PEND": "pending", "WAIT": "pending", "PSUSP": "pending", "PROV": "pending", "RUN": "running",
               "SSUSP": "running", "USUSP": "running", "UNKWN": "running", "DONE": "done", "EXIT": "failed",
               "ZOMBI": "lost"}


def parse_bjobs(text: str) -> Dict[str, Status]:
    """Lines of `bjobs -o "jobid stat exit_code exec_host exit_reason pend_reason delimiter='|'"`."""
    def one(line: str) -> Tuple[str, Status]:
        job_id, word, code, hosts, ended, pending = (part.strip() for part in line.split("|", 5))
        state = _LSF_STATES.get(word, "running")
        reason = {"pending": pending, "failed": ended}.get(state, "").strip("- ")
        if word == "PSUSP":
            reason = HELD + (reason or "PSUSP")
        elif word in ("SSUSP", "USUSP"):
            reason = "suspended"
        elif word == "UNKWN":
            reason = "its host does not answer"
        if state == "failed" and re.search("TERM_(OWNER|ADMIN|FORCE_OWNER)", reason):
            state = "cancelled"
        elif state == "failed" and not reason:
            reason = f"exit code {code.strip('- ') or 'unknown'}"
        hosts = ",".join(dict.fromkeys(host.partition("*")[2] or host for host in hosts.strip("-").split(":") if host))
        return job_id, Status(state, reason, hosts)

    return _gather(one(line) for line in text.splitlines() if line.count("|") >= 5)


_CONDOR_STATES = {"1": "pending", "2": "running", "3": "cancelled", "4": "done", "5": "pending", "6": "running",
                  "7": "running"}


def parse_condor(text: str) -> Dict[str, Status]:
    """Lines of `-af:t ClusterId JobStatus ExitCode ExitBySignal ExitSignal RemoteHost HoldReason RemoveReason`."""
    def one(line: str) -> Tuple[str, Status]:
        values = ["" if value in ("undefined", "error") else value for value in line.split("\t")]
        job_id, word, code, by_signal, signum, host, held, removed = (value.strip() for value in (values + [""] * 8)[:8])
        state, reason = _CONDOR_STATES.get(word, "running"), ""
        if word == "5":
            reason = HELD + (held or "HoldReason is not given")
        elif word == "3":
            reason = removed
        elif word == "7":
            reason = "suspended"
        elif word == "4" and by_signal == "true":
            state, reason = "failed", f"killed by signal {signum}"
        elif word == "4" and code not in ("", "0"):
            state, reason = "failed", f"exit code {code}"
        return job_id, Status(state, reason, host.rpartition("@")[2])

    return _gather(one(line) for line in text.splitlines() if "\t" in line)


def _nothing(text: str) -> Dict[str, Status]:
    return {}


# ---------------------------------------------------------------- the table

# Signals that a batch system delivers reach all processes of a job; an interrupt is for the engines, not their agent.
_PLAIN = "trap '' INT\nexec @COMMAND@ -n @N@"

# One agent per node: as many engines there as the scheduler gave it tasks, which it writes like "4(x2),2".
_SRUN = """\
export IPP_ENGINES="$(echo "$SLURM_TASKS_PER_NODE" | awk -v RS='[,\\n]' -F'[(x)]+' \
'{for (i = 0; i < ($2 ? $2 : 1); i++) print $1}')"
unset SLURM_MEM_PER_CPU SLURM_MEM_PER_NODE
exec srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --mem=0 --cpu-bind=none \\
    --kill-on-bad-exit=0 /bin/bash -c 'trap "" INT; engines=($IPP_ENGINES); exec "$@" -n "${engines[SLURM_NODEID]}"' \\
    ipengine @COMMAND@"""

# On several nodes the first starts this script once on each, with the number of engines there.
_PBSDSH = """\
trap '' INT
if [ $# = 0 ] && [ -s "$PBS_NODEFILE" ] && [ "$(sort -u "$PBS_NODEFILE" | wc -l)" -gt 1 ]; then
    awk '!n[$0]++ {at[$0] = NR - 1} END {for (host in n) print at[host], n[host]}' "$PBS_NODEFILE" | {
        while read -r index engines; do
            pbsdsh -n "$index" -- /bin/bash @SCRIPT@ "$engines" </dev/null &
        done
        wait
    }
    exit
fi
exec @COMMAND@ -n "${1:-@N@}\""""

_BLAUNCH = """\
trap '' INT
read -r -a hosts <<<"$LSB_MCPU_HOSTS"
if [ $# = 0 ] && [ ${#hosts[@]} -gt 2 ]; then
    for ((i = 0; i < ${#hosts[@]}; i += 2)); do
        blaunch "${hosts[i]}" /bin/bash @SCRIPT@ "${hosts[i + 1]}" </dev/null &
    done
    wait
    exit
fi
exec @COMMAND@ -n "${1:-@N@}\""""

_CONDOR_FIELDS = ("-af:t", "ClusterId", "JobStatus", "ExitCode", "ExitBySignal", "ExitSignal", "RemoteHost", "HoldReason",
                  "RemoveReason")
_PBS_COMMON = (
    ("", "#PBS -S /bin/bash"),
    ("", "#PBS -V"),
    ("", "#PBS -N {job_name}"),
    ("output_file", "#PBS -j oe"),
    ("output_file", "#PBS -o {output_file}"),
    ("queue", "#PBS -q {queue}"),
    ("account", "#PBS -A {account}"),
    ("timelimit", "#PBS -l walltime={timelimit}"),
)
_PBS: Dict[str, Any] = {
    "submit": ("qsub",), "delete": ("qdel", "IDS"), "signal": ("qsig", "-s", "{signal}", "IDS"), "release": "qrls {id}",
    "job_id": r"\d+(?:\[\])?(?:\.[\w.-]+)?", "setting": "#PBS {}", "status": ("qstat", "-f", "IDS"), "parse": parse_pbs,
    "ended": ("qstat", "-x", "-f", "IDS"), "parse_ended": parse_pbs, "body": _PBSDSH}


def _row(name: str, title: str, lines: Tuple[Tuple[str, str], ...], **values: Any) -> Dialect:
    return Dialect(name=name, title=title, lines=lines, **values)


DIALECTS: Dict[str, Dialect] = {row.name: row for row in (
    _row("slurm", "Slurm", (
        ("", "#SBATCH --job-name={job_name}"),
        ("", "#SBATCH --export=ALL"),
        ("output_file", "#SBATCH --output={output_file}"),
        ("!engines_per_node", "#SBATCH --ntasks={n}"),
        ("engines_per_node", "#SBATCH --nodes={nodes}"),
        ("engines_per_node", "#SBATCH --ntasks-per-node={engines_per_node}"),
        ("queue", "#SBATCH --partition={queue}"),
        ("account", "#SBATCH --account={account}"),
        ("qos", "#SBATCH --qos={qos}"),
        ("timelimit", "#SBATCH --time={timelimit}"),
        ("memory engines_per_node", "#SBATCH --mem={memory}"),
        ("memory !engines_per_node", "#SBATCH --mem-per-cpu={memory}"),
        ("gpus engines_per_node", "#SBATCH --gres=gpu:{gpus}"),
        ("gpus !engines_per_node", "#SBATCH --gpus-per-task={gpus}"),
        ("constraint", "#SBATCH --constraint={constraint}")),
        submit=("sbatch",), delete=("scancel", "IDS"), signal=("scancel", "--signal={signal}", "IDS"),
        release="scontrol release {id}", job_id=r"(?:^|Submitted batch job )(\d+)", setting="#SBATCH {}",
        status=("squeue", "--noheader", "--states=all", "--format=%A|%T|%D|%N|%r", "--jobs={ids}"), parse=parse_squeue,
        ended=("sacct", "--noheader", "--parsable2", "--allocations", "--format=JobIDRaw,State,ExitCode,NodeList",
               "--jobs={ids}"), parse_ended=parse_sacct, why=("scontrol", "--oneliner", "show", "job", "{id}"), why_of="failed",
        parse_why=parse_scontrol, body=_SRUN, suffix=".sbatch",
        clock=((60,), (60, 1), (3600, 60, 1))),
    _row("pbs", "PBS Pro", _PBS_COMMON + (
        ("!engines_per_node", "#PBS -l select={n}:ncpus=1:mpiprocs=1"),
        ("engines_per_node", "#PBS -l select={nodes}:ncpus={engines_per_node}:mpiprocs={engines_per_node}"),
        ("memory", "+:mem={memory}"),
        ("gpus", "+:ngpus={gpus}"),
        ("constraint", "+:{constraint}")), **_PBS),
    _row("torque", "Torque", _PBS_COMMON + (
        ("!engines_per_node", "#PBS -l nodes=1:ppn={n}"),
        ("engines_per_node", "#PBS -l nodes={nodes}:ppn={engines_per_node}"),
        ("gpus", "+:gpus={gpus}"),
        ("constraint", "+:{constraint}"),
        ("memory", "#PBS -l pmem={memory_per_engine}"),
        ("qos", "#PBS -l qos={qos}")), **_PBS),
    _row("sge", "Grid Engine", (
        ("", "#$ -S /bin/bash"),
        ("", "#$ -V"),
        ("", "#$ -N {job_name}"),
        ("output_file", "#$ -j y"),
        ("output_file", "#$ -o {output_file}"),
        ("!is_controller", "#$ -t 1-{tasks}"),
        ("is_shared", "#$ -pe {parallel_environment} {engines_per_task}"),
        ("queue", "#$ -q {queue}"),
        ("account", "#$ -P {account}"),
        ("timelimit", "#$ -l h_rt={timelimit}"),
        ("memory", "#$ -l h_vmem={memory_per_engine}"),
        ("gpus", "#$ -l gpu={gpus}"),
        ("constraint", "#$ -l {constraint}")),
        submit=("qsub",), delete=("qdel", "IDS"), signal=(), release="qrls {id} or qmod -cj {id}",
        job_id=r"Your job(?:-array)? (\d+)", setting="#$ {}", status=("qstat", "-xml", "-g", "d"), parse=parse_sge,
        ended=("qacct", "-j", "{id}"), parse_ended=parse_qacct, why=("qstat", "-j", "{id}"), why_of="pending",
        parse_why=parse_qstat_j, body=_PLAIN, spread=False),
    _row("lsf", "LSF", (
        ("", "#BSUB -J {job_name}"),
        ("", "#BSUB -n {n}"),
        ("engines_per_node", '#BSUB -R "span[ptile={engines_per_node}]"'),
        ("output_file", "#BSUB -o {output_file}"),
        ("queue", "#BSUB -q {queue}"),
        ("account", "#BSUB -P {account}"),
        ("timelimit", "#BSUB -W {timelimit}"),
        ("memory", '#BSUB -R "rusage[mem={memory}]"'),
        ("gpus", '#BSUB -gpu "num={gpus}"'),
        ("constraint", '#BSUB -R "select[{constraint}]"')),
        submit=("bsub",), delete=("bkill", "IDS"), signal=("bkill", "-s", "{signal}", "IDS"), release="bresume {id}",
        job_id=r"Job <(\d+)>", setting="#BSUB {}", by_stdin=True, body=_BLAUNCH, parse=parse_bjobs,
        status=("bjobs", "-a", "-noheader", "-o",
                "jobid stat exit_code exec_host exit_reason pend_reason delimiter='|'", "IDS"),
        ended=(), parse_ended=_nothing, clock=((60,), (3600, 60))),
    _row("htcondor", "HTCondor", (
        ("", "universe = vanilla"),
        ("", "executable = {script}.sh"),
        ("", "getenv = True"),
        ("", "batch_name = {job_name}"),
        ("", "notification = never"),
        ("output_file", "output = {output_file}.$(Process)"),
        ("output_file", "error = {output_file}.$(Process)"),
        ("output_file", "stream_output = True"),
        ("output_file", "stream_error = True"),
        ("", "should_transfer_files = IF_NEEDED"),
        ("", "request_cpus = {engines_per_task}"),
        ("account", "accounting_group = {account}"),
        ("timelimit", "allowed_job_duration = {timelimit_s}"),
        ("memory", "request_memory = {memory}"),
        ("gpus", "request_gpus = {gpus}"),
        ("constraint", "requirements = {constraint}")),
        submit=("condor_submit",), delete=("condor_rm", "IDS"), signal=(), release="condor_release {id}",
        job_id=r"submitted to cluster (\d+)", setting="{}", status=("condor_q", "IDS", *_CONDOR_FIELDS),
        parse=parse_condor, ended=("condor_history", "IDS", *_CONDOR_FIELDS), parse_ended=parse_condor, body=_PLAIN,
        last="queue {tasks}", spread=False, suffix=".submit", companion=True),
    _row("batch", "the batch system", (), submit=(), delete=(), signal=(), release="", job_id=r"\d+", setting="",
         status=(), parse=_nothing, ended=(), parse_ended=_nothing, body=_PLAIN),
)}
