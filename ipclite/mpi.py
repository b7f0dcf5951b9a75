"""MPI, as an engine sees it: its rank, the world that it belongs to, and the code that sets MPI up.

    mpiexec ── a rank ──► Agent ── fork ──► Engine ── enter(...) ──► World: rank, size, tag
                                               └──► HELLO: id = rank

Rules that hold here: MPI is set up once per engine, in its main thread, before it registers; a rank that finds itself alone
though it was started among others is an error, not an engine.
"""

from __future__ import annotations

import os
import sys
from typing import Any, Mapping, NamedTuple, Optional

from .errors import ConfigError

# Where those who start ranks write rank and size. Slurm's come last: they are in every step's environment, also of another MPI's.
VARIABLES = (("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"), ("PMI_RANK", "PMI_SIZE"), ("MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE"),
             ("PALS_RANKID", "PALS_SIZE"), ("JSM_NAMESPACE_RANK", "JSM_NAMESPACE_SIZE"), ("PMIX_RANK", "PMIX_SIZE"),
             ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS"))
# The same for the rank among those of one host, and their number.
LOCAL_VARIABLES = (("OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"), ("MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
                   ("MV2_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_SIZE"), ("PALS_LOCAL_RANKID", "PALS_LOCAL_SIZE"),
                   ("SLURM_LOCALID", "SLURM_NTASKS_PER_NODE"))

MPI4PY = """from mpi4py import MPI
mpi_rank, mpi_size = MPI.COMM_WORLD.Get_rank(), MPI.COMM_WORLD.Get_size()
"""
PYTRILINOS = """from PyTrilinos import Epetra
mpi_comm = Epetra.PyComm()
mpi_rank, mpi_size = mpi_comm.MyPID(), mpi_comm.NumProc()
"""
INITS = {"mpi4py": MPI4PY, "pytrilinos": PYTRILINOS}
NAMES = ("mpi_rank", "mpi_size")


class World(NamedTuple):
    """Which of `size` ranks this is. `tag` is the same in all of them, and "" if MPI was not set up, by mpi4py at least."""

    rank: int
    size: int
    tag: str


class Setup(NamedTuple):
    """How an engine is to enter MPI: `use` names one of `INITS` ("": mpi4py if it is there), `code` comes in its place."""

    use: str
    code: str


def setup_of(settings: Mapping[str, Any], environ: Mapping[str, str] = os.environ) -> Optional[Setup]:
    """What the settings of an engine ask for, or None if that is not MPI.

    Raises:
        ConfigError: several engines are to share one rank.
    """
    use, code = settings["MPI.use"], settings["MPI.init_script"] or settings["IPEngine.init_mpi"]
    if not settings["IPEngine.use_mpi"] and not use:
        return None
    among = (from_environment(environ) or (0, 0))[1] > 1
    if settings["IPEngine.n"] > 1 and (settings["IPEngine.use_mpi"] or among):
        raise ConfigError("MPI makes one engine of each rank, so -n is not for it: give the number of ranks to mpiexec, as in "
                          "`mpiexec -n 4 ipengine --mpi`, or start them with `ipcluster start --engines=mpi -n 4`.")
    return Setup(use, code)


def from_environment(environ: Mapping[str, str]) -> Optional[tuple[int, int]]:
    """(rank, size) as who started this process says; the size is 0 if it does not say."""
    for rank, size in VARIABLES:
        if environ.get(rank, "").isdigit():
            return int(environ[rank]), int(environ[size]) if environ.get(size, "").isdigit() else 0
    return None


def local_from_environment(environ: Mapping[str, str]) -> tuple[int, int]:
    """(rank among those of this host, their number) as far as somebody says so."""
    for rank, size in LOCAL_VARIABLES:
        if environ.get(rank, "").isdigit():
            return int(environ[rank]), int(environ[size]) if environ.get(size, "").isdigit() and int(environ[size]) else 1
    return 0, 1


def cpus_of_host(parent: int) -> int:
    """The CPUs that the process which started the ranks of this host may use."""
    try:
        return len(os.sched_getaffinity(parent))
    except (AttributeError, OSError):  # not everywhere, and not of others' processes
        return os.cpu_count() or 1


def enter(setup: Setup, namespace: dict[str, Any], log: Any) -> World:
    """Set MPI up and find out who we are; sets `mpi_rank` and `mpi_size` in `namespace`.

    Raises:
        ConfigError: it can't be set up, or nobody knows our rank.
    """
    told = from_environment(os.environ)
    if setup.code or setup.use:
        name = "the MPI init script" if setup.code else setup.use
        _run(setup.code or INITS[setup.use], namespace, name)
    else:
        try:
            exec(MPI4PY, namespace)
        except (ImportError, RuntimeError) as e:  # mpi4py is absent, or finds no MPI library
            if told is None:
                raise ConfigError(f"--mpi: this process is no rank: mpi4py can't be used ({_line(e)}), and nothing like "
                                  "OMPI_COMM_WORLD_RANK, PMI_RANK or SLURM_PROCID is set; start it with mpiexec or srun.") from None
            log.warning("MPI is not set up: mpi4py can't be used (%s)", _line(e))
    world = _world(namespace, told)
    if told is not None and told[1] > 1 and world.size == 1:
        library = _mpi4py().Get_library_version().strip("\0").splitlines()[0] if _mpi4py() else "its own library"
        raise ConfigError(f"Rank {told[0]} of {told[1]} finds itself alone: it uses {library.strip()}, and who started it is of "
                          "another MPI. Take the mpiexec of that library (c.MPILauncher.mpi_cmd), the right `srun --mpi=...`, or a "
                          "mpi4py for this one.")
    namespace.update(zip(NAMES, world))
    log.info("this is rank %d of %d", world.rank, world.size)
    return world


def leave() -> None:
    """Finalize MPI, if mpi4py set it up; mpiexec takes who ends without that for a victim."""
    api = _mpi4py()
    if api is not None:
        api.Finalize()


def _run(code: str, namespace: dict[str, Any], name: str) -> None:
    try:
        exec(compile(code, f"<{name}>", "exec"), namespace)
    except Exception as e:
        raise ConfigError(f"MPI can't be set up: {name} failed: {_line(e)}.") from e


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _mpi4py() -> Any:
    """mpi4py's MPI, if it is loaded and set up."""
    found = sys.modules.get("mpi4py.MPI")
    return found if found is not None and found.Is_initialized() and not found.Is_finalized() else None


def _world(namespace: dict[str, Any], told: Optional[tuple[int, int]]) -> World:
    api = _mpi4py()
    if api is not None:
        comm = api.COMM_WORLD
        return World(comm.Get_rank(), comm.Get_size(), comm.bcast(os.urandom(8).hex(), 0))
    rank, size = (namespace.get(name) for name in NAMES)
    if isinstance(rank, int) and isinstance(size, int):
        return World(rank, size, "")
    if told is None:
        raise ConfigError("The MPI init script set neither MPI up, by mpi4py, nor mpi_rank and mpi_size, and the environment does not "
                          "name a rank, either; start the engine with mpiexec or srun.")
    return World(*told, "")
