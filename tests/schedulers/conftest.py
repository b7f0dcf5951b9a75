"""Fixtures of the tests with real schedulers."""

from __future__ import annotations

import pytest
from places import PLACES, running


@pytest.fixture(scope="module", params=PLACES)
def place(request, _mark):
    """Each place in turn, with what it needs running."""
    with running(request.param) as its_place:
        yield its_place


@pytest.fixture
def cluster(place, ipython_dir):
    """A cluster of three engines in that place, and its client."""
    one = place.cluster(3)
    with one as rc:
        yield one, rc
