#!/usr/bin/env bash
# Torque's qsub, qstat, qdel, qhold, qrls, qalter and pbsnodes for the tests: the commands that Slurm brings along, over a
# Slurm of their own. Root only.
#   torque.sh install | start | status | stop | env
# Environment: STATE and the rest of slurm.sh
# Whoever has what `env` prints finds these commands before Grid Engine's, which have the same names.
#
# Their Debian package conflicts with Grid Engine's, so it is unpacked, not installed. They read no #PBS lines; sbatch does,
# but qsub has its own idea of where output goes, so a qsub is put before it that gives it what the script says of that. The
# job's id is Slurm's, without a host's name after it; `qsub -t 1-4` (and -J) makes a job array; qstat shows held jobs
# as waiting ones (Q), and not how a job ended (C); a walltime counts in whole minutes.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
. "$here/lib.sh"
unpacked=/usr/local/lib/torque-commands
export SLURM_PBS=1

install() {
    "$here/slurm.sh" install
    local packages=(libslurm-perl libslurmdb-perl libswitch-perl)
    dpkg -s "${packages[@]}" >/dev/null 2>&1 || install_packages "${packages[@]}"
    [ ! -x $unpacked/bin/qsub.slurm ] || return 0
    local folder file
    folder=$(mktemp -d)
    (
        cd "$folder"
        apt-get -qq -o APT::Sandbox::User=root download slurm-wlm-torque >/dev/null
        dpkg -x ./slurm-wlm-torque_*.deb .
    )
    mkdir -p $unpacked/bin
    for file in "$folder"/usr/bin/{q*,pbsnodes,generate_pbs_nodefile}; do cp "$file" $unpacked/bin; done
    mv $unpacked/bin/qsub $unpacked/bin/qsub.slurm
    cat >$unpacked/bin/qsub <<'C'
#!/bin/bash
read -r -d '' -a output < <(sed -n 's/^#PBS \(-[ejo] .*\)/\1/p' "${@: -1}" 2>/dev/null)
exec "$(dirname "$0")/qsub.slurm" "${output[@]}" "$@"
C
    chmod 755 $unpacked/bin/qsub
    # they look for Slurm's commands beside themselves
    for file in sbatch salloc srun scancel squeue sinfo scontrol; do ln -sf "$(command -v $file)" $unpacked/bin; done
    rm -r "$folder"
}

env() {
    "$here/slurm.sh" env
    echo "export PATH=$unpacked/bin:\$PATH"
}

case ${1:-} in
start | status | stop) "$here/slurm.sh" "$1" ;;
install | env) "$1" ;;
*)
    echo "usage: $0 install|start|status|stop|env" >&2
    exit 2
    ;;
esac
