"""The scheduler among simulated engines that crash, freeze and repeat themselves, one seed after the other.

SIM_SEED=n plays that seed alone; SIM_RUNS=n plays so many.
"""

from __future__ import annotations

import os
import traceback

import pytest
from sim.world import World

RUNS = int(os.environ.get("SIM_RUNS", "300"))
BATCHES = 10


def seeds(batch: int):
    """The seeds that one test plays."""
    one = os.environ.get("SIM_SEED")
    return [int(one)] if one else range(batch, RUNS, BATCHES)


@pytest.mark.parametrize("batch", range(1 if os.environ.get("SIM_SEED") else BATCHES))
def test_whatever_happens_every_task_ends_once(batch):
    for seed in seeds(batch):
        try:
            World(seed).play()
        except Exception:
            pytest.fail(f"SIM_SEED={seed} fails:\n{traceback.format_exc()}")
