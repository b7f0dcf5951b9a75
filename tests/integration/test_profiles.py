"""Profiles from the shell: made, listed, found, filled with config files, completed by the shell."""

from __future__ import annotations

import os
import pty
import select
import shutil
import subprocess
import sys
import time

import pytest
from shell import ROOT, Command, connection, controller, one_sentence, run
from support import need

import ipclite as ipp
from ipclite import config

CONFIG_FILES = ["ipcluster_config.py", "ipcontroller_config.py", "ipengine_config.py"]


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("words", [
    ("profile", "create", "--parallel", "--profile=mine"), ("profile", "create", "mine"),
    ("profile", "create", "--profile", "mine"), ("profile", "create", "profile=mine"),
])
def test_create(ipython_dir, words):
    made = run(*words)
    assert made.process.returncode == 0, made.err
    folder = ipython_dir / "profile_mine"
    assert names(folder) == [*CONFIG_FILES, "log", "pid", "security"]
    assert str(folder) in made.out
    assert oct((folder / "security").stat().st_mode & 0o777) == "0o700"
    assert run("profile", "locate", "mine").out == f"{folder}\n"
    assert run("profile", "list").out == "mine\n"


def test_as_a_module_and_elsewhere(ipython_dir, tmp_path):
    made = run(code=["-m", "ipclite.config", "create", f"--ipython-dir={tmp_path}", "--profile=x"])
    assert made.process.returncode == 0, made.err
    assert names(tmp_path / "profile_x")[:3] == CONFIG_FILES
    assert run("profile", "list", f"--ipython-dir={tmp_path}").out == "x\n"
    assert list(ipython_dir.iterdir()) == []
    run("profile", "create", f"--profile-dir={tmp_path / 'any'}", "--parallel=False")
    assert names(tmp_path / "any") == ["log", "pid", "security"]


def test_existing_config_files_stay(ipython_dir):
    run("profile", "create")
    path = ipython_dir / "profile_default" / "ipengine_config.py"
    path.write_text("c.IPEngine.n = 3\n")
    assert "ipengine" not in run("profile", "create").out
    assert path.read_text() == "c.IPEngine.n = 3\n"
    assert "ipengine_config.py" in run("profile", "create", "--reset").out
    assert "# c.IPEngine.n = 1\n" in path.read_text()


def test_the_config_files_are_all_comments_and_every_line_of_them_works(ipython_dir):
    run("profile", "create")
    folder = ipython_dir / "profile_default"
    before = {role: dict(config.load(role, folder)) for role in ("cluster start", "controller", "engine")}
    for name in CONFIG_FILES:
        text = (folder / name).read_text()
        lines = [line for line in text.splitlines() if line and not line.startswith("#")]
        assert lines == ["c = get_config()  # noqa"]
        assert text.count("\n# c.") > 5
        (folder / name).write_text(text.replace("\n# c.", "\nc."))
    for role, settings in before.items():
        assert dict(config.load(role, folder)) == settings, "the lines say the defaults"


def test_wrong_words(ipython_dir):
    one_sentence(run("profile", "locate", "nope"), 2, "There is no profile", "profile create")
    one_sentence(run("profile", "make"), 2, "unknown command 'make'", "create, list, locate")
    one_sentence(run("profile", "create", "a", "b"), 2, "unexpected argument 'b'")
    one_sentence(run("profile", "create", "../a"), 2, "no slashes", "--profile-dir")
    assert list(ipython_dir.iterdir()) == []


def test_init_writes_config_files_before_the_start(ipython_dir):
    with controller(ipython_dir, "--init", "--profile=fresh", "--transport=ipc"):
        assert names(ipython_dir / "profile_fresh")[:3] == CONFIG_FILES


def test_an_edited_profile_needs_no_more_flags(ipython_dir):
    run("profile", "create", "--parallel", "--profile=mine")
    folder = ipython_dir / "profile_mine"
    for app, line in (("cluster", "c.IPClusterEngines.n = 3"), ("controller", "c.HubFactory.ip = '127.0.0.1'"),
                      ("engine", "c.IPEngine.startup_command = 'answer = 42'")):
        with open(folder / f"ip{app}_config.py", "a") as file:
            file.write(line + "\n")
    with Command("cluster", "start", "--profile=mine") as cluster:
        cluster.says("3 engines are ready")
        with ipp.Client(profile="mine") as rc:
            assert rc[:]["answer"] == [42] * 3
            rc[:].clear(block=True)
            assert rc[:]["answer"] == [42] * 3, "startup code runs again after a clear"


