"""MPI as far as it is pure: who says which rank this is, what sets MPI up, and what is read from mpiexec's output."""

from __future__ import annotations

import logging
import sys
import types

import pytest

from ipclite import config, launchers, mpi, peers
from ipclite.errors import ConfigError

LOG = logging.getLogger("test")
OPEN_MPI = """rank 0 was here
--------------------------------------------------------------------------
Primary job  terminated normally, but 1 process returned
a non-zero exit code. Per user-direction, the job has been aborted.
--------------------------------------------------------------------------
--------------------------------------------------------------------------
mpiexec noticed that process rank 2 with PID 0 on node n1 exited on signal 9 (Killed).
--------------------------------------------------------------------------
"""
OPEN_MPI_CODE = """--------------------------------------------------------------------------
mpiexec detected that one or more processes exited with non-zero status, thus causing
the job to be terminated. The first process to do so was:

  Process name: [[19139,1],2]
  Exit code:    3
--------------------------------------------------------------------------
"""
OPEN_MPI_ROOT = """--------------------------------------------------------------------------
mpiexec has detected an attempt to run as root.

Running as root is *strongly* discouraged as any mistake (e.g., in
defining TMPDIR) or bug can result in catastrophic damage to the OS
file system, leaving your system in an unusable state.
--------------------------------------------------------------------------
"""
MPICH = """
===================================================================================
=   BAD TERMINATION OF ONE OF YOUR APPLICATION PROCESSES
=   PID 9780 RUNNING AT n1
=   EXIT CODE: 9
===================================================================================
YOUR APPLICATION TERMINATED WITH THE EXIT STRING: Killed (signal 9)
This typically refers to a problem with your application.
"""
OURS = """2026-01-01 00:00:00.000 [ipengine] INFO: this is rank 2 of 4
2026-01-01 00:00:00.001 [ipengine] ERROR: rank 2, engine process 12 ended: killed by signal 9 (SIGKILL); the end of /x.log:
ipengine: waited 60 s for a controller
"""


@pytest.mark.parametrize("output, words", [
    (OPEN_MPI, "mpiexec noticed that process rank 2 with PID 0 on node n1 exited on signal 9 (Killed)"),
    (OPEN_MPI_CODE, "mpiexec detected that one or more processes exited with non-zero status, thus causing the job to be terminated. "
                    "The first process to do so was: Process name: [[19139,1],2] Exit code: 3"),
    (OPEN_MPI_ROOT, "mpiexec has detected an attempt to run as root"),
    (MPICH, "YOUR APPLICATION TERMINATED WITH THE EXIT STRING: Killed (signal 9)"),
    ("Abort(5) on node 2 (rank 2 in comm 0): application called MPI_Abort(MPI_COMM_WORLD, 5) - process 2\n",
     "Abort(5) on node 2 (rank 2 in comm 0): application called MPI_Abort(MPI_COMM_WORLD, 5) - process 2"),
    ("srun: error: n1: task 2: Killed\n", "srun: error: n1: task 2: Killed"),
    (OURS, "rank 2, engine process 12 ended: killed by signal 9 (SIGKILL); waited 60 s for a controller"),
    (OURS + OURS + MPICH, "rank 2, engine process 12 ended: killed by signal 9 (SIGKILL); waited 60 s for a controller; "
                          "YOUR APPLICATION TERMINATED WITH THE EXIT STRING: Killed (signal 9)"),
    ("nothing of interest\n", ""), ("", ""), ("-" * 70, ""),
])
def test_last_words(output, words):
    assert launchers.last_words(output) == words


def test_last_words_are_few():
    assert len(launchers.last_words("".join(f"ipengine: reason {i}\n" for i in range(1000)))) == launchers.WORDS_MAX


