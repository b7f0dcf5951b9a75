"""What tasks print: it arrives while they run, is kept per task, whole and in order."""

from __future__ import annotations

import sys

import pytest
import tasks
from support import eventually


def talk_and_hold(flag):
    import sys

    print("out before")
    print("err before", file=sys.stderr)
    tasks.hold(flag)
    print("out after")


def test_output_arrives_while_the_task_runs(balanced, tmp_path):
    flag = tmp_path / "flag"
    ar = balanced.apply_async(talk_and_hold, flag)
    eventually(lambda: ar.stdout == "out before\n" and ar.stderr == "err before\n")
    assert not ar.done()
    flag.touch()
    ar.get(30)
    assert (ar.stdout, ar.stderr) == ("out before\nout after\n", "err before\n")
    assert ar.metadata["stdout"] == "out before\nout after\n"


def test_a_line_need_not_be_whole(balanced, tmp_path):
    def f(flag):
        print("50 %", end="")
        tasks.hold(flag)

    ar = balanced.apply_async(f, tmp_path / "flag")
    eventually(lambda: ar.stdout == "50 %")
    (tmp_path / "flag").touch()
    ar.get(30)


def test_output_is_kept_per_task(balanced):
    ars = [balanced.apply_async(print, i) for i in range(200)]
    for ar in ars:
        ar.get(30)
    assert [ar.stdout for ar in ars] == [f"{i}\n" for i in range(200)]


def test_output_per_engine(rc):
    ar = rc[:].apply_async(lambda: print("hello"))
    ar.get(30)
    assert ar.stdout == ["hello\n"] * 2
    assert [m["stdout"] for m in ar.metadata] == ["hello\n"] * 2


def test_output_is_there_when_the_result_is(balanced):
    for i in range(500):
        ar = balanced.apply_async(print, i, file=None)
        ar.get(30)
        assert ar.stdout == f"{i}\n"


def test_output_is_there_when_a_callback_runs(balanced):
    seen = []
    for i in range(50):
        ar = balanced.apply_async(print, i)
        ar.add_done_callback(lambda f: seen.append(f.stdout))
        ar.get(30)
    eventually(lambda: len(seen) == 50)
    assert seen == [f"{i}\n" for i in range(50)]


def test_the_output_of_a_failed_task(balanced):
    def f():
        print("before")
        return 1 / 0

    ar = balanced.apply_async(f)
    with pytest.raises(ZeroDivisionError):
        ar.get(30)
    assert ar.stdout == "before\n"
    assert ar.stderr == ""  # the traceback is in the exception


def test_order_and_size(balanced):
    def f(n):
        for i in range(n):
            print(i)

    ar = balanced.apply_async(f, 100_000)
    ar.get(60)
    assert ar.stdout == "".join(f"{i}\n" for i in range(100_000))


def test_one_huge_write(balanced):
    ar = balanced.apply_async(lambda: print("x" * 20_000_000))
    ar.get(60)
    assert ar.stdout == "x" * 20_000_000 + "\n"


@pytest.mark.parametrize("text", ["", "ü€😀", "\0\r\t\x1b[31mred", "lone surrogate \ud800"])
def test_any_text(balanced, text):
    ar = balanced.apply_async(print, text, end="")
    ar.get(30)
    assert ar.stdout.encode("utf-8", "replace") == text.encode("utf-8", "replace")


def test_a_thread_of_the_task_prints(balanced):
    def f():
        import threading

        thread = threading.Thread(target=print, args=("from a thread",))
        thread.start()
        thread.join()

    ar = balanced.apply_async(f)
    ar.get(30)
    assert ar.stdout == "from a thread\n"


def test_several_threads_print(balanced):
    def f():
        import threading

        threads = [threading.Thread(target=lambda k=k: [print(k) for _ in range(2000)]) for k in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    ar = balanced.apply_async(f)
    ar.get(60)
    # The line ends are writes of their own, so lines may mix as they do on a terminal; nothing may be missing.
    assert sorted(ar.stdout) == sorted("0123\n\n\n\n" * 2000)


def test_map_and_execute(rc, balanced):
    ar = balanced.map_async(print, range(10), chunksize=5)
    ar.get(30)
    assert ar.stdout == ["0\n1\n2\n3\n4\n", "5\n6\n7\n8\n9\n"]
    ar = rc[0].execute("import sys\nprint(1)\nprint(2, file=sys.stderr)")
    ar.get(30)
    assert (ar.stdout, ar.stderr) == ("1\n", "2\n")


def test_the_streams_are_good_files(balanced):
    def f():
        import logging
        import sys
        import warnings

        sys.stdout.write("a")
        sys.stdout.writelines(["b", "c"])
        sys.stdout.flush()
        logging.getLogger("x").warning("logged")
        warnings.warn("warned", stacklevel=1)
        return sys.stdout.isatty(), sys.stdout.encoding, sys.stdout.writable(), type(sys.stdout.fileno())

    ar = balanced.apply_async(f)
    assert ar.get(30) == (False, "utf-8", True, int)
    assert ar.stdout == "abc"
    assert "logged" in ar.stderr and "warned" in ar.stderr


def test_write_takes_text_only(balanced):
    with pytest.raises(TypeError):
        balanced.apply_sync(lambda: sys.stdout.write(b"bytes"))


def test_subprocesses_do_not_break_the_streams(balanced):
    def f():
        import subprocess
        import sys

        subprocess.run([sys.executable, "-c", "print('child')"], check=True)
        print("parent")

    ar = balanced.apply_async(f)
    ar.get(60)
    assert ar.stdout == "parent\n"


def test_redirecting_is_the_task_s_own_affair(balanced):
    def f():
        import contextlib
        import io

        with contextlib.redirect_stdout(io.StringIO()) as caught:
            print("caught")
        print("not")
        return caught.getvalue()

    ar = balanced.apply_async(f)
    assert ar.get(30) == "caught\n"
    assert ar.stdout == "not\n"
