"""`ipclite db`: records of a live cluster and of a stopped one, from the shell; and what lasts from one cluster to the next."""

from __future__ import annotations

import json
import resource

import psutil
import pytest
import tasks
from shell import one_sentence, run
from support import eventually

import ipclite as ipp


def ended(command, code=0):
    """What a command printed, after it ended with this code."""
    assert command.process.returncode == code, command.err
    return command.out


@pytest.fixture
def profile(ipython_dir):
    """A profile whose clusters keep their records in a file; returns its directory."""
    folder = ipython_dir / "profile_default"
    (folder / "security").mkdir(parents=True, mode=0o700)
    (folder / "ipcontroller_config.py").write_text("c = get_config()\nc.IPController.db_class = 'SQLiteDB'\n")
    return folder


def work(rc):
    """Three tasks: one fails. Returns their ids."""
    view = rc.load_balanced_view()
    with view.temp_flags(label="blue"):
        good = [view.apply_async(abs, -i) for i in range(2)]
        bad = view.apply_async(divmod, 1, 0)
    rc.wait([*good, bad], 30)
    return [ar.msg_ids[0] for ar in (*good, bad)]


def look(ids, *flags):
    """All commands say what they should of three tasks."""
    stats = json.loads(ended(run("db", "stats", "--json", *flags)))
    assert (stats["finished"], stats["unfinished"], stats["database"]) == (3, 0, "SQLiteDB")
    assert "finished" in ended(run("db", "stats", *flags))
    lines = ended(run("db", "query", "status=error", *flags)).splitlines()
    assert lines[0].split()[0] == "MSG_ID" and lines[1].startswith(ids[2]) and "ZeroDivisionError" in lines[1]
    assert lines[-1] == "1 record."
    found = json.loads(ended(run("db", "query", '{"label": {"$glob": "bl*"}}', "status=ok", "--keys=msg_id,attempt", "--json", *flags)))
    assert found == [{"msg_id": i, "attempt": 1} for i in ids[:2]]
    exported = [json.loads(line) for line in ended(run("db", "export", *flags)).splitlines()]
    assert [record["msg_id"] for record in exported] == ids and exported[2]["evalue"]
    assert exported[0]["submitted"] <= exported[0]["completed"] and "buffers" not in exported[0]
    assert "bytes before" in ended(run("db", "vacuum", *flags))


def test_of_a_live_cluster_and_of_a_stopped_one(profile, tmp_path):
    with ipp.Cluster(n=1, cluster_id="a") as rc:
        ids = work(rc)
        look(ids, "--cluster-id=a")
    assert [path.name for path in profile.glob("*.db*")] == ["tasks-a.db"]
    look(ids, "--cluster-id=a")
    file = tmp_path / "out.jsonl"
    ended(run("db", "export", "--cluster-id=a", f"--output={file}", "--keys=msg_id,result_buffers"))
    assert len(file.read_text().splitlines()) == 3 and file.stat().st_mode & 0o777 == 0o600
    one_sentence(run("db", "export", "--cluster-id=a", f"--output={file}"), 2, "exists already")


def test_a_file_is_found_without_being_named(profile):
    (profile / "ipcontroller_config.py").unlink()
    with ipp.Cluster(n=1, cluster_id="", controller_args=["--sqlitedb"]) as rc:
        ids = work(rc)
    look(ids)


@pytest.mark.parametrize("words, code, word", [
    (("stats",), 12, "There is no file"),
    (("stats", "--cluster-id=b"), 12, "tasks-b.db"),
    (("stats", "--nodb"), 12, "cluster runs in"),
    (("query", "--dictdb"), 12, "give --sqlitedb"),
    (("query", "colour=red"), 2, "no key 'colour'"),
    (("query", '{"label": {"$regex": "a"}}'), 2, "unknown operator"),
    (("query", "label"), 2, "neither key=value nor"),
    (("query", "{label}"), 2, "neither key=value nor"),
    (("query", '["label"]'), 2, "is no condition"),
    (("query", "--keys=msg_id,colour"), 2, "no key 'colour'"),
    (("stats", "--SQLiteDB.table=a b"), 2, "no name for a table"),
    (("explode",), 2, "unknown command 'explode'"),
])
def test_mistakes(profile, words, code, word):
    one_sentence(run("db", *words), code, word)


def test_a_foreign_file(profile):
    (profile / "tasks.db").write_text("Dear diary,\n" * 100)
    one_sentence(run("db", "stats"), 2, "is not an SQLite file")


