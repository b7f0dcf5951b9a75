"""The services themselves: they start twice, and beside each other, and what they leave in a queue is a leak."""

from __future__ import annotations

import subprocess

import pytest
from places import grid_engine, output_of, slurm, torque
from support import Leaks, eventually, our_ports, our_processes

SLEEP = "#!/bin/sh\nsleep 600\n"


@pytest.mark.parametrize("make, submit", [(slurm, "sbatch"), (torque, "qsub"), (grid_engine, "qsub")],
                         ids=["slurm", "torque", "gridengine"])
def test_a_job_that_stays_is_a_leak(make, submit, ipython_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with make() as service:
        leaks = Leaks(ipython_dir.parent)
        (tmp_path / "job.sh").write_text(SLEEP)
        subprocess.run([submit, "job.sh"], check=True, stdout=subprocess.DEVNULL)
        assert [line.rpartition(" of ")[2] for line in leaks.now() if line.startswith("job ")] == [service.name]
        leaks.end()
        eventually(lambda: leaks.now() == [])


def test_services_start_twice_and_beside_each_other(ipython_dir):
    before = our_ports(), set(our_processes())
    with slurm() as one:
        one._run("start")
        assert output_of("sinfo", "-h", "-o", "%D %T") == "3 idle\n"
        mine = one.environment()
        with torque() as two, grid_engine():
            assert two.environment()["SLURM_CONF"] != mine["SLURM_CONF"]
            assert output_of("which", "qsub").startswith("/usr/local/lib/torque")
            assert "main.q" in output_of("qconf", "-sql")
        one._run("stop")
        one._run("stop")
        one._run("start")
        assert output_of("sinfo", "-h", "-o", "%D %T") == "3 idle\n"
        state = one.state
    assert (our_ports(), set(our_processes())) == before
    assert not state.exists()
