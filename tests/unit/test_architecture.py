"""Keeps the rules of ARCHITECTURE.md by reading the source: who imports whom, and what no file may do.

Each rule is a function from a module's name and syntax tree to the violations it finds. Every rule runs over
the whole package, and over a bad source that it must catch.
"""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "ipclite"

# What a module may import inside the package. "x lazily" is allowed within functions only.
MAY_IMPORT = {
    "errors": set(),
    "error": {"errors"},
    "datapub": {"functions"},
    "wire": {"errors"},
    "byvalue": set(),
    "pack": {"byvalue", "errors", "wire"},
    "options": {"errors"},
    "files": {"errors"},
    "config": {"errors", "options", "files"},
    "allocation": set(),
    "net": {"errors", "wire", "config"},
    "ssh": {"errors"},
    "tunnel": {"errors", "files", "ssh"},
    "db": {"errors", "wire"},
    "records": {"errors", "wire", "db"},
    "dictdb": {"errors", "wire", "db", "records"},
    "chunks": {"errors", "wire", "db"},
    "journal": {"errors", "wire", "db", "records", "chunks"},
    "sqlitedb": {"errors", "files", "chunks", "journal"},
    "mongodb": {"errors", "files", "chunks", "journal"},
    "owndb": {"errors", "wire", "db", "records"},
    "queries": {"errors", "wire", "db", "records", "tasks", "scheduler", "dictdb lazily", "sqlitedb lazily", "mongodb lazily",
                "owndb lazily"},
    "tasks": {"errors", "wire"},
    "queues": {"wire", "tasks"},
    "scheduler": {"wire", "tasks", "queues"},
    "controller": {"errors", "wire", "net", "config", "db", "tasks", "scheduler", "queries", "peers", "restore", "recovery",
                   "logger lazily"},
    "peers": {"db"},
    "recovery": {"errors", "wire", "peers", "restore", "tasks"},
    "restore": {"errors", "wire", "config", "peers"},
    "workspace": {"errors", "pack"},
    "engine": {"errors", "wire", "net", "config", "pack", "workspace", "allocation", "agent lazily", "mpi lazily", "tunnel lazily"},
    "mpi": {"errors"},
    "agent": {"errors", "wire", "net", "config", "pack", "engine", "allocation", "mpi", "tunnel lazily", "logger lazily"},
    "batch": {"errors"},
    "jobs": {"errors", "config", "batch"},
    "outpost": set(),
    "hosts": {"errors", "config", "ssh", "outpost"},
    "launchers": {"errors", "config", "batch", "jobs", "hosts"},
    "cluster": {"errors", "config", "launchers", "allocation", "client lazily"},
    "ipcluster": {"errors", "config", "launchers", "cluster", "client lazily", "logger lazily"},
    "profiles": {"errors", "config"},
    "completion": {"errors", "config"},
    "logger": {"errors", "config", "net"},
    "dbtool": {"errors", "config", "db", "queries lazily", "sqlitedb lazily", "client lazily", "ipcluster lazily"},
    "doctor": {"errors", "wire", "net", "config", "tunnel lazily", "launchers lazily"},
    "display": set(),
    "futures": {"errors", "wire", "pack"},
    "results": {"errors", "wire", "pack", "display", "futures"},
    "functions": {"errors", "wire", "pack"},
    "maps": {"errors", "pack", "futures", "results"},
    "views": {"errors", "pack", "results", "functions", "maps", "executor lazily", "integrations lazily"},
    "executor": {"errors", "results"},
    "integrations": {"errors"},
    "unsaved": {"wire"},
    "connection": {"errors", "wire", "net", "futures", "results", "unsaved"},
    "history": {"errors", "wire", "pack", "display", "futures", "results"},
    "client": {"errors", "wire", "net", "config", "pack", "results", "views", "connection", "history", "tunnel lazily",
               "display", "executor", "integrations lazily"},
    "magics": {"views", "results", "errors"},
}
ENTRANCES = {"__init__", "__main__"}  # these reach every module, by name and when asked
ROLES = {"controller", "engine", "client", "cluster", "ipcluster"}
UNPICKLERS = {"pickle", "_pickle", "cPickle", "cloudpickle", "marshal", "shelve", "dill", "pack"}
SLOW = {"asyncio", "argparse", "multiprocessing", "inspect", "paramiko", "numpy", "IPython", "sqlite3", "pymongo"}

MODULES = sorted(path.stem for path in PACKAGE.glob("*.py"))


def tree(name: str) -> ast.Module:
    """The syntax tree of one of the package's modules."""
    return ast.parse((PACKAGE / f"{name}.py").read_text(), filename=name)


def imports(node: ast.AST, lazy: bool = False) -> list[tuple[int, str, bool, int]]:
    """(level, module, lazy, line) of every import; level 0 is absolute, lazy means within a function."""
    found = []
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            found += [(0, alias.name, lazy, child.lineno) for alias in child.names]
        elif isinstance(child, ast.ImportFrom) and child.level and not child.module:
            found += [(child.level, alias.name, lazy, child.lineno) for alias in child.names]
        elif isinstance(child, ast.ImportFrom):
            found.append((child.level, child.module, lazy, child.lineno))
        else:
            inside = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
            found += imports(child, lazy or inside)
    return found


