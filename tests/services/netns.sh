#!/usr/bin/env bash
# Several hosts on one kernel, for the tests: network namespaces <prefix>1, <prefix>2, ... with addresses 10.NET.0.11,
# 10.NET.0.12, ..., each with a host name, a loopback interface and an /etc/hosts of its own, joined by a switch. Root only.
#   netns.sh install | start | stop
#   netns.sh exec NAME command...   run a command on a host
#   netns.sh cut NAME | heal NAME   pull its cable (packets vanish, nobody is told), and plug it in again
# Environment: NETNS_PREFIX, NETNS_NET (a number from 0 to 255), NETNS_COUNT (default 3)
set -euo pipefail
STATE=none . "$(dirname "$0")/lib.sh"
[ "${1:-}" = install ] || : "${NETNS_PREFIX:?}" "${NETNS_NET:?}"
prefix=${NETNS_PREFIX:-} net=10.${NETNS_NET:-}.0 count=${NETNS_COUNT:-3} switch=${NETNS_PREFIX:-}sw

install() { have ip || install_packages iproute2; }

start() {
    local i j name
    # the switch is a namespace too, so that no firewall rule of this machine applies to it
    ip netns add "$switch"
    ip -n "$switch" link add br0 type bridge
    ip -n "$switch" link set br0 up
    for ((i = 1; i <= count; i++)); do
        name=$prefix$i
        mkdir -p "/etc/netns/$name" # `ip netns exec` lays these files over those in /etc
        {
            echo "127.0.0.1 localhost"
            for ((j = 1; j <= count; j++)); do echo "$net.$((10 + j)) $prefix$j"; done
        } >"/etc/netns/$name/hosts"
        sed 's/^hosts:.*/hosts: files/' /etc/nsswitch.conf >"/etc/netns/$name/nsswitch.conf"
        ip netns add "$name"
        ip -n "$name" link set lo up
        ip link add "p$i" netns "$switch" type veth peer name eth0 netns "$name"
        ip -n "$switch" link set "p$i" master br0
        ip -n "$switch" link set "p$i" up
        ip -n "$name" addr add "$net.$((10 + i))/24" dev eth0
        ip -n "$name" link set eth0 up
    done
}

stop() {
    local i name
    for ((i = 1; i <= count; i++)); do
        name=$prefix$i
        ip netns del "$name" || true
        rm -rf "/etc/netns/$name"
    done
    ip netns del "$switch" || true
    rmdir /etc/netns 2>/dev/null || true
}

on() {
    local name=$1
    shift
    exec ip netns exec "$name" unshare --uts sh -c 'hostname "$0"; exec "$@"' "$name" "$@"
}

command=${1:-}
[ $# = 0 ] || shift
case $command in
install | start | stop) "$command" ;;
exec) on "$@" ;;
cut) ip -n "$switch" link set "p${1#"$prefix"}" down ;;
heal) ip -n "$switch" link set "p${1#"$prefix"}" up ;;
*)
    echo "usage: $0 install|start|stop|exec|cut|heal" >&2
    exit 2
    ;;
esac
