"""Fixtures that several tests share: a small config on the embedded model, and its world."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # `configs` is not a part of the installed package


def _take_a_share_of_the_cores():
    """One worker of pytest-xdist, one share: threads of several wait for each other otherwise."""
    worker, count = (
        os.environ.get("PYTEST_XDIST_WORKER"),
        os.environ.get("PYTEST_XDIST_WORKER_COUNT"),
    )
    if worker and count and hasattr(os, "sched_setaffinity"):
        share = sorted(os.sched_getaffinity(0))[int(worker.removeprefix("gw")) :: int(count)]
        if share:
            os.sched_setaffinity(0, share)


_take_a_share_of_the_cores()  # before jax counts them


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """Prompt sets and compiled programs are cached outside of the user's home."""
    directory = tmp_path_factory.mktemp("cache")
    os.environ["PEC_JAX_CACHE"] = str(directory)
    return directory


def small_config_dict():
    """2 groups of 4 images, 3 steps: what a step needs to be a step."""
    from configs import shapes_grpo

    config = shapes_grpo.get_config()
    config.num_iterations = 4
    config.trainable.rank = 4
    config.sampler.num_steps = 3
    config.batch.update({"groups": 2, "group_size": 4})
    config.eval.update(
        {
            "num_prompts": 3,
            "groups": 2,
            "images_per_prompt": 4,
            "num_steps": 3,
            "sample_rows": 2,
            "sample_columns": 3,
        }
    )
    config.schedule.update({"sample_every": 2, "checkpoint_every": 2, "eval_every": 2})
    return config


@pytest.fixture
def small_config():
    """A fresh small ConfigDict."""
    return small_config_dict()


@pytest.fixture(scope="session")
def world():
    """The embedded model, loaded once, under the small config."""
    from pec_jax.config.schema import from_config_dict
    from pec_jax.training.build import build

    return build(from_config_dict(small_config_dict()))