def attributes_of_package() -> set[str]:
    """Names that `from . import name` finds in `__init__.py` itself."""
    targets = [node.targets for node in tree("__init__").body if isinstance(node, ast.Assign)]
    return {target.id for several in targets for target in several if isinstance(target, ast.Name)}


def unknown_module(name: str, module: ast.Module) -> list[str]:
    """Every file has a row in the table: a new role is a decision."""
    return [] if name in MAY_IMPORT or name in ENTRANCES else [f"{name} is not in the table of modules"]


def forbidden_import(name: str, module: ast.Module) -> list[str]:
    """The table is the truth."""
    if name in ENTRANCES or name not in MAY_IMPORT:
        return []
    found = []
    for level, target, lazy, line in imports(module):
        first = target.partition(".")[0]
        if level and first not in attributes_of_package() and first not in MAY_IMPORT[name] \
                and not (lazy and f"{first} lazily" in MAY_IMPORT[name]):
            found.append(f"{name}:{line} imports {first}")
    return found


def absolute_import(name: str, module: ast.Module) -> list[str]:
    """Relative imports only, and none that leaves the package."""
    return [f"{name}:{line} imports {target} absolutely, or from outside"
            for level, target, _, line in imports(module)
            if level > 1 or (not level and target.partition(".")[0] == PACKAGE.name)]


def docstrings(module: ast.Module) -> set[ast.AST]:
    """The constants that are documentation."""
    homes = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    return {node.body[0].value for node in ast.walk(module)
            if isinstance(node, homes) and ast.get_docstring(node) is not None}


ABSOLUTE_NAME = re.compile(rf"^{PACKAGE.name}\.|\b{PACKAGE.name}\.({'|'.join(MAY_IMPORT)})\b"
                           rf"|(\bimport|\bfrom|-m) {PACKAGE.name}\b")


def absolute_name(name: str, module: ast.Module) -> list[str]:
    """A copy of the package under another name must work, so no string says where it is."""
    exempt = docstrings(module)
    return [f"{name}:{node.lineno} holds {node.value!r}" for node in ast.walk(module)
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in exempt
            and ABSOLUTE_NAME.search(node.value)]


def unpickles(name: str, module: ast.Module) -> list[str]:
    """What the controller consists of never unpickles."""
    if name not in reachable("controller"):
        return []
    return [f"{name}:{line} imports {target}" for _, target, _, line in imports(module)
            if target.partition(".")[0] in UNPICKLERS]


def reachable(name: str) -> set[str]:
    """The module and everything that it may import, directly or not."""
    found = {name}
    for target in MAY_IMPORT[name]:
        if not target.endswith("lazily"):
            found |= reachable(target)
    return found


def imports_zmq(name: str, module: ast.Module) -> list[str]:
    """Sockets are the business of `net.py`."""
    if name == "net":
        return []
    return [f"{name}:{line} imports {target}" for level, target, _, line in imports(module)
            if not level and target.partition(".")[0] == "zmq"]


def slow_import(name: str, module: ast.Module) -> list[str]:
    """What every process of a cluster imports must be quick to import."""
    if name not in reachable("controller") | reachable("engine") | reachable("client"):
        return []
    return [f"{name}:{line} imports {target} at once" for level, target, lazy, line in imports(module)
            if not level and not lazy and target.partition(".")[0] in SLOW]


def swallows(name: str, module: ast.Module) -> list[str]:
    """No bare `except:`, and none that catches everything and says nothing."""
    found = []
    for node in ast.walk(module):
        if isinstance(node, ast.ExceptHandler):
            everything = isinstance(node.type, ast.Name) and node.type.id in ("Exception", "BaseException")
            silent = all(isinstance(statement, (ast.Pass, ast.Continue)) for statement in node.body)
            if node.type is None or (everything and silent):
                found.append(f"{name}:{node.lineno} swallows exceptions")
    return found


def undocumented(name: str, module: ast.Module) -> list[str]:
    """Public functions and methods say what they do, and so does every file."""
    found = [] if ast.get_docstring(module) else [f"{name} has no docstring"]

    def visit(body: list[ast.stmt], prefix: str) -> None:
        for node in body:
            if getattr(node, "name", "_").startswith("_"):
                continue
            if isinstance(node, ast.ClassDef):
                visit(node.body, f"{prefix}{node.name}.")
            elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) \
                    and ast.get_docstring(node) is None and not any(map(is_overload, node.decorator_list)):
                found.append(f"{name}:{node.lineno} {prefix}{node.name} has no docstring")

    visit(module.body, "")
    return found


def is_overload(decorator: ast.expr) -> bool:
    """`@overload` and `@x.setter` go without: the docstring is at the first or last of their kind."""
    return getattr(decorator, "id", getattr(decorator, "attr", "")) in ("overload", "setter")


