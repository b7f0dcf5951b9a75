"""Imports that are repeated elsewhere: the statement is read from the instructions of the code that makes it."""

from __future__ import annotations

import builtins

import pytest

from ipclite.functions import SyncImports

STATEMENTS = ["import colorsys", "import xml.dom.minidom", "import xml.sax as sax", "import os.path as p", "import json as j",
              "from collections import OrderedDict as OD, deque", "from os import path"]


def test_imports_in_a_function():
    lines = []
    with SyncImports(lines.append, quiet=True):
        import colorsys; x = colorsys  # noqa: E702
        import xml.dom.minidom
        import xml.sax as sax
        import os.path as p
        import json as j; y = j  # noqa: E702
        from collections import OrderedDict as OD, deque
        from os import path
    assert x and xml and sax and p and y and OD and deque and path
    assert lines == STATEMENTS


def test_imports_at_the_top_level():
    lines = []
    block = "\n ".join(["with imports:", *STATEMENTS, "from string import *"])
    exec(block, {"imports": SyncImports(lines.append, quiet=True)})
    assert lines == [*STATEMENTS, "from string import *"]


def test_imports_of_imported_modules_do_not_count(tmp_path, monkeypatch):
    (tmp_path / "outer_module_x.py").write_text("import bisect, heapq\n")
    monkeypatch.syspath_prepend(tmp_path)
    lines = []
    before = builtins.__import__
    with SyncImports(lines.append, quiet=True):
        import outer_module_x
    assert outer_module_x.bisect and lines == ["import outer_module_x"]
    assert builtins.__import__ is before


def test_a_relative_import_can_not_be_made_elsewhere():
    with pytest.raises(ImportError, match="relative"):
        exec("with imports:\n from . import x", {"imports": SyncImports(print, quiet=True), "__package__": "a"})
