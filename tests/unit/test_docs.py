"""Keeps the documents true: their code compiles, their commands exist, their tables are those of the source."""

from __future__ import annotations

import ast
import re
import shlex
from pathlib import Path

import pytest
from unit.test_architecture import MAY_IMPORT, MODULES

from ipclite import config
from ipclite.__main__ import ROLES
from ipclite.errors import ConfigError
from ipclite.ipcluster import COMMANDS
from ipclite.tasks import TRANSITIONS

ROOT = Path(__file__).resolve().parents[2]
README, ARCHITECTURE, CONTRIBUTING = ((ROOT / f"{name}.md").read_text(encoding="utf-8")
                                      for name in ("README", "ARCHITECTURE", "CONTRIBUTING"))
LINES = 290  # ARCHITECTURE.md stays shorter, to be read
UNIVERSAL = {"--help", "--help-all", "--version"}  # of every command, and in no table


def blocks(text: str, language: str) -> list[str]:
    """The fenced code of one language, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def shell_lines(text: str) -> list[list[str]]:
    """The words of every line in the shell blocks."""
    return [shlex.split(line, comments=True) for block in blocks(text, "sh") for line in block.splitlines()]


def inline(text: str) -> list[str]:
    """The code between single backticks, outside of fenced blocks."""
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    return re.findall(r"`([^`\n]+)`", prose)


def state_diagram(transitions) -> str:
    """The states of a task as a mermaid diagram: from where to where."""
    start, *_ = transitions
    lines = ["stateDiagram-v2", f"    [*] --> {start.name}"]
    for state, targets in transitions.items():
        lines += [f"    {state.name} --> {target.name}" for target in transitions if target in targets]
        lines += [] if targets else [f"    {state.name} --> [*]"]
    return "\n".join(lines) + "\n"


def code_map(text: str) -> dict[str, set[str]]:
    """{module: what its row says that it imports} of the table in ARCHITECTURE.md."""
    rows = re.findall(r"^\| `(\w+)\.py` \| (.+?) \| (.*?) ?\|$", text, re.MULTILINE)
    return {name: {word.strip() for word in imports.split(",")} - {"", "-"} for name, _, imports in rows}


def complaint(words: list[str]) -> str:
    """What is wrong with a command line that a document shows, or ""."""
    if words[0] == "make":
        known = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
        wrong = [word for word in words[1:] if "=" not in word and word not in known]
        return f"make has no target {wrong[0]}" if wrong else ""
    role, rest = role_of(words)
    if not role:
        return ""
    if role == "completion" and rest in (["bash"], ["zsh"]):
        return ""
    if role not in config.PROGRAMS:
        return f"there is no command {role}"
    try:
        config.read_argv(role, rest)
    except ConfigError as e:
        return str(e)
    return ""


def role_of(words: list[str]) -> tuple[str, list[str]]:
    """(role, its arguments) of one of our commands, ("", []) of another's."""
    if words[:2] == ["python", "-m"] and words[2].startswith("ipclite."):
        role, rest = words[2].partition(".")[2], words[3:]
    elif words[0] in ("ipcluster", "ipcontroller", "ipengine"):
        role, rest = words[0][2:], words[1:]
    elif words[0] == "ipclite":
        role, rest = words[1], words[2:]
    else:
        return "", []
    return (" ".join([role, *rest[:1]]), rest[1:]) if role in ("cluster", "profile", "db") else (role, rest)


@pytest.mark.parametrize("source", blocks(README, "python"))
def test_the_readmes_python_compiles(source):
    compile(source, "README.md", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)


def test_the_readme_has_python_to_compile():
    assert len(blocks(README, "python")) >= 3


@pytest.mark.parametrize("text", [README, CONTRIBUTING], ids=["README", "CONTRIBUTING"])
def test_commands_exist(text):
    shown = shell_lines(text) + [shlex.split(code) for code in inline(text) if re.match(r"(make|ipc\w+|python) ", code)]
    assert len(shown) > 5
    assert [found for found in map(complaint, shown) if found] == []


@pytest.mark.parametrize("text", [README, ARCHITECTURE, CONTRIBUTING], ids=["README", "ARCHITECTURE", "CONTRIBUTING"])
def test_flags_exist(text):
    flags = {word.partition("=")[0] for option in config.OPTIONS for word in option.flags.split()} | UNIVERSAL
    shown = {flag for code in inline(text) for flag in re.findall(r"(?<!\S)--[a-z][a-z-]*", code)}
    assert shown - flags == set()


@pytest.mark.parametrize("line", [
    "make demos", "ipcluster begin", "python -m ipclite.controler", "python -m ipclite.cluster start -n x",
    "ipengine --color=red",
])
def test_a_command_that_does_not_exist_is_noticed(line):
    assert complaint(shlex.split(line))


def test_the_roles_of_the_documents_are_the_entrances():
    assert {role.split()[0] for role in config.PROGRAMS} | {"completion"} == set(ROLES)
    assert {role.split()[1] for role in config.CLUSTER} == set(COMMANDS)


def test_files_that_the_documents_link_to_exist():
    for text in (README, CONTRIBUTING, (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")):
        targets = [target for target in re.findall(r"\]\(([^)]+)\)", text) if "://" not in target]
        assert [target for target in targets if not (ROOT / target).exists()] == []


def test_the_architecture_is_short():
    assert len(ARCHITECTURE.splitlines()) < LINES


def test_the_state_diagram_is_made_from_the_transition_table():
    assert blocks(ARCHITECTURE, "mermaid") == [state_diagram(TRANSITIONS)]


def test_a_new_transition_changes_the_diagram():
    done = next(state for state, targets in TRANSITIONS.items() if not targets)
    assert state_diagram({**TRANSITIONS, done: frozenset((done,))}) != state_diagram(TRANSITIONS)


def test_every_file_is_in_the_code_map():
    assert sorted(code_map(ARCHITECTURE)) == MODULES


def test_the_code_map_says_what_may_be_imported():
    shown = {name: imports for name, imports in code_map(ARCHITECTURE).items() if name in MAY_IMPORT}
    allowed = {name: {target for target in MAY_IMPORT[name] if target.partition(" ")[0] in MODULES} for name in shown}
    assert shown == allowed


def test_names_in_the_architecture_exist():
    """Modules, functions, methods and constants that it names as code are in the source; `db.py` is to come."""
    source = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "ipclite").glob("*.py"))
    files = {path.stem for path in ROOT.glob("*/*.py")} | {path.stem for path in (ROOT / "tests").rglob("*.py")}
    named = {word for code in inline(ARCHITECTURE) if re.fullmatch(r"\w+(\.\w+)*", code) for word in code.split(".")}
    folders = {path.name for path in (ROOT / "tests").iterdir()}
    names = named - files - folders - {"py", "db"}
    unknown = {name for name in names if not re.search(rf"\b{name}" + r"\b" * (name[-1] != "_"), source)}
    assert len(named) > 50 and unknown == set()
