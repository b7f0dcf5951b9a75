#!/usr/bin/env bash
# Slurm for the tests: munged, slurmctld and as many slurmd as there shall be nodes (node1, node2, ...), all on this host,
# without systemd or accounting. Root only.
#   slurm.sh install | start | status | stop | env
# Environment: STATE (a directory, absolute; the tests' users need to be able to enter it), SLURM_PORT (it takes this one and
# one more per node), SLURM_NODES (default 3), SLURM_CPUS and SLURM_MEMORY (of each node, as the scheduler sees them; default
# 4, and 16000 MB), SLURM_PBS=1 (jobs find the variables of PBS, too)
# Commands of Slurm find it by what `env` prints.
#
# On two cores: it is ready after 0.3 s, takes a job in 0.01 s and starts it at its next turn, which comes once a second;
# srun does not wait for that. `scontrol show job` still knows a job five minutes after its end; without accounting, sacct
# knows nothing. All nodes have this host's name, SLURMD_NODENAME tells them apart. munged refuses a directory that others
# may write to. A process that leaves its parent is not taken down with its job (proctrack/linuxproc; control groups would
# need more rights than a container has).
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
. "$here/lib.sh"
nodes=${SLURM_NODES:-3} cpus=${SLURM_CPUS:-4} memory=${SLURM_MEMORY:-16000} port=${SLURM_PORT:-26817}
host=$(hostname -s)
export SLURM_CONF=${STATE:-}/slurm.conf

slurmds() { seq -f 'slurmd.node%g' "$nodes"; }

install() {
    have slurmctld slurmd munged sbatch || install_packages munge slurmctld slurmd slurm-client
}

configure() {
    mkdir -p "$STATE/munge" "$STATE/controller" "$STATE/log"
    chmod 755 "$STATE" "$STATE/munge"
    [ -s "$STATE/munge/key" ] || head -c 128 /dev/urandom >"$STATE/munge/key"
    chmod 600 "$STATE/munge/key"
    echo "CgroupPlugin=cgroup/v1" >"$STATE/cgroup.conf" # it insists on one, used or not
    : >"$STATE/plugstack.conf"
    {
        cat <<C
ClusterName=test
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$port
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$STATE/munge/socket
CredType=cred/munge
StateSaveLocation=$STATE/controller
SlurmdSpoolDir=$STATE/spool.%n
SlurmctldPidFile=$STATE/slurmctld.pid
SlurmdPidFile=$STATE/slurmd.%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SwitchType=switch/none
MpiDefault=none
MailProg=/bin/true
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ReturnToService=2
SlurmdParameters=config_overrides
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_min_interval=0,sched_interval=2,bf_interval=2
KillWait=2
CompleteWait=0
InactiveLimit=0
MinJobAge=300
SlurmctldTimeout=30
SlurmdTimeout=60
C
        # these flags have it listen at what this host's name stands for, and at no other address
        ! loopback || echo "CommunicationParameters=NoInAddrAny,NoCtldInAddrAny"
        local i
        for ((i = 1; i <= nodes; i++)); do
            echo "NodeName=node$i NodeHostname=$host NodeAddr=127.0.0.1 Port=$((port + i)) CPUs=$cpus RealMemory=$memory"
        done
        echo "PartitionName=main Nodes=node[1-$nodes] Default=YES MaxTime=INFINITE State=UP"
        [ "${SLURM_PBS:-0}" != 1 ] || like_pbs
    } >"$SLURM_CONF.new"
    mv "$SLURM_CONF.new" "$SLURM_CONF"
}

# Slurm's own plugin gives jobs PBS_JOBID and its kin, but not the number in an array.
like_pbs() {
    echo "optional spank_pbs.so" >"$STATE/plugstack.conf"
    cat >"$STATE/prologue" <<'C'
#!/bin/sh
[ -z "$SLURM_ARRAY_TASK_ID" ] || printf 'export PBS_%s='"$SLURM_ARRAY_TASK_ID"'\n' ARRAYID ARRAY_INDEX
C
    chmod 755 "$STATE/prologue"
    echo "TaskProlog=$STATE/prologue"
    echo "JobFileAppend=1" # the tasks of an array write to one file
}

ready() { [ "$(timeout 5 sinfo -h -o %T -N | grep -cE '^(idle|mixed|allocated)')" -ge "$nodes" ]; }
empty() { [ -z "$(timeout 5 squeue -h)" ]; }

start() {
    configure
    if gone munged; then
        rm -f "$STATE"/munge/socket*
        spawn munged munged -F --socket="$STATE/munge/socket" --key-file="$STATE/munge/key" --pid-file="$STATE/munge/pid" \
            --log-file="$STATE/log/munge" --seed-file="$STATE/munge/seed"
        eventually 10 munge -n --socket="$STATE/munge/socket" || die "munged: $(tail -n 5 "$STATE"/log/mung*)"
    fi
    local name node
    alive slurmctld || spawn slurmctld slurmctld -D -f "$SLURM_CONF"
    for name in $(slurmds); do
        node=${name#slurmd.}
        mkdir -p "$STATE/spool.$node"
        alive "$name" || spawn "$name" slurmd -D -N "$node" -f "$SLURM_CONF"
    done
    eventually 30 ready || die "the nodes do not get ready: $(tail -n 5 "$STATE"/log/slurm*)"
}

status() { tell munged slurmctld $(slurmds) && timeout 10 sinfo -N && timeout 10 squeue; }

# The jobs first, so that none is left behind; what the daemons would save is not needed any more.
stop() {
    if alive slurmctld; then
        timeout 10 scancel --partition=main || true
        eventually 10 empty || say "jobs are left: $(squeue -h)"
    fi
    end 1 slurmctld $(slurmds) munged
}

env() { echo "export SLURM_CONF=$SLURM_CONF"; }

case ${1:-} in
install | start | status | stop | env) "$1" ;;
*)
    echo "usage: $0 install|start|status|stop|env" >&2
    exit 2
    ;;
esac
