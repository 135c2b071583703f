"""What PEC costs beside Flow-GRPO at full size, counted; nothing is computed."""

from __future__ import annotations

import functools

import jax
import pytest

from benchmarks import setups
from configs import sd3_grpo, sd3_pec
from pec_jax.config.schema import from_config_dict
from pec_jax.profiling import aot as ahead
from pec_jax.profiling import flops
from pec_jax.rl.train_step import train_step


@functools.cache
def step_flops(encoder: str, estimator: str, *, perception: bool) -> int:
    """Of an iteration of Stable Diffusion 3.5 Medium at 512 px, 48 groups of 24."""
    config = sd3_pec.get_config() if perception else sd3_grpo.get_config()
    config.constraints.kl.weight = 0.0  # PEC takes its place in sd3_pec
    config.perception.update({"encoder": encoder, "estimator": estimator})
    built = from_config_dict(config)
    mesh, program, arguments, shardings = ahead.abstract_step(built, jax.devices()[:1])
    state, frozen, batch, key = (getattr(arguments, n) for n in ("state", "frozen", "batch", "key"))
    setup = setups.Setup(built, program, mesh, shardings, state.params, frozen, batch, key)
    if not perception:
        setup = setups.without_perception(setup)
    step = functools.partial(train_step, setups.as_compiled(setup.program))
    return flops.count(step, state, frozen, batch, key)


@pytest.mark.parametrize("estimator", ["gaussian", "logdet", "knn"])
@pytest.mark.parametrize(("encoder", "bound"), [("pickscore", 1.02), ("dino", 1.03)])
def test_pec_costs_next_to_nothing_at_full_size(encoder, bound, estimator):
    """The paper has 1.01x with PickScore's encoder, which the reward needs anyway, and 1.03x."""
    ours = step_flops(encoder, estimator, perception=True)
    plain = step_flops("pickscore", "gaussian", perception=False)
    assert 1.0 <= ours / plain <= bound
    # 48 * 24 images of 207 TFLOP, less the reference's pass, which only a KL needs
    assert 0.15e18 < plain < 0.26e18