def test_work_dir(ipython_dir, tmp_path):
    run("profile", "create")
    (tmp_path / "only_there.py").write_text("where = 'scratch'\n")
    with open(ipython_dir / "profile_default" / "ipengine_config.py", "a") as file:
        file.write(f"c.IPEngine.work_dir = {str(tmp_path)!r}\nc.IPEngine.startup_script = 'begin.py'\n")
    (tmp_path / "begin.py").write_text("import only_there\nhere = only_there.where\n")
    with controller(ipython_dir, "--transport=ipc"), Command("engine", cwd=tmp_path):
        connection(ipython_dir)
        with ipp.Client(timeout=20) as rc:
            rc.wait_for_engines(1, timeout=20)
            assert rc[0].apply_sync(os.getcwd) == str(tmp_path)
            assert rc[0]["here"] == "scratch"


# --- completion

ASK = """
{script}
COMP_WORDS=({words}); COMP_CWORD=$(( ${{#COMP_WORDS[@]}} - 1 )); _ipclite_complete
printf '%s\\n' "${{COMPREPLY[@]}}"
"""


def completed(*words):
    """What bash offers for the last of `words`."""
    script = run("completion", "bash").out
    shown = " ".join(f"'{word}'" for word in words)
    done = subprocess.run(["bash", "--norc", "-c", ASK.format(script=script, words=shown)], stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, text=True, timeout=30, check=False,
                          env={**os.environ, "PATH": f"{os.environ['COMPLETION_BIN']}:{os.environ['PATH']}"})
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return done.stdout.split()


@pytest.fixture
def bash(ipython_dir, tmp_path, monkeypatch):
    need(shutil.which("bash"), "bash")
    program = tmp_path / "ipclite"
    program.write_text(f"#!/bin/sh\nPYTHONPATH='{ROOT}' exec '{sys.executable}' -m ipclite \"$@\"\n")
    program.chmod(0o755)
    monkeypatch.setenv("COMPLETION_BIN", str(tmp_path))


@pytest.mark.parametrize("words, some", [
    (("ipclite", ""), {"cluster", "controller", "engine", "profile", "doctor", "completion", "--version"}),
    (("ipclite", "clu"), {"cluster"}),
    (("ipclite", "cluster", "sta"), {"start", "status"}),
    (("ipcluster", "st"), {"start", "stop", "status"}),
    (("/usr/bin/ipcluster", "start", "--dae"), {"--daemonize"}),
    (("ipcluster", "start", "-n", "4", "--dae"), {"--daemonize"}),
    (("ipcontroller", "--re"), {"--reuse"}),
    (("ipclite", "engine", "--pro"), {"--profile=", "--profile-dir="}),
    (("ipclite", "profile", ""), {"create", "list", "locate", "--help"}),
    (("ipclite", "completion", ""), {"bash", "zsh"}),
])
def test_completion(bash, words, some):
    found = completed(*words)
    assert some <= set(found)
    assert all(word.startswith(words[-1]) for word in found)


def test_completion_of_profiles_and_files(bash, ipython_dir, tmp_path):
    for name in ("fast", "slow"):
        run("profile", "create", name)
    assert completed("ipcluster", "start", "--profile", "") == ["fast", "slow"]
    assert completed("ipcluster", "start", "--profile", "=", "sl") == ["slow"]
    (tmp_path / "file.json").write_text("")
    assert completed("ipengine", "--file", f"{tmp_path}/fi") == [f"{tmp_path}/file.json"]


def test_zsh(ipython_dir):
    script = run("completion", "zsh").out
    assert script.startswith("autoload") and "bashcompinit" in script
    if shutil.which("zsh"):
        code = f"autoload -U compinit; compinit -u\n{script}\necho $_comps[ipcluster]"
        done = subprocess.run(["zsh", "-f", "-c", code],
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, timeout=30, check=False)
        assert "_ipclite_complete" in done.stdout, done.stderr


def test_completion_in_a_zsh_that_somebody_types_into(ipython_dir, tmp_path):
    need(shutil.which("zsh"), "zsh")
    (tmp_path / "script").write_text(run("completion", "zsh").out)
    main, side = pty.openpty()
    shell = subprocess.Popen(["zsh", "-f", "-i"], stdin=side, stdout=side, stderr=side, start_new_session=True,
                             env={**os.environ, "TERM": "dumb", "PS1": "ready> ", "HOME": str(tmp_path)})
    os.close(side)
    seen = b""

    def until(text):
        nonlocal seen
        deadline = time.monotonic() + 20
        while text not in seen:
            assert time.monotonic() < deadline and select.select([main], [], [], 20)[0], seen
            seen += os.read(main, 4096)
        seen = b""

    try:
        until(b"ready> ")
        os.write(main, f"autoload -U compinit; compinit -u -D; source {tmp_path}/script; echo it is $((1 + 1))\n".encode())
        until(b"it is 2")
        os.write(main, b"ipcontroller --reu\t")
        until(b"--reuse")
    finally:
        shell.kill()
        shell.wait()
        os.close(main)


def test_wrong_shell(ipython_dir):
    one_sentence(run("completion", "fish"), 2, "unknown shell 'fish'", "bash, zsh")
    assert run("completion").process.returncode == 1