def test_help():
    assert all(command in run("db", "--help").out for command in ("stats", "query", "export", "vacuum"))
    assert "CONDITION" in run("db", "query", "--help").out


def test_records_of_another_day(profile):
    factor = 6
    with ipp.Cluster(n=1, cluster_id="a") as rc:
        ids = work(rc)
        view = rc.load_balanced_view()
        with view.temp_flags(label="mine"):
            mine = view.apply_async(lambda x: x * factor, 7)
        assert mine.get(30) == 42
        ids.append(mine.msg_ids[0])
    with ipp.Cluster(n=1, cluster_id="a") as rc:
        assert rc.hub_history() == ids
        assert rc.get_result(ids[1]).get(30) == 1 and rc.get_result(mine.msg_ids[0]).get(30) == 42
        with pytest.raises(ZeroDivisionError):
            rc.get_result(ids[2]).get(30)
        assert rc.db_query({"label": "mine", "status": "ok"}, keys=["op", "fn"])[0]["op"] == "apply"
        again = rc.resubmit(mine.msg_ids[0])
        assert again.get(30) == 42
        eventually(lambda: rc.db_query({"msg_id": mine.msg_ids[0]}, ["resubmitted"])[0]["resubmitted"] == again.msg_ids[0])
        rc.purge_hub_results(ids[0])
        with pytest.raises(ipp.RecordExpired, match="was purged"):
            rc.get_result(ids[0])
        assert rc.queue_status(verbose=True)[0]["completed"] == [*ids[1:], *again.msg_ids]
    with ipp.Cluster(n=1, cluster_id="a") as rc:
        assert rc.hub_history() == [*ids[1:], *again.msg_ids]
        rc.purge_hub_results("all")
        assert rc.hub_history() == []


def test_what_nobody_carries_on_with_has_failed(profile, tmp_path):
    with ipp.Cluster(n=1, cluster_id="a") as rc:
        view = rc.load_balanced_view()
        first, second = view.apply_async(tasks.hold, tmp_path / "never"), view.apply_async(abs, -1)
        assert len(rc.hub_history()) == 2
    with ipp.Cluster(n=1, cluster_id="a") as rc:
        assert [r["ename"] for r in rc.db_query({"status": "error"})] == ["ControllerLost"] * 2
        with pytest.raises(ipp.ControllerLost, match="before the task did"):
            rc.get_result(first.msg_ids[0]).get(30)
        assert rc.resubmit(second.msg_ids[0]).get(30) == 1
        rc.purge_hub_results("all")
        assert rc.hub_history() == []


def test_clusters_share_the_table_that_was_chosen(profile):
    with open(profile / "ipcontroller_config.py", "a") as file:
        file.write("c.SQLiteDB.table = 'tasks'\n")
    with ipp.Cluster(n=1) as rc:
        ids = work(rc)
        with pytest.raises(ipp.LauncherError, match="in use by another controller"):
            ipp.Cluster(n=1).start_cluster_sync()
    with ipp.Cluster(n=1) as rc:
        assert rc.hub_history() == ids and rc.get_result(ids[1]).get(30) == 1


def test_a_controller_does_not_start_on_what_it_can_not_read(profile):
    (profile / "tasks.db").write_text("Dear diary,\n" * 100)
    one_sentence(run("controller"), 2, "is not an SQLite file")
    assert (profile / "tasks.db").read_text().startswith("Dear diary")


@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="only Linux sets another process's limits")
def test_a_full_disk_does_not_stop_the_cluster(profile):
    with ipp.Cluster(n=1, cluster_id="a") as rc:
        ids = work(rc)
        assert rc.hub_history() == ids, "they are on disk"
        pid = next(p for p in psutil.Process().children(recursive=True) if ".controller" in " ".join(p.cmdline())).pid
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
        view = rc.load_balanced_view()
        assert len(view.apply_sync(bytes, 1_000_000)) == 1_000_000
        eventually(lambda: _failure(rc))
        assert "no records of tasks are kept any more" in _failure(rc) and "tasks-a.db" in _failure(rc)
        with pytest.raises(ipp.NoRecord, match="no records of tasks are kept any more"):
            rc.db_query({})
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        assert view.map_sync(abs, range(-100, 0)) == list(range(100, 0, -1))
    with ipp.Cluster(n=1, cluster_id="a") as rc:
        assert rc.hub_history()[:3] == ids


def _failure(rc):
    try:
        rc.hub_history()
    except ipp.NoRecord as e:
        return str(e)
    return ""
