#!/usr/bin/env bash
# Grid Engine for the tests: sge_qmaster and one sge_execd with a root directory of their own, without systemd. Root only.
#   gridengine.sh install | start | status | stop | env
# Environment: STATE (a directory, absolute), SGE_PORT (it takes this one and the next), SGE_SLOTS (default 8)
# Commands of Grid Engine find it by what `env` prints.
#
# On two cores: it is ready after 1.6 s, takes a job in 0.06 s, starts it at once, and forgets it a second after its end;
# then `qacct -j` knows it. A job that qdel ends is gone after a second, too; its processes after 0.1 s, since everything
# with the job's group is killed. The daemons listen on all addresses; with a C compiler at hand they are made to listen on
# that of this host's name.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
. "$here/lib.sh"
export PATH=/usr/bin:$PATH # Torque's commands may come first
slots=${SGE_SLOTS:-8} port=${SGE_PORT:-26444}
host=$(hostname) lib=/usr/lib/gridengine shipped=/usr/share/gridengine
cell=${STATE:-}/root/default configuration=${STATE:-}/configuration

env() {
    echo "export SGE_ROOT=${STATE:-}/root SGE_CELL=default SGE_CLUSTER_NAME=test SGE_QMASTER_PORT=$port SGE_EXECD_PORT=$((port + 1))"
}
eval "$(env)"

# msmtp-mta is the smallest package that is what the mailer of gridengine-master asks for
install() {
    have $lib/sge_qmaster $lib/sge_execd qconf ||
        install_packages gridengine-master gridengine-exec gridengine-client msmtp-mta
}

# A library that is loaded before others, and turns "listen on all addresses" into one address.
one_address() {
    [ ! -e "$STATE/one_address.so" ] && command -v cc >/dev/null || return 0
    cat >"$STATE/one_address.c" <<'C'
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <dlfcn.h>
#include <netinet/in.h>
#include <stdlib.h>
#include <sys/socket.h>

int bind(int fd, const struct sockaddr *address, socklen_t size) {
    int (*next)(int, const struct sockaddr *, socklen_t) = (int (*)(int, const struct sockaddr *, socklen_t))dlsym(RTLD_NEXT, "bind");
    if (address && address->sa_family == AF_INET && size >= sizeof(struct sockaddr_in)) {
        struct sockaddr_in one = *(const struct sockaddr_in *)address;
        if (one.sin_addr.s_addr == htonl(INADDR_ANY) && one.sin_port) {
            one.sin_addr.s_addr = inet_addr(getenv("ONE_ADDRESS"));
            return next(fd, (struct sockaddr *)&one, sizeof one);
        }
    }
    return next(fd, address, size);
}
C
    cc -shared -fPIC -o "$STATE/one_address.so" "$STATE/one_address.c" -ldl
}

# An empty cluster whose settings are files, and whose administrator is root.
configure() {
    [ ! -e "$STATE/configured" ] || return 0
    mkdir -p "$cell/common" "$STATE/spool/qmaster/job_scripts" "$STATE/spool/execd" "$configuration"
    one_address
    local spool="$cell/common;$STATE/spool/qmaster"
    cat >"$cell/common/bootstrap" <<C
admin_user              none
default_domain          none
ignore_fqdn             true
spooling_method         classic
spooling_lib            libspoolc
spooling_params         $spool
binary_path             /usr/sbin
qmaster_spool_dir       $STATE/spool/qmaster
security_mode           none
listener_threads        2
worker_threads          2
scheduler_threads       1
C
    echo "$host" >"$cell/common/act_qmaster"
    echo test >"$cell/common/cluster_name"
    echo "$host $({ echo localhost; getent hosts 127.0.0.1 | cut -d' ' -f2- | xargs -n 1; } | sort -u | grep -vx "$host" | xargs)" \
        >"$cell/common/host_aliases" # 127.0.0.1 has a name, too
    "$lib/spoolinit" classic libspoolc "$spool" init >&2
    sed -e 's/^conf_version.*/conf_version 0/' -e "s#^execd_spool_dir.*#execd_spool_dir $STATE/spool/execd#" \
        -e 's/^min_uid.*/min_uid 0/' -e 's/^min_gid.*/min_gid 0/' \
        -e 's#^mailer.*#mailer /bin/true#' -e 's/^administrator_mail.*/administrator_mail none/' \
        -e 's/^load_report_time.*/load_report_time 00:00:02/' \
        -e 's/^reporting_params.*/reporting_params accounting=true accounting_flush_time=00:00:00/' \
        -e 's/^execd_params.*/execd_params ENABLE_ADDGRP_KILL=TRUE,INHERIT_ENV=FALSE/' \
        $shipped/default-configuration >"$configuration/global"
    "$lib/spooldefaults" configuration "$configuration/global" >&2
    "$lib/spooldefaults" complexes $shipped/util/resources/centry >&2
    "$lib/spooldefaults" usersets $shipped/util/resources/usersets >&2
    "$lib/spooldefaults" managers root >&2
    touch "$STATE/configured"
}

