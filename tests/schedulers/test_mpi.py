"""Engines that are ranks of MPI, started by the mpiexec of Open MPI and of MPICH."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import signal
import threading

import psutil
import pytest
from places import mpi, slurm
from shell import Command, controller, one_sentence, run
from support import MARK, eventually, is_running, need
from tasks import die, hold, report_and_hold

import ipclite as ipp
from ipclite.errors import EngineError

SOON_S = 15  # much sooner than a heartbeat's or a grace period's end
BLOCKED = "from mpi4py import MPI; MPI.COMM_WORLD.Barrier()"


@pytest.fixture(scope="module", params=["openmpi", "mpich"])
def mpiexec(request, _mark):
    """The mpiexec of each MPI in turn, with the environment that it needs here."""
    need(importlib.util.find_spec("mpi4py"), "mpi4py")
    with mpi(request.param):
        yield f"mpiexec.{request.param}"


@pytest.fixture
def world(mpiexec, ipython_dir):
    """A function that makes a cluster, not yet started; `settings` are those of the launcher."""
    def make(n=4, engines="mpi", config=None, **options):
        return ipp.Cluster(n=n, engines=engines, config={"MPILauncher": {"mpi_cmd": [mpiexec]}, **(config or {})}, **options)
    return make


def start_flags(mpiexec, n):
    return "cluster", "start", "--engines=mpi", "-n", str(n), f"--MPILauncher.mpi_cmd=['{mpiexec}']"


def are_gone(pids):
    def alive(pid):
        try:
            return is_running(psutil.Process(pid))
        except psutil.NoSuchProcess:
            return False
    eventually(lambda: not any(map(alive, pids)), SOON_S, "the ranks are gone")


def total(values):
    """Add up what each rank has."""
    from mpi4py import MPI

    return MPI.COMM_WORLD.allreduce(values)


def share(value):
    """What rank 1 has, at all ranks."""
    from mpi4py import MPI

    MPI.COMM_WORLD.Barrier()
    return MPI.COMM_WORLD.bcast(value if MPI.COMM_WORLD.rank == 1 else None, 1)


def test_engines_are_one_world(world):
    c = world()
    with c as rc:
        view = rc[:]
        assert rc.ids == [0, 1, 2, 3]
        assert view.pull(["mpi_rank", "mpi_size"], block=True) == [[i, 4] for i in range(4)]
        assert [info["mpi"]["rank"] for _, info in sorted(rc.engine_info().items())] == [0, 1, 2, 3]
        view.execute("from mpi4py import MPI\ntotal = MPI.COMM_WORLD.allreduce(mpi_rank)", block=True)
        assert view["total"] == [6, 6, 6, 6]
        view.execute("MPI.COMM_WORLD.Barrier(); shared = MPI.COMM_WORLD.bcast(mpi_rank + 10, root=3)", block=True)
        assert view["shared"] == [13] * 4
        assert view.apply_sync(total, 5) == [20] * 4
        assert view.apply_sync(share, "word") == ["word"] * 4
        first, second = view.apply_async(total, 1), view.apply_async(total, 2)  # in the same order everywhere
        assert (first.get(SOON_S), second.get(SOON_S)) == ([4] * 4, [8] * 4)
        view.clear(block=True)
        assert view["mpi_rank"] == [0, 1, 2, 3]
        share_of_cpus = max(1, len(os.sched_getaffinity(0)) // 4)
        assert view.apply_sync(os.getenv, "OMP_NUM_THREADS") == [str(share_of_cpus)] * 4
        view.apply_sync(os.write, 2, b"past Python\n")
        eventually(lambda: c.engine_set.get_output().count("past Python") == 4, SOON_S)
        status = c.engine_set.status()
        assert status["state"] == "running" and c.engine_set.running


def test_signals_reach_each_rank(world, tmp_path):
    with world() as rc:
        running = rc[:].apply_async(report_and_hold, str(tmp_path / "pids"), str(tmp_path / "never"))
        eventually(lambda: (tmp_path / "pids").exists() and len((tmp_path / "pids").read_text().split()) == 4)
        ipp.Cluster.from_file(rc.cluster.cluster_file).signal_engines_sync(signal.SIGINT)  # another process would, too
        with pytest.raises(ipp.CompositeError) as e:
            running.get(SOON_S)
        assert [error.ename for error in e.value.elist] == ["KeyboardInterrupt"] * 4
        assert rc[:].apply_sync(total, 1) == [4] * 4


def test_ranks_begin_and_end_together(world):
    c = world(n=3)
    with c as rc:
        before = rc[:].apply_sync(os.getpid)
        with pytest.raises(ValueError, match="engine 1 is a rank of MPI.* Cluster.restart_engines"):
            c.restart_engine_sync(1)
        with pytest.raises(ValueError, match=r"\[0, 1, 2\] are the ranks of one MPI world"):
            c.stop_engine_sync(1)
        c.restart_engines_sync()
        are_gone(before)
        rc.wait_for_engines(3, timeout=SOON_S)
        eventually(lambda: rc.ids == [0, 1, 2], SOON_S)
        assert rc[:].pull("mpi_rank", block=True) == [0, 1, 2]
        assert rc[:].apply_sync(total, 2) == [6, 6, 6]
        name = c.start_engines_sync(2)  # a second world
        rc.wait_for_engines(5, timeout=SOON_S)
        assert rc[3:].apply_sync(total, 1) == [2, 2] and rc[:3].apply_sync(total, 1) == [3, 3, 3]
        c.stop_engines_sync(name)
        eventually(lambda: rc.ids == [0, 1, 2], SOON_S)
        rc.shutdown()
        eventually(lambda: not c.engine_set.running, SOON_S)
        assert c.engine_set.stop_data["exit_code"] == 0


@pytest.mark.parametrize("code, cause", [
    ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", r"signal 9 \(SIGKILL\)"), ("import os; os._exit(3)", "with code 3")])
def test_a_rank_that_dies_is_reported_and_ends_its_world(world, mpiexec, code, cause):
    c = world()
    told, ended = [], threading.Event()
    with c as rc:
        pids = rc[:].apply_sync(os.getpid)
        c.engine_set.on_stop(lambda data: (told.append(data), ended.set()))
        waiting = {i: rc[i].execute(BLOCKED, block=False) for i in (0, 1, 3)}
        dying = rc[2].execute(code, block=False)
        with pytest.raises(EngineError, match=f"engine 2 on .* is gone: .*{cause}"):
            dying.get(SOON_S)
        for i, one in waiting.items():
            with pytest.raises(EngineError, match=f"engine {i} on .* is gone: "):
                one.get(SOON_S)
        eventually(lambda: rc.ids == [], SOON_S)
        are_gone(pids)
        assert ended.wait(SOON_S) and told[0]["exit_code"]
        assert re.search(f"rank 2, engine process {pids[2]} ended: .*{cause}", told[0]["reason"])
        assert "SIGKILL" not in cause or mpiexec in told[0]["reason"] or "EXIT STRING: Killed (signal 9)" in told[0]["reason"]
        c.restart_engines_sync()
        rc.wait_for_engines(4, timeout=SOON_S)
        assert rc.ids == [0, 1, 2, 3] and rc[:].apply_sync(total, 1) == [4] * 4


def test_a_rank_that_can_not_be_interrupted_ends_its_world(world, tmp_path):
    with world(n=2) as rc:
        other = rc[0].apply_async(hold, tmp_path / "never")
        blocked = rc[1].execute(f"from mpi4py import MPI; open({str(tmp_path / 'begun')!r}, 'w'); MPI.COMM_WORLD.Barrier()", block=False)
        eventually((tmp_path / "begun").exists, SOON_S)
        blocked.abort(interrupt=True)
        with pytest.raises(ipp.TaskAborted):
            blocked.get(SOON_S)
        why = "rank 1 of its MPI world is gone: killed, as the task that it ran did not react to an interrupt"
        with pytest.raises(EngineError, match=why):
            other.get(SOON_S)


def test_mpiexec_is_killed(world):
    c = world()
    with c as rc:
        pids = rc[:].apply_sync(lambda: (__import__("os").getpid(), __import__("os").getppid()))
        waiting = rc[0].execute(BLOCKED, block=False)
        c.engine_set.process.send(signal.SIGKILL)
        with pytest.raises(EngineError):
            waiting.get(SOON_S)
        eventually(lambda: rc.ids == [], SOON_S)
        are_gone([pid for pair in pids for pid in pair])
        assert not c.engine_set.running and "SIGKILL" in c.engine_set.stop_data["reason"]


def test_stop_does_not_wait_for_ranks_that_are_busy(world, tmp_path):
    c = world()
    with c as rc:
        pids = rc[:].apply_sync(os.getpid)
        report = f"print('x', file=open({str(tmp_path / 'begun')!r}, 'a'))\n"
        rc[:2].execute(f"{report}import ctypes\nctypes.PyDLL(None).poll(None, 0, 60_000)", block=False)  # no other thread may run
        rc[2:].execute(report + BLOCKED, block=False)
        eventually(lambda: (tmp_path / "begun").exists() and len((tmp_path / "begun").read_text()) == 8, SOON_S)
        c.stop_engines_sync()
        are_gone(pids)


def test_stopped_by_another_process_after_the_first_was_killed(mpiexec, ipython_dir, tmp_path):
    script = tmp_path / "startup.py"
    script.write_text("from_script = mpi_rank * 10\n")
    first = Command(*start_flags(mpiexec, 2), "--daemonize", f"--EngineLauncher.engine_args=['-s', '{script}']")
    assert first.says("2 engines are ready", 60).wait() == 0
    with ipp.Client(cluster_id="") as rc:
        assert rc[:].pull("from_script", block=True) == [0, 10]
        assert rc[:].apply_sync(total, 1) == [2, 2]
        pids = rc[:].apply_sync(os.getpid)
    assert "this is rank 1 of 2" in run("cluster", "logs", "1").out
    assert "running" in run("cluster", "list").out
    stopped = run("cluster", "stop", timeout=60)
    assert stopped.process.returncode == 0 and "Stopped" in stopped.out, stopped.err
    are_gone(pids)


@pytest.mark.parametrize("flags", [(), ("--controller=mpi",)], ids=["engines", "controller"])
def test_the_one_that_started_it_is_killed(mpiexec, ipython_dir, flags):
    first = Command(*start_flags(mpiexec, 2), *flags).says("2 engines are ready", 60)
    with ipp.Client(cluster_id="") as rc:
        pids = rc[:].apply_sync(os.getpid)
    first.stop(signal.SIGKILL)
    are_gone(pids)
    eventually(lambda: "running" not in run("cluster", "list").out, SOON_S)


def test_by_hand_and_left_to_user_code(mpiexec, ipython_dir):
    with controller(ipython_dir), Command("engine", via=(mpiexec, "-n", "2")) as ranks:
        with ipp.Client() as rc:
            rc.wait_for_engines(2, timeout=SOON_S)
            assert rc[:].apply_sync(total, 1) == [2, 2]
            rc.shutdown()
        assert ranks.wait() == 0, ranks.err


def test_by_hand(mpiexec, ipython_dir):
    with controller(ipython_dir), Command("engine", "--mpi", via=(mpiexec, "-n", "2")) as ranks:
        with ipp.Client() as rc:
            rc.wait_for_engines(2, timeout=SOON_S)
            assert rc[:].apply_sync(total, 1) == [2, 2]
            one_sentence(run("cluster", "logs", "1"), 2, "Engine 1 is a rank of MPI", "has its output")
        ranks.says("this is rank 1 of 2")


def test_the_profile_says_it(mpiexec, ipython_dir):
    folder = ipython_dir / "profile_default"
    folder.mkdir()
    (folder / "ipengine_config.py").write_text(
        "c.MPI.use = 'mpi4py'\n"
        "c.MPI.init_script = 'from mpi4py import MPI; comm = MPI.COMM_WORLD.Dup(); half = comm.size // 2'\n")
    with controller(ipython_dir), Command("engine", via=(mpiexec, "-n", "2")), ipp.Client() as rc:
        rc.wait_for_engines(2, timeout=SOON_S)
        assert rc[:].pull(["mpi_rank", "comm.rank", "half"], block=True) == [[0, 0, 1], [1, 1, 1]]


def test_engines_of_a_profile_with_mpi_are_alone_without_mpiexec(mpiexec, start, ipython_dir):
    folder = ipython_dir / "profile_default"
    folder.mkdir()
    (folder / "ipengine_config.py").write_text("c.MPI.use = 'mpi4py'\n")
    rc = start(2)
    assert rc[:].pull(["mpi_rank", "mpi_size"], block=True) == [[0, 1], [0, 1]] and rc.ids == [0, 1]


def test_a_controller_under_mpiexec(world):
    c = world(n=2, controller="mpi")
    with c as rc:
        assert rc[:].apply_sync(total, 1) == [2, 2]
        again = ipp.Cluster.from_file(c.cluster_file)
        assert again.controller.running and again.controller.args[0] == "mpiexec"
        assert c.controller.args[:3] == [c.engine_set.args[0], "-n", "1"]


def test_ranks_on_another_host_get_the_environment(world, mpiexec, tmp_path):
    """What stands for ssh here gives no more of the environment than ssh does."""
    remote = tmp_path / "remote"
    remote.write_text("#!/bin/sh\n[ $1 != -x ] || shift\necho $1 >>$0.log\nshift\n"
                      "exec env -i PATH=\"$PATH\" HOME=\"$HOME\" OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 "
                      f"{MARK}=\"${MARK}\" sh -c \"$*\"\n")
    remote.chmod(0o755)
    open_mpi = ["--mca", "plm_rsh_agent", str(remote), "--host", "otherhost:2"]
    variants = {"mpiexec.openmpi": [open_mpi, [*open_mpi, "-x", "HOME"]],
                "mpiexec.mpich": [["-launcher", "ssh", "-launcher-exec", str(remote), "-hosts", "otherhost"]]}[mpiexec]
    for args in variants:
        settings = {"MPILauncher": {"mpi_cmd": [mpiexec], "mpi_args": args}, "EngineLauncher": {"environment": {"OURS": "a b;c"}}}
        c = world(n=2, config=settings, send_engines_connection_env=True, engine_timeout=20)
        with c as rc:
            assert rc[:].apply_sync(total, 1) == [2, 2]
            assert rc[:].apply_sync(os.getenv, "OURS") == ["a b;c"] * 2
            assert rc[:].apply_sync(os.getenv, "IPP_PROFILE_DIR") == [str(c.profile_dir)] * 2
    assert (tmp_path / "remote.log").read_text() == "otherhost\n" * len(variants)


def test_srun(ipython_dir):
    need(importlib.util.find_spec("mpi4py"), "mpi4py")
    settings = {"MPILauncher": {"mpi_cmd": ["srun", "--mpi=pmi2"], "mpi_args": ["-N", "2"]}}
    with mpi("mpich"), slurm():
        c = ipp.Cluster(n=4, engines="mpi", config=settings)
        with c as rc:
            assert rc.ids == rc[:].pull("mpi_rank", block=True) == [0, 1, 2, 3]
            assert rc[:].apply_sync(total, 1) == [4] * 4
            assert sorted(set(rc[:].apply_sync(os.getenv, "SLURMD_NODENAME"))) == ["node1", "node2"]
            c.restart_engines_sync()
            rc.wait_for_engines(4, timeout=30)
            assert rc.ids == [0, 1, 2, 3] and rc[:].apply_sync(total, 1) == [4] * 4
            waiting, dying = rc[0].execute(BLOCKED, block=False), rc[3].apply_async(die)
            for one in dying, waiting:
                with pytest.raises(EngineError, match="SIGKILL"):
                    one.get(SOON_S)
            eventually(lambda: not c.engine_set.running, SOON_S)  # srun alone would wait for the others
            assert "rank 3, engine process" in c.engine_set.stop_data["reason"]
            assert "srun: error: node" in c.engine_set.stop_data["reason"]


# ---------------------------------------------------------------- bad input


def test_ranks_of_one_mpi_with_the_library_of_another(world, mpiexec):
    other = {"mpiexec.openmpi": "mpiexec.mpich", "mpiexec.mpich": "mpiexec.openmpi"}[mpiexec]
    need(shutil.which(other), other)
    with pytest.raises(ipp.LauncherError, match=r"Rank \d of 2 finds itself alone: it uses .*MPI.*mpi_cmd") as e:
        root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
        world(n=2, config={"MPILauncher": {"mpi_cmd": [other]}, "BaseLauncher": {"environment": root}}).start_and_connect_sync()
    assert "Traceback" not in str(e.value)


def test_open_mpi_refuses_root(world, monkeypatch):
    need(shutil.which("mpiexec.openmpi"), "mpiexec.openmpi")
    for name in ("OMPI_ALLOW_RUN_AS_ROOT", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ipp.LauncherError, match="exited with code 1: mpiexec.openmpi has detected an attempt to run as root. The last"):
        world(n=2, config={"MPILauncher": {"mpi_cmd": ["mpiexec.openmpi"]}}).start_and_connect_sync()


@pytest.mark.parametrize("config, words", [
    ({"MPILauncher": {"mpi_cmd": ["nosuchexec"]}}, "There is no command 'nosuchexec'.*mpi_cmd"),
    ({"MPIExecLauncher": {"mpi_args": ["--no-such-flag"]}}, "engines of .* exited with code .*no-such-flag"),
    ({"EngineLauncher": {"engine_args": ["--MPI.init_script=1/0"]}}, "MPI init script failed: ZeroDivisionError: division by zero"),
    ({"EngineLauncher": {"engine_args": ["-n", "2"]}}, "MPI makes one engine of each rank"),
    ({"EngineLauncher": {"engine_args": ["--MPI.use=mpi5py"]}}, "MPI.use needs mpi4py, pytrilinos or nothing"),
])
def test_what_can_not_start(world, config, words):
    with pytest.raises(ipp.LauncherError) as e:
        world(n=2, config=config).start_and_connect_sync()
    assert re.search(words, str(e.value), re.DOTALL), e.value
    assert "Traceback" not in str(e.value)


def test_not_a_rank(ipython_dir, tmp_path):
    (tmp_path / "mpi4py.py").write_text("raise ImportError('it was hidden')\n")
    names = ("OMPI_COMM_WORLD_RANK", "PMI_RANK", "SLURM_PROCID", "PMIX_RANK")
    assert not any(name in os.environ for name in names)
    with controller(ipython_dir):
        refused = run("engine", "--mpi", env={"PYTHONPATH": str(tmp_path)})
        assert refused.process.returncode == 1 and "this process is no rank" in refused.err and "Traceback" not in refused.err


def test_ranks_without_mpi4py(mpiexec, ipython_dir, tmp_path):
    (tmp_path / "mpi4py.py").write_text("raise ImportError('it was hidden')\n")
    with controller(ipython_dir), Command("engine", "--mpi", via=(mpiexec, "-n", "2"), env={"PYTHONPATH": str(tmp_path)}) as ranks:
        with ipp.Client() as rc:
            rc.wait_for_engines(2, timeout=SOON_S)
            assert rc[:].pull(["mpi_rank", "mpi_size"], block=True) == [[0, 2], [1, 2]]
        ranks.says("mpi4py can't be used (ImportError: it was hidden)")