@pytest.mark.parametrize("environ, found", [
    ({}, None), ({"OMPI_COMM_WORLD_RANK": "2", "OMPI_COMM_WORLD_SIZE": "4"}, (2, 4)), ({"PMI_RANK": "0", "PMI_SIZE": "1"}, (0, 1)),
    ({"PMIX_RANK": "3"}, (3, 0)), ({"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2"}, (1, 2)), ({"PMI_RANK": "x"}, None),
    ({"SLURM_PROCID": "0", "OMPI_COMM_WORLD_RANK": "5", "OMPI_COMM_WORLD_SIZE": "8"}, (5, 8)),  # mpiexec in a job of Slurm
])
def test_who_says_our_rank(environ, found):
    assert mpi.from_environment(environ) == found


@pytest.mark.parametrize("environ, found", [
    ({}, (0, 1)), ({"OMPI_COMM_WORLD_LOCAL_RANK": "1", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}, (1, 2)),
    ({"MPI_LOCALRANKID": "3", "MPI_LOCALNRANKS": "4"}, (3, 4)), ({"SLURM_LOCALID": "1"}, (1, 1)),
])
def test_who_says_our_rank_on_this_host(environ, found):
    assert mpi.local_from_environment(environ) == found


@pytest.fixture
def nobody(monkeypatch):
    """Neither MPI nor an environment that speaks of it."""
    for name in [name for row in mpi.VARIABLES for name in row]:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    monkeypatch.delitem(sys.modules, "mpi4py.MPI", raising=False)
    return monkeypatch


def test_pytrilinos(nobody):
    module, comm = types.ModuleType("PyTrilinos"), types.SimpleNamespace(MyPID=lambda: 1, NumProc=lambda: 3)
    module.Epetra = types.SimpleNamespace(PyComm=lambda: comm)
    nobody.setitem(sys.modules, "PyTrilinos", module)
    namespace: dict = {}
    assert mpi.enter(mpi.Setup("pytrilinos", ""), namespace, LOG) == mpi.World(1, 3, "")
    assert namespace["mpi_comm"] is comm and namespace["mpi_rank"] == 1


@pytest.mark.parametrize("setup, words", [
    (mpi.Setup("pytrilinos", ""), "pytrilinos failed: ModuleNotFoundError: .*PyTrilinos"),
    (mpi.Setup("mpi4py", ""), "mpi4py failed: ModuleNotFoundError: "),
    (mpi.Setup("", "1 +"), "init script failed: SyntaxError"),
    (mpi.Setup("", "x = 1"), "does not name a rank"),
    (mpi.Setup("", ""), "this process is no rank: .*mpiexec or srun"),
])
def test_nobody_knows_our_rank(nobody, setup, words):
    with pytest.raises(ConfigError, match=words):
        mpi.enter(setup, {}, LOG)


def test_the_environment_knows_our_rank(nobody):
    nobody.setenv("PMI_RANK", "1")
    nobody.setenv("PMI_SIZE", "2")
    namespace: dict = {}
    assert mpi.enter(mpi.Setup("", ""), namespace, LOG) == mpi.World(1, 2, "") and namespace["mpi_size"] == 2
    with pytest.raises(ConfigError, match="Rank 1 of 2 finds itself alone"):
        mpi.enter(mpi.Setup("", "mpi_rank, mpi_size = 0, 1"), {}, LOG)


@pytest.mark.parametrize("words, found", [
    ([], None), (["-n", "4"], None), (["--mpi"], mpi.Setup("", "")), (["--MPI.use=mpi4py"], mpi.Setup("mpi4py", "")),
    (["--mpi", "--MPI.init_script=a"], mpi.Setup("", "a")), (["--mpi", "--IPEngine.init_mpi=b"], mpi.Setup("", "b")),
    (["-n", "4", "--MPI.use=mpi4py"], mpi.Setup("mpi4py", "")),  # engines of this host, each alone
])
def test_what_settings_ask_for(words, found, tmp_path):
    assert mpi.setup_of(config.parse("engine", [*words, f"--profile-dir={tmp_path}"])) == found