# settings of the queue that have the same value: queue_rows VALUE NAME...
queue_rows() { printf "%s $1\n" "${@:2}"; }

queue() {
    printf '%s\n' "qname main.q" "hostlist @allhosts" "seq_no 0" "nsuspend 1" "suspend_interval 00:05:00" "priority 0" \
        "min_cpu_interval 00:05:00" "processors UNDEFINED" "qtype BATCH INTERACTIVE" "pe_list make smp mpi" "rerun FALSE" \
        "slots $slots" "tmpdir /tmp" "shell /bin/sh" "shell_start_mode unix_behavior" "notify 00:00:60" "initial_state default"
    queue_rows NONE load_thresholds suspend_thresholds ckpt_list prolog epilog starter_method suspend_method resume_method \
        terminate_method owner_list user_lists xuser_lists subordinate_list complex_values projects xprojects calendar
    queue_rows INFINITY {s,h}_{rt,cpu,fsize,data,stack,core,rss,vmem}
}

# Once; the master must run.
populate() {
    [ ! -e "$STATE/populated" ] || return 0
    local name
    qconf -sh | grep -qx "$host" || qconf -ah "$host" >&2
    qconf -as "$host" >&2
    { echo "hostname $host"; queue_rows NONE load_scaling complex_values user_lists xuser_lists projects xprojects usage_scaling \
        report_variables; } >"$configuration/host"
    qconf -Ae "$configuration/host" >&2
    printf 'group_name @allhosts\nhostlist %s\n' "$host" >"$configuration/hosts"
    qconf -Ahgrp "$configuration/hosts" >&2
    for name in make smp mpi; do qconf -Ap $shipped/util/resources/pe/$name >&2; done
    queue >"$configuration/queue"
    qconf -Aq "$configuration/queue" >&2
    qconf -ssconf | sed -e 's/^schedule_interval.*/schedule_interval 0:0:1/' -e 's/^flush_submit_sec.*/flush_submit_sec 1/' \
        -e 's/^flush_finish_sec.*/flush_finish_sec 1/' -e 's/^job_load_adjustments.*/job_load_adjustments NONE/' \
        -e 's/^schedd_job_info.*/schedd_job_info true/' >"$configuration/scheduler"
    qconf -Msconf "$configuration/scheduler" >&2
    touch "$STATE/populated"
}

daemon() {
    SGE_ND=1 LD_PRELOAD=$([ ! -e "$STATE/one_address.so" ] || echo "$STATE/one_address.so") \
        ONE_ADDRESS=$(getent ahostsv4 "$host" | awk 'NR == 1 {print $1}') spawn "$1" "$lib/$1"
}

answers() { qconf -sh; }
ready() { qstat -f | grep main.q@ | awk '{exit !($4 != "-NA-" && NF < 6)}'; }
empty() { [ -z "$(timeout 5 qstat -u '*')" ]; }

start() {
    configure
    if gone sge_qmaster; then
        daemon sge_qmaster
        eventually 30 answers || die "sge_qmaster: $(tail -n 5 "$STATE/log/sge_qmaster" "$STATE/spool/qmaster/messages")"
    fi
    populate >"$STATE/log/populate" 2>&1 || die "$(cat "$STATE/log/populate")"
    alive sge_execd || daemon sge_execd
    eventually 60 ready || die "sge_execd: $(tail -n 5 "$STATE/log/sge_execd" "$STATE"/spool/execd/*/messages)"
}

status() { tell sge_qmaster sge_execd && timeout 10 qstat -f; }

# The jobs first, so that none is left behind; what the daemons would save is not needed any more.
stop() {
    if alive sge_qmaster; then
        timeout 10 qdel -u '*' >/dev/null 2>&1 || true
        eventually 15 empty || say "jobs are left: $(qstat -u '*')"
    fi
    end 1 sge_execd sge_qmaster
}

case ${1:-} in
install | start | status | stop | env) "$1" ;;
*)
    echo "usage: $0 install|start|status|stop|env" >&2
    exit 2
    ;;
esac
