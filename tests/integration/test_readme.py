"""What the README tells a newcomer to do works, and prints what it says."""

from __future__ import annotations

import re

import pytest
from shell import ROOT, Command, run

README = (ROOT / "README.md").read_text(encoding="utf-8")
# Python that is followed by what it prints.
EXAMPLES = re.findall(r"^```python\n([^`]*?)^```\n\n```text\n([^`]*?)^```$", README, re.MULTILINE)


def script(folder, source):
    """`source` as a file in a folder of its own."""
    path = folder / "example.py"
    path.write_text(source)
    return [str(path)]


def test_the_readme_has_both_examples():
    assert ["Cluster(" in source for source, _ in EXAMPLES] == [True, False]


def test_the_first_example(ipython_dir, tmp_path):
    source, printed = EXAMPLES[0]
    with run(code=script(tmp_path, source), timeout=60) as command:
        assert (command.process.returncode, command.err) == (0, "")
        assert command.out == printed


def test_the_example_by_hand(ipython_dir, tmp_path):
    source, printed = EXAMPLES[1]
    with Command("cluster", "start", "-n", "4") as cluster:
        cluster.says("4 engines are ready")
        with run(code=script(tmp_path, source)) as command:
            assert (command.process.returncode, command.out) == (0, printed), command.err
        with run("cluster", "list") as listed:
            assert "4/4" in listed.out
        with run("cluster", "stop") as stopped:
            assert stopped.process.returncode == 0, stopped.err
        assert cluster.wait() == 0, cluster.err


def test_three_shells(ipython_dir, tmp_path):
    source, printed = EXAMPLES[1]
    source = source.replace("rc = ipp.Client()\n", "rc = ipp.Client()\nrc.wait_for_engines(4, timeout=30)\n")
    with Command("controller"), Command("engine", "-n", "4"), run(code=script(tmp_path, source)) as command:
        assert (command.process.returncode, command.out) == (0, printed), command.err


@pytest.mark.parametrize("flag", ["--hwm=1", "--crash-limit=0"])
def test_what_follows_two_dashes_is_for_the_controller(flag, ipython_dir):
    with Command("cluster", "start", "-n", "1", "--", flag) as cluster:
        cluster.says("1 engines are ready")
