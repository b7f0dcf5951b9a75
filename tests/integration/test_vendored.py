"""A copy of the package inside another one works, engines included, wherever it lies and whatever it is called."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import ipclite as ipp

ORIGINAL = Path(ipp.__file__).parent

SCRIPT = """
import os, sys
from {package} import {name} as ipp

def double(x):
    return 2 * x

def copies():
    import sys
    return [name[:-5] for name in sys.modules if name.endswith(".wire")]

class Custom(Exception):
    pass

def fail():
    raise Custom("c")

with ipp.Cluster(n=2) as rc:
    view = rc.load_balanced_view()
    assert view.map_sync(double, range(5)) == [0, 2, 4, 6, 8]
    assert rc[:].apply_sync(lambda: 7) == [7, 7]
    try:
        view.apply_sync(fail)
    except ipp.RemoteError as e:
        assert isinstance(e, Custom)
    try:
        rc[0].apply_sync(os._exit, 3)
    except ipp.EngineError as e:
        assert "code 3" in str(e)
    print(os.path.dirname(ipp.__file__), *copies(), *rc[1].apply_sync(copies))
"""


def plain_environment():
    """Without the original on the path."""
    return {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}


@pytest.fixture
def without_site(tmp_path):
    """Arguments for a Python that has the dependencies, but no installed copy of this package."""
    import cloudpickle
    import zmq

    folder = tmp_path / "deps"
    folder.mkdir()
    for module in (zmq, cloudpickle):
        source = Path(module.__file__).parent
        (folder / source.name).symlink_to(source)
        for libs in source.parent.glob("pyzmq*"):
            if not (folder / libs.name).exists():
                (folder / libs.name).symlink_to(libs)
    return folder


@pytest.mark.parametrize("package, name", [("someproject._vendor", "ipclite"), ("someproject", "our_parallel")])
def test_a_vendored_copy(tmp_path, ipython_dir, without_site, package, name):
    project = tmp_path / "project"
    copy = project.joinpath(*package.split("."), name)
    shutil.copytree(ORIGINAL, copy, ignore=shutil.ignore_patterns("__pycache__"))
    folder = copy.parent
    while folder != project:
        (folder / "__init__.py").touch()
        folder = folder.parent
    script = project / "script.py"
    script.write_text(SCRIPT.format(package=package, name=name))
    env = {**plain_environment(), "PYTHONPATH": str(without_site), "PYTHONNOUSERSITE": "1"}
    probe = "import importlib.util, zmq, cloudpickle; raise SystemExit(importlib.util.find_spec('ipclite') is not None)"
    assert subprocess.run([sys.executable, "-S", "-c", probe], env=env, cwd=tmp_path).returncode == 0
    done = subprocess.run([sys.executable, "-S", str(script)], env=env, cwd=tmp_path, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{copy} {package}.{name} {package}.{name}\n"  # here and on the engine


def test_a_vendored_client_talks_to_the_original(tmp_path, start):
    """Neither has classes of the other in its messages."""
    rc = start(1)
    shutil.copytree(ORIGINAL, tmp_path / "project" / "_vendor" / "other", ignore=shutil.ignore_patterns("__pycache__"))
    script = tmp_path / "project" / "script.py"
    script.write_text(f"""
from _vendor import other as ipp
import sys

class Mine(ValueError):
    pass

def fail():
    raise Mine("text")

with ipp.Client({str(rc.cluster.connection_file())!r}) as rc:
    view = rc.load_balanced_view()
    assert view.map_sync(lambda x: x + 1, range(3)) == [1, 2, 3]
    rc[:]["x"] = 5
    try:
        view.apply_sync(fail)
    except Mine as e:
        assert isinstance(e, ipp.RemoteError)
    try:
        rc[0]["missing"]
    except ipp.RemoteError as e:
        assert isinstance(e, NameError)
    try:
        view.apply_sync(lambda: __import__("threading").Lock())
    except ipp.PackError as e:
        print("done", "ipclite" in sys.modules)
""")
    done = subprocess.run([sys.executable, str(script)], env=plain_environment(), cwd=tmp_path, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "done False\n"
    assert rc[0]["x"] == 5
