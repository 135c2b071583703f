"""Which fields a run may change when it resumes."""

from __future__ import annotations

import pytest

from configs import base
from pec_jax.config.changes import alters_evaluation, binding, flatten

FREE = [
    "num_iterations",
    "eval.num_prompts",
    "schedule.log_every",
    "mesh.fsdp",
    "model.remat",
    "batch.update_images",
    "prompts.heldout",
    "rewards.hps.evaluate",
    "rewards.remote.max_failures",
    "encoders.clip.evaluate",
]
BINDING = [
    "seed",
    "model.path",
    "model.dtype",
    "batch.groups",
    "batch.group_size",
    "prompts.train",
    "rewards.hps.weight",
    "perception.k",
    "optimizer.learning_rate",
    "objective.name",
    "constraints.pec.weight",
]


@pytest.mark.parametrize("field", FREE + BINDING)
def test_only_what_was_learned_binds(field):
    assert field in flatten(base.get_config().to_dict())
    assert bool(binding([field])) == (field in BINDING)


@pytest.mark.parametrize(
    ("field", "alters"),
    [
        ("eval.num_prompts", True),
        ("rewards.hps.evaluate", True),
        ("perception.k", True),
        ("model.path", True),
        ("num_iterations", False),
        ("schedule.log_every", False),
        ("constraints.pec.weight", False),
        ("batch.groups", False),
    ],
)
def test_some_of_them_alter_an_evaluation(field, alters):
    assert alters_evaluation(["num_iterations", field]) == alters
