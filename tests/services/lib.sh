# What the services share; to be sourced. A running service keeps all it has in STATE, a directory that must be given and be
# absolute.
[ "${1:-}" = install ] || : "${STATE:?}"
export PATH=$PATH:/usr/sbin:/sbin

say() { echo "$(basename "$0"): $*" >&2; }
die() {
    say "$*"
    exit 1
}

# have COMMAND...: are they all there?
have() {
    local name
    for name in "$@"; do command -v "$name" >/dev/null || return 1; done
}

# eventually SECONDS command...: run it ten times a second until it succeeds
eventually() {
    local end=$((SECONDS + $1 + 1))
    shift
    while ! "$@" >/dev/null 2>&1; do
        ((SECONDS < end)) || return 1
        sleep 0.1
    done
}

# install_packages NAME...: with apt; no package may start a daemon of its own. Stale lists are brought up to date first.
install_packages() {
    local policy=/usr/sbin/policy-rc.d mine='' failed=0
    local apt=(apt-get -qq -o DPkg::Lock::Timeout=300 -o Acquire::Retries=3)
    local install=("${apt[@]}" install -y --no-install-recommends "$@")
    export DEBIAN_FRONTEND=noninteractive
    if [ ! -e $policy ]; then
        mine=1
        printf '#!/bin/sh\nexit 101\n' >$policy
        chmod +x $policy
    fi
    "${install[@]}" </dev/null >/dev/null 2>&1 || { "${apt[@]}" update && "${install[@]}" </dev/null >/dev/null; } || failed=$?
    [ -z "$mine" ] || rm -f $policy
    return $failed
}

# spawn NAME PROGRAM word...: in the background, with its pid in STATE/pid/NAME and its output in STATE/log/NAME
spawn() {
    local name=$1
    shift
    mkdir -p "$STATE/pid" "$STATE/log"
    setsid "$@" >>"$STATE/log/$name" 2>&1 </dev/null &
    echo "$! $(basename "$1")" >"$STATE/pid/$name"
}

# alive NAME: does what was spawned under this name run, and is it still that program?
alive() {
    local pid program
    [ -e "$STATE/pid/$1" ] && read -r pid program <"$STATE/pid/$1" || return 1
    [ "$(cat "/proc/$pid/comm" 2>/dev/null)" = "${program:0:15}" ]
}

gone() { ! alive "$1"; }

# end SECONDS NAME...: SIGTERM to all, and SIGKILL to those that are still there after so long
end() {
    local seconds=$1 name
    shift
    for name in "$@"; do
        ! alive "$name" || kill "$(cut -d' ' -f1 "$STATE/pid/$name")" || true
    done
    for name in "$@"; do
        eventually "$seconds" gone "$name" || kill -9 "$(cut -d' ' -f1 "$STATE/pid/$name")" || true
        eventually 5 gone "$name" || die "$name does not end"
        rm -f "$STATE/pid/$name"
    done
}

# tell NAME...: which of these run; fails if one does not
tell() {
    local name failed=0
    for name in "$@"; do
        if alive "$name"; then
            echo "$name runs, pid $(cut -d' ' -f1 "$STATE/pid/$name")"
        else
            echo "$name does not run"
            failed=3
        fi
    done
    return $failed
}

# loopback: does the name of this host stand for a loopback address?
loopback() { getent ahostsv4 "$(hostname)" | head -n 1 | grep -q '^127\.'; }
