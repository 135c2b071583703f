"""Run by test_sharding.py in a process of its own, which has 8 devices: one iteration a mesh."""

from __future__ import annotations

import functools
import json
import sys
from pathlib import Path

import jax
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from pec_jax.rl.program import initial_state

from pec_jax.config.schema import from_config_dict
from pec_jax.distributed import mesh as sharding
from pec_jax.rl import program as program_lib
from pec_jax.rl.train_step import train_step
from pec_jax.training.build import make_world
from tests.conftest import small_config_dict


def config_of(mesh: tuple[int, int, int]):
    """8 groups of 4 images in two mini-batches, sampled, decoded and trained in pieces."""
    config = small_config_dict()
    config.batch.update({"groups": 8, "rollout_images": 2, "decode_images": 2, "update_images": 1})
    config.grpo.minibatches = 2
    config.constraint.update({"name": "pec", "weight": 1.0, "unit": "reward_std"})
    config.perception.k = 1
    config.optimizer.eps = 1e-3  # 1e-8 would blow the rounding of tiny gradients up to whole steps
    config.mesh.update(dict(zip(sharding.AXES, mesh)))
    return from_config_dict(config)


def one_iteration(shape: tuple[int, int, int]) -> dict:
    """Metrics, first moments and shardings after one train step on a mesh."""
    config = config_of(shape)
    mesh = sharding.make_mesh(config)
    place = sharding.placement(mesh, config)
    world = make_world(config, place)
    shardings = program_lib.state_shardings(world.program, world.params, world.param_axes, place)
    noise = np.random.default_rng(0)  # a LoRA that does something
    params = jax.tree.map(
        lambda a, where: sharding.put_array(
            np.asarray(a + 0.05 * noise.normal(size=a.shape), np.float32), where
        ),
        world.params,
        shardings.params,
    )
    make = functools.partial(
        initial_state, optimizer=world.program.optimizer, constraint_weight=1.0
    )
    state = jax.jit(make, out_shardings=shardings)(params)
    frozen = sharding.put_replicated(world.frozen, mesh)
    key = sharding.put_replicated(jax.random.key(0), mesh)
    batch = sharding.put_batch(world.train.gather(np.arange(8)), mesh, 8)
    step = jax.jit(
        functools.partial(train_step, world.program),
        donate_argnums=0,
        out_shardings=(shardings, sharding.replicated(mesh)),
    )
    before = jax.tree.leaves(state.params)[0]
    on_one_device = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(state))
    with sharding.active(mesh, config):
        compiled = step.lower(state, frozen, batch, key).compile()
        state, metrics = compiled(state, frozen, batch, key)
    leaves = jax.tree_util.tree_leaves_with_path(state.params)
    kernel = frozen.transformer["params"]["transformer_blocks.0:2"]["attn"]["to_q"]["kernel"]
    return {
        "metrics": {name: float(value) for name, value in metrics.items()},
        "params": {
            jax.tree_util.keystr(path): np.asarray(leaf).ravel()[::37].tolist()
            for path, leaf in leaves
        },
        "kernel_bytes": kernel.addressable_shards[0].data.nbytes / kernel.nbytes,
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