# Each rule with a module's name and a source for it that the rule must catch.
RULES = {
    unknown_module: ("surprise", "x = 1"),
    forbidden_import: ("scheduler", "from . import net"),
    absolute_import: ("engine", "from ipclite.wire import HELLO"),
    absolute_name: ("launchers", "command = ['-m', 'ipclite.engine']"),
    unpickles: ("db", "def load(x):\n    import pickle"),
    imports_zmq: ("engine", "def f():\n    import zmq.auth"),
    slow_import: ("wire", "import asyncio"),
    swallows: ("client", "try:\n    f()\nexcept Exception:\n    pass"),
    undocumented: ("client", "'''Doc.'''\nclass Client:\n    '''Doc.'''\n    def get(self):\n        return 1"),
}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_package_keeps(rule):
    assert MODULES, "the package is missing"
    found = [text for name in MODULES for text in rule(name, tree(name))]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_a_violation_is_caught_by(rule):
    name, source = RULES[rule]
    assert len(rule(name, ast.parse(source))) == 1


@pytest.mark.parametrize("rule, name, source", [
    (forbidden_import, "wire", "def f():\n    from .pack import pack"),
    (forbidden_import, "cluster", "from .client import Client"),
    (forbidden_import, "launchers", "from .controller import main"),
    (forbidden_import, "errors", "from .wire import HELLO"),
    (forbidden_import, "db", "if TYPE_CHECKING:\n    from .net import Link"),
    (absolute_import, "engine", "import ipclite"),
    (absolute_import, "engine", "from .. import other"),
    (absolute_name, "launchers", "def f(x):\n    return f'ipclite.{x}'"),
    (absolute_name, "cluster", "'''Doc.'''\nhelp = 'start it with python -m ipclite.cluster start'"),
    (absolute_name, "engine", "code = 'import ipclite'"),
    (unpickles, "controller", "from .pack import unpack"),
    (unpickles, "scheduler", "from cloudpickle import loads"),
    (imports_zmq, "controller", "from zmq import Poller"),
    (slow_import, "client", "try:\n    import numpy\nexcept ImportError:\n    numpy = None"),
    (swallows, "errors", "try:\n    f()\nexcept:\n    raise"),
    (undocumented, "wire", "'''Doc.'''\nasync def send(): ..."),
    (undocumented, "wire", "x = 1"),
])
def test_a_rule_catches(rule, name, source):
    assert len(rule(name, ast.parse(source))) == 1


@pytest.mark.parametrize("rule, name, source", [
    (forbidden_import, "cluster", "def connect():\n    from .client import Client"),
    (forbidden_import, "client", "from . import __version__, wire\nfrom .results import AsyncResult"),
    (absolute_name, "launchers", "'''Like ipclite.engine.'''\nx = [f'{__package__}.engine', 'ipclite', 'no ipclite']"),
    (imports_zmq, "net", "import zmq"),
    (slow_import, "controller", "def main():\n    import argparse"),
    (unpickles, "engine", "import pickle"),
    (swallows, "engine", "try:\n    f()\nexcept OSError:\n    pass"),
    (undocumented, "wire", "'''Doc.'''\ndef _f(): ...\nclass A:\n    '''Doc.'''\n    def __init__(self): ..."),
])
def test_a_rule_lets_pass(rule, name, source):
    assert rule(name, ast.parse(source)) == []


def test_the_table_has_no_cycle():
    done: set[str] = set()
    edges = {name: {t.partition(" ")[0] for t in targets} for name, targets in MAY_IMPORT.items()}
    edges["engine"].remove("agent")  # its command line starts an agent; the engine itself knows none
    while len(done) < len(MAY_IMPORT):
        ready = {name for name, targets in edges.items() if targets <= done} - done
        assert ready, f"a cycle among {sorted(set(MAY_IMPORT) - done)}"
        done |= ready


def test_launchers_import_no_role():
    assert not reachable("launchers") & ROLES


def newly_loaded(code: str) -> dict[str, str]:
    """Modules that `code` loads in a fresh interpreter, and their files."""
    script = (f"import json, sys; before = set(sys.modules); {code}\n"
              "new = {n: getattr(m, '__file__', None) or '' for n, m in list(sys.modules.items()) if n not in before}\n"
              "print(json.dumps(new))")
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def third_party(loaded: dict[str, str]) -> list[str]:
    """Those that were installed, rather than coming with Python."""
    return sorted(name for name, file in loaded.items()
                  if {"site-packages", "dist-packages"} & set(Path(file).parts)
                  and name.partition(".")[0] != PACKAGE.name)


def test_importing_the_package_loads_nothing_else():
    loaded = newly_loaded("import ipclite")
    assert [name for name in loaded if name.startswith(PACKAGE.name)] == [PACKAGE.name]
    assert third_party(loaded) == []


def test_third_party_modules_are_noticed():
    assert "pytest" in third_party(newly_loaded("import pytest"))
