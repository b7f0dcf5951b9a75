"""The examples in the docstrings of public classes and functions, run against a real cluster."""

from __future__ import annotations

import doctest
import inspect
import os

import pytest

import ipclite as ipp

FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
FINDER = doctest.DocTestFinder(recurse=False, exclude_empty=False)
# Those whose examples start clusters of their own are run by the tests of these classes.
ELSEWHERE = {"Cluster", "ClusterManager", "Client"}


def examples() -> dict[str, doctest.DocTest]:
    """The docstrings of public names and their public methods that hold examples."""
    found = {}
    for name in ipp.__all__:
        thing = getattr(ipp, name)
        members = [(name, thing)]
        if inspect.isclass(thing):
            members += [(f"{name}.{key}", member) for key, member in vars(thing).items() if key[0] != "_"]
        for label, member in members:
            for test in FINDER.find(member, label, globs={}) if getattr(member, "__doc__", None) else []:
                if test.examples:
                    found[label] = test
    return found


EXAMPLES = examples()


@pytest.fixture(scope="module")
def four(cluster_of):
    return cluster_of(4)


@pytest.mark.parametrize("name", sorted(set(EXAMPLES) - ELSEWHERE))
def test_the_example_of(name, four):
    four[:].clear(block=True)
    test = EXAMPLES[name]
    test.globs = {"rc": four, "ipp": ipp, "os": os, "__name__": "__main__"}
    told = []
    failed, tried = doctest.DocTestRunner(verbose=False, optionflags=FLAGS).run(test, out=told.append, clear_globs=False)
    assert tried and not failed, "".join(told)


def test_every_class_to_work_with_has_an_example():
    wanted = {name for name in ipp.__all__ if inspect.isclass(getattr(ipp, name)) and not issubclass(getattr(ipp, name), Exception)}
    assert wanted - set(EXAMPLES) - ELSEWHERE - {"View"} == set()
