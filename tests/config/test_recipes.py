"""The shipped configs of real models: what they adapt, and what they turn on."""

from __future__ import annotations

from pathlib import Path

import jax
import pytest

from pec_jax.config import from_config_dict
from pec_jax.config.files import load_config
from pec_jax.configs import base
from pec_jax.families.registry import published_pipelines
from pec_jax.flow.schedule import flux_sigmas, sd3_sigmas
from pec_jax.training import build, parts
from pec_jax.weights.published import write


def adapted(name: str, tmp_path: Path, pipeline: str, **changes) -> int:
    """Number of parameters that the config's LoRA has."""
    values = load_config(name).copy_and_resolve_references()
    values.unlock()
    values.update_from_flattened_dict(changes)
    config = from_config_dict(values)
    root = write(published_pipelines()[pipeline], tmp_path)
    model = build.load_model(config, root, None, weights=False)
    shapes = model.transformer_variables["params"]
    lora = jax.eval_shape(lambda: parts.trainable_params(config, shapes))
    return sum(leaf.size for leaf in jax.tree.leaves(lora))


@pytest.mark.parametrize("name", ["sd3_grpo", "sd3_pec", "sd3_grpo_ocr", "sd3_pec_geneval"])
def test_sd3_adapts_what_flow_grpo_adapts(tmp_path, name):
    assert adapted(name, tmp_path, "sd3.5-medium") == 18_776_064


def test_bases_targets_adapt_the_second_attention_too(tmp_path):
    targets = base.get_config().trainable.targets
    changes = {"trainable.targets": targets}
    assert adapted("sd3_grpo", tmp_path, "sd3.5-medium", **changes) == 23_887_872


def test_the_published_recipes_are_turned_on():
    names = ("sd3_grpo", "sd3_grpo_ocr", "flux_grpo")
    sd3, ocr, flux = (from_config_dict(load_config(name)) for name in names)
    assert (sd3.constraints["kl"].weight, sd3.constraints["kl"].form) == (0.01, "flow_grpo")
    assert ocr.constraints["kl"].weight == 0.04 and ocr.rewards["ocr"].weight == 1.0
    assert flux.constraints["kl"].weight == 0.0 and flux.model.t5_length == 128
    for config, repeats in ((sd3, 2), (flux, 6)):
        assert config.sampler.noise == "all" and config.model.encoder_dtype == "float32"
        o = config.optimizer
        assert (o.ema_decay, o.ema_every, o.ema_repeats, o.ema_warmup) == (0.9, 8, repeats, True)
    assert sd3.updates.drop_zero_advantages and not flux.updates.drop_zero_advantages


@pytest.mark.parametrize("reward", ["ocr", "geneval"])
@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_pec_takes_the_place_of_the_kl(family, reward):
    config = from_config_dict(load_config(f"{family}_pec_{reward}"))
    assert config.constraints["kl"].weight == 0.0 and config.constraints["pec"].weight > 0
    assert config.rewards[reward].weight == 1.0 and config.rewards["pickscore"].weight == 0.0
    assert config.prompts.train == config.prompts.heldout == f"prompts/{reward}"


@pytest.mark.parametrize(
    ("name", "sigmas"), [("sd3_pec_fast", sd3_sigmas(10)), ("flux_pec_fast", flux_sigmas(6, 1024))]
)
def test_the_fast_recipes_train_the_same_range_of_noise(name, sigmas):
    """From sigma 1 to .79, with nothing else changed."""
    values = load_config(name)
    config = from_config_dict(values)
    start, stop = config.sampler.window
    assert config.sampler.num_steps + 1 == len(sigmas) and start == 0
    assert sigmas[stop] == pytest.approx(0.79, abs=0.005)
    slow = load_config(name.removesuffix("_fast"))
    slow.sampler.update({"window": config.sampler.window, "noise": "trained"})
    assert from_config_dict(slow) == config