def test_several_engines_per_rank_make_no_sense(tmp_path):
    with pytest.raises(ConfigError, match="mpiexec -n 4 ipengine --mpi"):
        mpi.setup_of(config.parse("engine", ["--mpi", "-n", "4", f"--profile-dir={tmp_path}"]))
    with pytest.raises(ConfigError, match="one engine of each rank"):
        mpi.setup_of(config.parse("engine", ["--MPI.use=mpi4py", "-n", "4", f"--profile-dir={tmp_path}"]),
                     {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "2"})


@pytest.mark.parametrize("body, found", [
    ({}, {}), ({"set": 1, "mpi": "x"}, {}), ({"mpi": {"rank": True, "size": 2, "tag": "t"}}, {}), ({"mpi": {"rank": 0, "size": 2}}, {}),
    ({"set": "s" * 100, "mpi": {"rank": 0, "size": 2, "tag": "t", "more": []}},
     {"set": "s" * peers.NAME_MAX, "mpi": {"rank": 0, "size": 2, "tag": "t"}}),
])
def test_what_the_controller_takes_of_an_engine_s_world(body, found):
    assert peers._kinship(body) == found


@pytest.mark.parametrize("name", ["mpi", "MPI", "mpiexec", "MPIEngineSetLauncher", "MPIExecEngineSetLauncher",
                                  "ipyparallel.cluster.launcher.MPIEngineSetLauncher"])
def test_names_of_the_launcher(name):
    assert launchers.find_launcher("engine", name) is launchers.MPIEngineSetLauncher is launchers.MPIExecEngineSetLauncher
    controller = launchers.find_launcher("controller", name.replace("EngineSet", "Controller"))
    assert controller is launchers.MPIControllerLauncher is launchers.MPIExecControllerLauncher


def test_command_and_environment(tmp_path, monkeypatch):
    monkeypatch.delenv("OMPI_MCA_mca_base_env_list", raising=False)
    options = {"mpi_cmd": ["srun", "--mpi=pmix"], "mpi_args": ["--exclusive"], "engine_cmd": ["ipengine"], "environment": {"A": "b"}}
    launcher = launchers.MPIEngineSetLauncher(n=3, profile_dir=tmp_path, cluster_id="x", options=options)
    assert launcher.find_args() == ["srun", "--mpi=pmix", "-n", "3", "--exclusive", "ipengine", "--mpi",
                                    f"--IPEngine.engine_set={launcher.tag}", f"--profile-dir={tmp_path}", "--cluster-id=x"]
    assert set(launcher.get_env()["OMPI_MCA_mca_base_env_list"].split(";")) >= {"A", "IPP_CLUSTER_ID", "IPP_PROFILE_DIR"}
    launcher.options["mpi_args"] = ["-x", "HOME"]
    assert "OMPI_MCA_mca_base_env_list" not in launcher.get_env()
    assert {name for flag, name in zip(launcher.args, launcher.args[1:]) if flag == "-x"} >= {"HOME", "A", "IPP_PROFILE_DIR"}
    assert launcher.remote  # so that the controller listens where other hosts reach it


def test_settings_of_old_and_new_names(tmp_path):
    (tmp_path / "ipcluster_config.py").write_text(
        "c.MPIExecLauncher.mpi_cmd = ['mpirun']\nc.MPIExecEngineSetLauncher.mpi_args = ['-q']\n"
        "c.MPIControllerLauncher.controller_args = ['--reuse']\n")
    settings = config.load("cluster start", tmp_path)
    engines, controller = settings.section("MPIEngineSetLauncher"), settings.section("MPIControllerLauncher")
    assert (engines["mpi_cmd"], engines["mpi_args"]) == (["mpirun"], ["-q"])
    assert (controller["mpi_cmd"], controller["mpi_args"], controller["controller_args"]) == (["mpirun"], [], ["--reuse"])
