"""The real controller among simulated peers that die, freeze and are cut off, one seed after the other.

SIM_SEED=n plays that seed alone; SIM_SECONDS=n plays for so long.
"""

from __future__ import annotations

import itertools
import os
import time
import traceback

import pytest
from sim.cluster import Cluster

SECONDS = float(os.environ.get("SIM_SECONDS", "15"))
FEWEST = 200  # runs of each kind, however slow the machine is


@pytest.mark.parametrize("gentle", [True, False])
def test_whatever_happens_nothing_is_lost(gentle):
    one = os.environ.get("SIM_SEED")
    began = time.monotonic()
    for seed in [int(one)] if one else itertools.count():
        if seed > FEWEST and not one and time.monotonic() - began > SECONDS:
            print(f"{seed} runs, gentle={gentle}")
            break
        try:
            Cluster(seed, gentle).play()
        except Exception:
            pytest.fail(f"SIM_SEED={seed} (gentle={gentle}) fails:\n{traceback.format_exc()}")
