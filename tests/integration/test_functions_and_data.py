"""What travels: functions, classes, modules and names of a script, numpy arrays, large bytes."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]

# --- from inside of a function


def test_lambdas_closures_recursion_and_partials(balanced):
    offset = 10

    def add(x):
        return x + offset

    def factorial(n):
        return 1 if n < 2 else n * factorial(n - 1)

    def compose(f, g):
        return lambda x: f(g(x))

    assert balanced.apply_sync(lambda: 6 * 7) == 42
    assert balanced.apply_sync(add, 5) == 15
    offset = 20
    assert balanced.apply_sync(add, 5) == 25
    assert balanced.apply_sync(factorial, 10) == 3628800
    assert balanced.apply_sync(compose(abs, add), -50) == 30
    assert balanced.apply_sync(functools.partial(pow, 2), 5) == 32
    assert balanced.apply_sync(compose, abs, abs)(-3) == 3
    assert balanced.apply_sync("a-b".split, "-") == ["a", "b"]


def test_classes_made_in_a_function(balanced):
    class Point:
        def __init__(self, x):
            self.x = x

        def moved(self, by):
            return Point(self.x + by)

        def __call__(self, y):
            return self.x + y

    point = balanced.apply_sync(Point(1).moved, 2)
    assert type(point) is Point and point.x == 3
    assert balanced.apply_sync(Point(3), 4) == 7


def test_coroutines_generators_and_what_else_can_not_travel_as_they_are(balanced):
    assert balanced.apply_sync(lambda n: sum(i * i for i in range(n)), 4) == 14

    async def answer():
        return 42

    def run():
        import asyncio

        return asyncio.run(answer())

    assert balanced.apply_sync(run) == 42


@pytest.mark.parametrize("value", [
    None, True, -1, 2**200, 1.5, float("inf"), 1j, "", "ü€😀\0", b"", b"\0\xff", (), [1, [2, (3,)]], {"a": {1: 2}},
    {1, 2}, frozenset("ab"), range(5), slice(1, 2), Ellipsis, int, len, Path("/x"), bytearray(b"ab"),
], ids=repr)
def test_values_come_back_as_they_went(balanced, value):
    back = balanced.apply_sync(lambda x: x, value)
    assert back == value and type(back) is type(value)
    assert balanced.map_sync(lambda x: x, [value] * 3) == [value] * 3


def test_shared_and_circular_references(balanced):
    loop = [1]
    loop.append(loop)
    back = balanced.apply_sync(lambda x: x, loop)
    assert back[1] is back
    a = [1]
    assert balanced.apply_sync(lambda x, y: x is y, a, a)


# --- numpy and large data


ARRAYS = {
    "large": lambda: np.arange(8 * 2**20, dtype=float),  # 64 MiB
    "small": lambda: np.arange(3),
    "fortran": lambda: np.asfortranarray(np.arange(60_000.0).reshape(200, 300)),
    "strided": lambda: np.arange(100_000)[::3],
    "empty": lambda: np.empty((0, 3)),
    "scalar": lambda: np.array(5.5),
    "objects": lambda: np.array([None, "a", [1]], dtype=object),
    "structured": lambda: np.zeros(5000, dtype=[("a", "i4"), ("b", "f8")]),
    "dates": lambda: np.array(["2020-01-01"], dtype="datetime64[D]"),
    "swapped": lambda: np.arange(20_000, dtype=">i4"),
    "strings": lambda: np.array(["a", "bcd"]),
    "masked": lambda: np.ma.masked_greater(np.arange(10), 5),
}


@pytest.mark.parametrize("kind", ARRAYS)
def test_arrays(balanced, kind):
    array = ARRAYS[kind]()
    back = balanced.apply_sync(lambda x: x, array)
    assert type(back) is type(array)
    assert (back.dtype, back.shape) == (array.dtype, array.shape)
    assert back.flags.f_contiguous == array.flags.f_contiguous or kind == "strided"
    np.testing.assert_array_equal(back, array)


@pytest.mark.parametrize("n", [3, 1_000_000])
def test_arrays_may_be_written_to(balanced, n):
    def double(x):
        x *= 2
        return x

    array = np.ones(n)
    back = balanced.apply_sync(double, array)
    assert back[0] == back[-1] == 2 and array[0] == 1
    back[0] = 7
    assert back[0] == 7


def test_an_array_for_every_engine(rc, each):
    array = np.random.default_rng(1).random(2**20)
    each["data"] = array
    assert each["float(data.sum())"] == [float(array.sum())] * 2
    ar = each.apply_async(lambda x: float(x.sum()), array)
    assert ar.get(60) == [float(array.sum())] * 2


@pytest.mark.parametrize("size", [2**16, 2**18, 2**25])
def test_large_bytes(balanced, size):
    data = os.urandom(size)
    assert balanced.apply_sync(lambda x: x[::-1], data) == data[::-1]
    assert balanced.apply_sync(lambda x: bytes(x), memoryview(data)) == data
    assert balanced.apply_sync(lambda x: type(x), bytearray(data)) is bytearray
    assert balanced.apply_sync(len, "ü" * size) == size


def test_many_large_results(balanced):
    results = balanced.map_sync(lambda i: bytes([i]) * 2**20, range(40), chunksize=1)
    assert [(r[0], len(r)) for r in results] == [(i, 2**20) for i in range(40)]


def test_arrays_in_containers(balanced):
    value = {"a": np.arange(100_000), "b": [np.eye(200), b"x" * 300_000]}
    back = balanced.apply_sync(lambda v: v, value)
    assert np.array_equal(back["a"], value["a"]) and np.array_equal(back["b"][0], value["b"][0])
    assert back["b"][1] == value["b"][1]


# --- scripts, whose __main__ is real


HEAD = """
import os, sys
import ipclite as ipp
cluster = ipp.Cluster(n=2)
"""


def run_script(folder, body, *, cwd=None, name="script.py", timeout=120):
    """Run a script with a cluster `rc`, `view` and `each` in it; what it printed."""
    folder.mkdir(exist_ok=True)
    block = textwrap.indent("view, each = rc.load_balanced_view(), rc[:]\n" + body.strip("\n"), "    ")
    (folder / name).write_text(f"{HEAD}with cluster as rc:\n{block}\n", encoding="utf-8")
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, str(folder / name)], cwd=cwd or folder, env=env, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, text=True, timeout=timeout)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_functions_and_classes_of_main_go_by_value(tmp_path):
    assert run_script(tmp_path, '''
base = 100
class Animal:
    count = 0
    def __init__(self, name):
        self.name = name
    def __eq__(self, other):
        return type(other) is Animal and other.name == self.name
    def loud(self):
        return shout(self.name)
class Dog(Animal):
    def loud(self):
        return super().loud() + "!"
def shout(text):
    return text.upper()
def even(n):
    return n == 0 or odd(n - 1)
def odd(n):
    return n != 0 and even(n - 1)
def with_global(x):
    return x + base
assert view.apply_sync(even, 10) and not view.apply_sync(even, 7)
assert view.apply_sync(with_global, 1) == 101
base = 200
assert view.apply_sync(with_global, 1) == 201, "a later change is seen"
dog = view.apply_sync(Dog, "rex")
assert type(dog) is Dog and isinstance(dog, Animal) and dog.loud() == "REX!"
assert view.apply_sync(lambda a: a.loud(), dog) == "REX!"
assert view.apply_sync(lambda a: a == Animal("rex"), Animal("rex"))
assert view.map_sync(shout, ["a", "b"]) == ["A", "B"]
print("done")
''') == "done\n"


def test_captured_values_do_not_linger_and_pushed_ones_win(tmp_path):
    assert run_script(tmp_path, '''
x = 1
def f(y):
    return x + y
assert each.apply_sync(f, 1) == [2, 2]
try:
    each["x"]
except ipp.CompositeError as e:
    assert all(isinstance(error, NameError) for error in e.elist)
else:
    raise AssertionError("a captured name lingers")
x = 5
assert each.apply_sync(f, 1) == [6, 6]
each["x"] = 100
assert each.apply_sync(f, 1) == [101, 101]
each["z"] = 3
assert each.apply_sync(lambda y: z + y, 4) == [7, 7]
def note():
    global noted
    noted = os.getpid()
each.apply_sync(note)
assert len(set(each["noted"])) == 2
print("done")
''') == "done\n"


def test_a_custom_exception_of_main(tmp_path):
    assert run_script(tmp_path, '''
class Custom(ValueError):
    def __init__(self, code, *, hint="none"):
        super().__init__(f"code {code}")
        self.code, self.hint = code, hint
def fail():
    raise Custom(7, hint="try again")
for kind in (Custom, ValueError, ipp.RemoteError):
    try:
        view.apply_sync(fail)
    except kind as e:
        assert (e.code, e.hint, str(e)) == (7, "try again", "code 7"), e.__dict__
        assert "raise Custom(7" in e.traceback
    else:
        raise AssertionError(kind)
print("done")
''') == "done\n"


def test_modules_beside_the_script_and_in_the_working_directory(tmp_path):
    here, there = tmp_path / "scripts", tmp_path / "work"
    here.mkdir()
    there.mkdir()
    (here / "beside.py").write_text(
        "def f(x):\n    return x + 1\nclass Oops(Exception):\n    pass\ndef fail():\n    raise Oops('o')\n")
    (there / "inside.py").write_text("import beside\ndef g(x):\n    return beside.f(x) * 2\n")
    assert run_script(here, '''
sys.path.insert(0, os.getcwd())
import beside
rc.close()
rc = cluster.connect_client_sync()
view = rc.load_balanced_view()
import inside
assert view.apply_sync(beside.f, 1) == 2
assert view.apply_sync(inside.g, 1) == 4
assert view.apply_sync(lambda: __import__("inside").g(2)) == 6
try:
    view.apply_sync(beside.fail)
except beside.Oops as e:
    assert isinstance(e, ipp.RemoteError)
    print("done")
rc.close()
''', cwd=there) == "done\n"


def test_the_working_directory_of_the_client_is_on_the_path_without_being_asked_for(tmp_path):
    there = tmp_path / "work"
    there.mkdir()
    (there / "inside.py").write_text("answer = 42\n")
    assert run_script(tmp_path / "scripts", '''
def f():
    import inside
    return inside.answer
print(view.apply_sync(f))
''', cwd=there) == "42\n"


def test_results_of_a_class_of_a_module_by_the_script(tmp_path):
    (tmp_path / "shapes.py").write_text(
        "import dataclasses\n@dataclasses.dataclass\nclass Square:\n    side: float\n"
        "    def area(self):\n        return self.side ** 2\n")
    assert run_script(tmp_path, '''
import shapes
squares = view.map_sync(shapes.Square, range(3))
assert squares == [shapes.Square(i) for i in range(3)]
print(view.map_sync(shapes.Square.area, squares))
''') == "[0, 1, 4]\n"


def test_names_of_engines_are_their_own(tmp_path):
    assert run_script(tmp_path, '''
each.scatter("rank", [0, 1], flatten=True, block=True)
print(each.apply_sync(lambda: rank * 10), view.apply_sync(lambda: __name__))
''') == "[0, 10] __main__\n"


def test_a_folder_that_is_added_to_the_path_later_counts(rc, tmp_path, monkeypatch):
    (tmp_path / "come_lately.py").write_text("def answer():\n    return 42\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    import come_lately

    assert rc[0].apply_sync(come_lately.answer) == 42
