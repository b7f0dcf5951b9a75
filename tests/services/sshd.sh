#!/usr/bin/env bash
# OpenSSH servers for the tests, with host keys, user key and configuration of their own below STATE; nothing in ~/.ssh
# or /etc/ssh is read or written.
#   sshd.sh install | start | stop
# Environment: STATE (a directory, absolute), SSHD_PORT, SSHD_HOSTS (addresses, a server each), SSHD_OPTIONS (first lines of
# sshd_config), SSHD_SHADOW (a file to be taken for /etc/shadow; root only)
set -euo pipefail
. "$(dirname "$0")/lib.sh"
port=${SSHD_PORT:-}
read -ra hosts <<<"${SSHD_HOSTS:-127.0.0.1 127.0.0.2}"

install() {
    have sshd ssh-keygen || install_packages openssh-server openssh-client
}

configure() {
    mkdir -p "$STATE"
    chmod 700 "$STATE"
    [ "$(id -u)" != 0 ] || mkdir -p /run/sshd # where it separates privileges
    [ -e "$STATE/id_ed25519" ] || ssh-keygen -q -t ed25519 -N '' -C test -f "$STATE/id_ed25519"
    [ -e "$STATE/authorized_keys" ] || cp "$STATE/id_ed25519.pub" "$STATE/authorized_keys"
    : >"$STATE/known_hosts"
    local host pam=no
    # without PAM an account that is locked with "!" is refused even with a key
    ! getent shadow "$(id -un)" 2>/dev/null | cut -d: -f2 | grep -q '^!' || pam=yes
    for host in "${hosts[@]}"; do
        [ -e "$STATE/key.$host" ] || ssh-keygen -q -t ed25519 -N '' -C "$host" -f "$STATE/key.$host"
        echo "[$host]:$port $(cut -d' ' -f1,2 "$STATE/key.$host.pub")" >>"$STATE/known_hosts"
        cat >"$STATE/config.$host" <<C
${SSHD_OPTIONS:-}
ListenAddress $host:$port
HostKey $STATE/key.$host
PidFile none
AuthorizedKeysFile $STATE/authorized_keys
PermitRootLogin prohibit-password
PasswordAuthentication no
KbdInteractiveAuthentication no
UsePAM $([ -n "${SSHD_SHADOW:-}" ] && echo no || echo $pam)
StrictModes no
UseDNS no
MaxStartups 200
MaxSessions 200
LogLevel VERBOSE
C
    done
}

start() {
    : "${port:?}"
    configure
    local host
    for host in "${hosts[@]}"; do
        local command=("$(command -v sshd)" -D -e -f "$STATE/config.$host") # it insists on its absolute path
        if [ -n "${SSHD_SHADOW:-}" ]; then
            command=(unshare --mount sh -c 'mount --bind "$0" /etc/shadow; exec "$@"' "$SSHD_SHADOW" "${command[@]}")
        fi
        setsid "${command[@]}" >>"$STATE/log.$host" 2>&1 </dev/null &
        echo $! >"$STATE/pid.$host"
    done
}

children() {
    local child
    for child in $(cat "/proc/$1/task/$1/children" 2>/dev/null || pgrep -P "$1" || true); do
        children "$child"
        echo "$child"
    done
}

# Ends the servers and their sessions, deepest first.
stop() {
    local file pid tries
    for file in "$STATE"/pid.*; do
        [ -e "$file" ] || continue
        pid=$(cat "$file")
        kill $(children "$pid") "$pid" 2>/dev/null || true
        for ((tries = 0; tries < 100; tries++)); do
            kill -0 "$pid" 2>/dev/null || break
            sleep 0.05
        done
        rm -f "$file"
    done
}

case ${1:-} in
install | start | stop) "$1" ;;
*)
    echo "usage: $0 install|start|stop" >&2
    exit 2
    ;;
esac
