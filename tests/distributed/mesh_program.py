"""Run by test_mesh.py in a process of its own, which has 8 devices: one iteration per mesh."""

from __future__ import annotations

import functools
import json
import sys
from pathlib import Path

import jax
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))

from pec_jax.config.schema import from_config_dict
from pec_jax.distributed import mesh as sharding
from pec_jax.profiling import aot as ahead
from pec_jax.rl.train_step import train_step
from pec_jax.training.build import build
from tests.conftest import small_config_dict


def config_of(mesh: tuple[int, int, int]):
    """8 groups of 4 images in two mini-batches, sampled, decoded and trained in pieces."""
    config = small_config_dict()
    config.batch.update({"groups": 8, "rollout_images": 2, "decode_images": 2, "update_images": 1})
    config.updates.minibatches = 2
    config.constraints.pec.update({"weight": 1.0, "unit": "reward_std"})
    config.perception.k = 1
    config.optimizer.eps = 1e-3  # 1e-8 would blow the rounding of tiny gradients up to whole steps
    config.mesh.update(dict(zip(sharding.AXES, mesh)))
    return from_config_dict(config)


def one_iteration(shape: tuple[int, int, int]) -> dict:
    """Metrics, first moments and shardings after one train step on a mesh."""
    config = config_of(shape)
    mesh = sharding.make_mesh(config)
    place = sharding.placement(mesh, config)
    experiment = build(config, place)
    program, params = experiment.program, experiment.params
    shardings = sharding.state_shardings(
        jax.eval_shape(program.initial_state, params),
        experiment.param_axes,
        program.learner.optimizer,
        place,
    )
    noise = np.random.default_rng(0)  # a LoRA that does something
    params = jax.tree.map(
        lambda a, where: sharding.put_array(
            np.asarray(a + 0.05 * noise.normal(size=a.shape), np.float32), where
        ),
        params,
        shardings.params,
    )
    state = jax.jit(program.initial_state, out_shardings=shardings)(params)
    frozen = sharding.put_replicated(experiment.frozen, mesh)
    key = sharding.put_replicated(jax.random.key(0), mesh)
    batch = sharding.put_batch(experiment.tables["train"].gather(np.arange(8)), mesh, 8)
    step = jax.jit(
        functools.partial(train_step, program),
        donate_argnums=0,
        out_shardings=(shardings, sharding.replicated(mesh)),
    )
    before = jax.tree.leaves(state.params)[0]
    on_one_device = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(state))
    with sharding.active(mesh, config):
        compiled = step.lower(state, frozen, batch, key).compile()
        state, metrics = compiled(state, frozen, batch, key)
    leaves = jax.tree_util.tree_leaves_with_path(state.params)
    (space,) = program.scorer.spaces.values()
    kernels = {
        "policy": frozen.transformer["params"]["transformer_blocks.0:2"]["attn"]["to_q"],
        "encoder": frozen.networks[space.network]["params"]["encoder.layer.0:4"]["output.dense"],
    }
    _, _, arguments, _ = ahead.abstract_step(config, jax.devices())
    return {
        "metrics": {name: float(value) for name, value in metrics.items()},
        "params": {
            jax.tree_util.keystr(path): np.asarray(leaf).ravel()[::37].tolist()
            for path, leaf in leaves
        },
        "kernel_bytes": {
            name: layer["kernel"].addressable_shards[0].data.nbytes / layer["kernel"].nbytes
            for name, layer in kernels.items()
        },
        "frozen_bytes": sum(
            leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(frozen)
        ),
        "frozen_bytes_ahead": ahead.bytes_per_chip(arguments.frozen),
        "state_bytes": max(
            leaf.addressable_shards[0].data.nbytes / leaf.nbytes for _, leaf in leaves
        ),
        "groups": batch.prompt_ids.addressable_shards[0].data.shape[0],
        "donated": before.is_deleted(),
        # Every byte of the state, but for scalars that XLA may copy, becomes one of the next state.
        "reused": compiled.memory_analysis().alias_size_in_bytes / on_one_device,
        "flops": compiled.cost_analysis()["flops"],  # of one device
        "as_asked": jax.tree.all(
            jax.tree.map(
                lambda found, asked, leaf: found.is_equivalent_to(asked, leaf.ndim),
                compiled.output_shardings[0],
                shardings,
                state,
            )
        ),
    }


if __name__ == "__main__":
    shapes = json.loads(sys.argv[1])
    print(json.dumps([one_iteration(tuple(shape)) for shape in shapes]))
