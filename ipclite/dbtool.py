"""`ipclite db`: look at, search, export and tidy the records of tasks.

    a live cluster ──► its controller, by a Client      ──┐
    a stopped one  ──► the database itself, for a moment ─┴──► stats, find, vacuum

A condition is `key=value` or a JSON object, a query as `Client.db_query` takes it; of several all must hold.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import sys
from datetime import datetime
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional

from . import config
from .db import BUFFERS, DATES, KEYS, check_keys, compile_query
from .errors import ConfigError, NoCluster, NoRecord

SHOWN = ["msg_id", "status", "engine_id", "label", "submitted", "completed", "ename"]
AT_ONCE = 1000  # records


class Source(NamedTuple):
    """Who is asked."""

    stats: Callable[[], Dict[str, Any]]
    find: Callable[[Dict[str, Any], List[str]], List[Dict[str, Any]]]
    vacuum: Callable[[], Dict[str, Any]]


@contextlib.contextmanager
def _source(settings: config.Settings) -> Iterator[Source]:
    """The records of the cluster that the command line names."""
    cluster_id = settings["Application.cluster_id"]
    path = config.connection_file(settings.profile_dir, cluster_id, "client")
    if path.exists() and not config.dead_run(config.read_connection(path)):
        from .client import Client

        with Client(profile_dir=os.fspath(settings.profile_dir), cluster_id=cluster_id, timeout=5) as client:
            yield Source(client.db_stats, client.db_query, client.db_vacuum)
        return
    from .queries import open_db

    chosen = _stopped(settings)
    db = open_db(chosen["IPController.db_class"], chosen, lambda key: None)
    if not db.persists:
        which = f"cluster {cluster_id!r}" if cluster_id else "default cluster"
        raise NoCluster(f"No {which} runs in {path.parent.parent}, and {chosen['IPController.db_class']} keeps no "
                        "records of a stopped one; give --sqlitedb or --mongodb, or the --cluster-id of another.")
    store = getattr(db, "store", None)
    if store is not None and hasattr(store, "where") and not store.where(settings.profile_dir, cluster_id).exists():
        raise NoCluster(f"There is no file {store.where(settings.profile_dir, cluster_id)} of records; --SQLiteDB.filename and "
                        "--cluster-id say which it is.")
    db.open(settings.profile_dir, cluster_id)
    try:
        yield Source(db.stats, db.find_records, db.vacuum)
    finally:
        db.close()


def _stopped(settings: config.Settings) -> Dict[str, Any]:
    """The settings that the controller of a stopped cluster had, as far as files and flags tell."""
    found = config.load("controller", settings.profile_dir, settings.layers[-1])
    chosen = {option.name: found[option.name] for option in config.options_of("controller") if option.section.endswith("DB")}
    chosen["IPController.db_class"] = found["IPController.db_class"]
    if str(chosen["IPController.db_class"]).rpartition(".")[2].lower() in ("dictdb", "nodb"):
        from .sqlitedb import SQLiteStore

        store = SQLiteStore(chosen["SQLiteDB.filename"], chosen["SQLiteDB.location"], chosen["SQLiteDB.table"])
        if store.where(settings.profile_dir, settings["Application.cluster_id"]).exists():
            chosen["IPController.db_class"] = "SQLiteDB"
    return chosen


def read_query(words: List[str]) -> Dict[str, Any]:
    """The query that conditions make.

    Raises:
        ConfigError: one of them is none.
    """
    query: Dict[str, Any] = {}
    for word in words:
        key, equals, text = word.partition("=")
        part: Any = {key: _value(text, key)} if equals and not word.startswith("{") else None
        if part is None:
            try:
                part = json.loads(word)
            except ValueError as e:
                raise ConfigError(f"{word[:100]!r} is neither key=value nor a JSON object: {e}.") from None
        try:
            compile_query(part)
        except ValueError as e:
            raise ConfigError(f"{word[:100]!r} is no condition: {e}.") from None
        query.update(part)
    return query


def _value(text: str, key: str) -> Any:
    if key in DATES and text not in ("null", "None", ""):
        return text
    try:
        return None if text == "None" else json.loads(text)
    except ValueError:
        return text


def _keys(settings: config.Settings, usual: List[str]) -> List[str]:
    try:
        return check_keys([key.strip() for key in settings["Records.keys"].split(",")]) if settings["Records.keys"] else usual
    except ValueError as e:
        raise ConfigError(f"--keys: {e}.") from None


def _records(source: Source, query: Dict[str, Any], keys: List[str]) -> Iterator[Dict[str, Any]]:
    """The records that meet a query, some at a time."""
    ids = [record["msg_id"] for record in source.find(query, ["msg_id"])]
    for at in range(0, len(ids), AT_ONCE):
        yield from source.find({**query, "msg_id": {"$in": ids[at : at + AT_ONCE]}}, keys)


def _json(value: Any) -> Any:
    """What JSON does not know: dates as ISO text, bytes in base64."""
    if isinstance(value, datetime):
        return value.isoformat()
    return base64.b64encode(value).decode()


def _line(record: Dict[str, Any], keys: List[str]) -> str:
    return json.dumps({key: record[key] for key in keys}, default=_json)


# --- commands


def _stats(settings: config.Settings) -> int:
    with _source(settings) as source:
        found = source.stats()
    if settings["IPClusterList.output_format"] == "json":
        print(json.dumps(found, indent=2))
    else:
        wide = max(map(len, found))
        for key, value in found.items():
            print(f"{key.replace('_', ' '):<{wide}}  {value:,}" if type(value) is int else f"{key.replace('_', ' '):<{wide}}  {value}")
    return 0


def _query(settings: config.Settings) -> int:
    query, keys = read_query(settings.args), _keys(settings, SHOWN)
    with _source(settings) as source:
        found = list(_records(source, query, keys))
    if settings["IPClusterList.output_format"] == "json":
        print("[" + ",\n".join(_line(record, keys) for record in found) + "]")
        return 0
    from .ipcluster import print_table

    print_table([tuple(map(str.upper, keys)), *[tuple(_text(record[key]) for key in keys) for record in found]])
    print(f"{len(found)} record{'s' * (len(found) != 1)}.")
    return 0


def _text(value: Any) -> str:
    if isinstance(value, datetime):
        return value.astimezone().isoformat(" ", "seconds")[:19]
    text = value if isinstance(value, str) else "-" if value is None else json.dumps(value, default=_json)
    return text.replace("\n", " ")[:60] or "-"


def _export(settings: config.Settings) -> int:
    query, keys = read_query(settings.args), _keys(settings, [key for key in KEYS if key not in BUFFERS])
    path = settings["Records.output"]
    with _source(settings) as source:
        if not path:
            for record in _records(source, query, keys):
                print(_line(record, keys))
            return 0
        try:
            with open(path, "x", encoding="utf-8", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
                for record in _records(source, query, keys):
                    file.write(_line(record, keys) + "\n")
        except FileExistsError:
            raise ConfigError(f"{path} exists already; give --output another name.") from None
        except OSError as e:
            raise ConfigError(f"{path} can't be written: {e.strerror}.") from None
    return 0


def _vacuum(settings: config.Settings) -> int:
    with _source(settings) as source:
        before = source.stats()
        after = source.vacuum()
    if "file_bytes" in after:
        print(f"{after['file']}: {before['file_bytes']:,} bytes before, {after['file_bytes']:,} now.")
    else:
        print(f"{after['database']}: done.")
    return 0


COMMANDS = {"stats": _stats, "query": _query, "export": _export, "vacuum": _vacuum}


def _run(command: str, argv: List[str]) -> int:
    try:
        return COMMANDS[command](config.parse(f"db {command}", argv))
    except NoRecord as e:
        raise NoCluster(f"{e}.") from None


def _dispatch(argv: List[str]) -> int:
    return config.dispatch(f"{config.PROGRAM} db", "Look at the records of tasks, of a live cluster or a stopped one.",
                           {name: f"db {name}" for name in COMMANDS}, _run, argv)


def main(argv: Optional[List[str]] = None) -> int:
    """`ipclite db`: the command line."""
    return config.run_main(config.PROGRAM, _dispatch, argv)


if __name__ == "__main__":
    sys.exit(main())
