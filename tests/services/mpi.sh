#!/usr/bin/env bash
# Open MPI and MPICH side by side for the tests, without daemons of their own.
#   mpi.sh install | start | status | stop | env
# Environment: STATE (a directory, absolute), MPI (openmpi, the default, or mpich; `install` gets both)
# `env` lets them run as root, and more ranks than there are cores.
#
# Call mpiexec.openmpi and mpiexec.mpich by these names: plain mpiexec is an alternative that other packages move. mpi4py's
# wheel looks for libmpi.so.12, the name that MPICH's ABI has elsewhere; Debian calls that library libmpich.so.12. Four ranks
# that say their number take 0.4 s with Open MPI and 0.3 s with MPICH, on two cores. Open MPI waits a second between SIGCONT
# and SIGTERM, and another one before SIGKILL, when it ends ranks; MPICH kills them at once.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
. "$here/lib.sh"
flavour=${MPI:-openmpi}

install() {
    have mpiexec.openmpi mpiexec.mpich || install_packages openmpi-bin mpich
}

start() {
    local library
    command -v "mpiexec.$flavour" >/dev/null || die "mpiexec.$flavour is absent; $0 install"
    mkdir -p "$STATE/lib"
    [ "$flavour" = mpich ] || return 0
    library=$(ldconfig -p | awk '/libmpich\.so\.12 / && !found {print $NF; found = 1}') # to the end, for whoever writes
    ln -sf "$library" "$STATE/lib/libmpi.so.12"
}

status() {
    [ -d "$STATE/lib" ] || return 3
    "mpiexec.$flavour" --version
}

stop() { rm -rf "$STATE/lib"; }

env() {
    case $flavour in
    openmpi)
        echo export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 \
            PRTE_ALLOW_RUN_AS_ROOT=1 PRTE_ALLOW_RUN_AS_ROOT_CONFIRM=1 \
            OMPI_MCA_rmaps_base_oversubscribe=1 PRTE_MCA_rmaps_default_mapping_policy=:oversubscribe \
            OMPI_MCA_hwloc_base_binding_policy=none OMPI_MCA_btl=self,vader
        ;;
    mpich) echo "export MPI4PY_MPIABI=mpich LD_LIBRARY_PATH=$STATE/lib\${LD_LIBRARY_PATH:+:\$LD_LIBRARY_PATH}" ;;
    *) die "MPI is openmpi or mpich, not $flavour" ;;
    esac
}

case ${1:-} in
install | start | status | stop | env) "$1" ;;
*)
    echo "usage: $0 install|start|status|stop|env" >&2
    exit 2
    ;;
esac
