#!/usr/bin/env bash
# A MongoDB server for the tests: mongod if it is on PATH, else nx-27017, which is a test dependency of the package where
# Python is 3.10 or newer. That one speaks MongoDB's wire protocol over SQLite.
#   mongo.sh install | start | status | stop | env
# Environment: STATE (a directory, absolute), MONGO_PORT, PYTHON (nx-27017 is looked for beside it; default python3)
#
# What nx-27017 0.8 gets wrong: replace_one fails with bytes in the document; count_documents({"x": None}) is 0; a unique index
# is not enforced, except that of _id; an index over several keys breaks inserts if one of them is _id; names of collections
# have no dots; an unknown command is no error; index_information knows no names.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
. "$here/lib.sh"
port=${MONGO_PORT:-26017} python=${PYTHON:-python3}

# The server comes with the test dependencies.
install() { have ps || install_packages procps; }

alive() {
    local pid
    pid=$(cat "$STATE/pid" 2>/dev/null) && [ -n "$pid" ] && ps -o stat= -p "$pid" | grep -qv Z
}

answers() {
    "$python" -c "import pymongo; pymongo.MongoClient('127.0.0.1', $port, serverSelectionTimeoutMS=500).admin.command('ping')"
}

start() {
    mkdir -p "$STATE/data"
    if ! alive; then
        local stand_in
        rm -f "$STATE/nx.pid"
        stand_in=$(dirname "$(command -v "$python")")/nx-27017
        if have mongod; then
            set -- mongod --bind_ip 127.0.0.1 --port "$port" --dbpath "$STATE/data"
        elif [ -x "$stand_in" ]; then
            set -- "$stand_in" --data-dir "$STATE/data" --host 127.0.0.1 -p "$port" --log-file "$STATE/nx.log" \
                --pid-file "$STATE/nx.pid"
        else
            die "mongod and nx-27017 are absent"
        fi
        "$@" >>"$STATE/out.log" 2>&1 </dev/null &
        echo $! >"$STATE/pid"
    fi
    eventually 3 answers || {
        tail "$STATE/out.log" >&2
        die "no answer on port $port"
    }
}

status() {
    alive && answers
}

stop() {
    if alive; then
        local pid
        pid=$(cat "$STATE/pid")
        kill "$pid" 2>/dev/null || true
        kill -CONT "$pid" 2>/dev/null || true
        eventually 5 eval "! alive" || kill -9 "$pid" 2>/dev/null || true
    fi
    rm -f "$STATE/pid"
}

env() {
    echo "export MONGO_URI=mongodb://127.0.0.1:$port/ MONGO_PID=$(cat "$STATE/pid")"
}

case ${1:-} in
install | start | status | stop | env) "$1" ;;
*)
    echo "usage: $0 install | start | status | stop | env" >&2
    exit 2
    ;;
esac
