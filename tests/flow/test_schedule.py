"""Schedules: derived golden values, and agreement with diffusers' Euler scheduler."""

from __future__ import annotations

import numpy as np
import pytest
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux.pipeline_flux import calculate_shift

from pec_jax.flow import schedule

SD3_CONFIG = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "num_train_timesteps": 1000,
    "shift": 3.0,
}
FLUX_CONFIG = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "num_train_timesteps": 1000,
    "shift": 3.0,
    "use_dynamic_shifting": True,
    "base_shift": 0.5,
    "max_shift": 1.15,
    "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
}


def test_sd3_ten_steps_golden():
    golden = [1, 0.96013, 0.91335, 0.85769, 0.79037, 0.70728, 0.60215, 0.46488, 0.27805, 0.00893, 0]
    sigmas = schedule.sd3_sigmas(10)
    assert sigmas.dtype == np.float32
    np.testing.assert_allclose(sigmas, golden, atol=5.1e-6)


def test_flux_six_steps_golden():
    golden = [1, 0.90374, 0.7897, 0.65249, 0.48422, 0.273, 0]
    np.testing.assert_allclose(schedule.flux_sigmas(6, num_tokens=1024), golden, atol=5.1e-6)


@pytest.mark.parametrize("num_steps", [1, 2, 10, 28, 40])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_sd3_equals_diffusers(num_steps, shift):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(num_steps)
    ours = schedule.sd3_sigmas(num_steps, shift)
    np.testing.assert_allclose(ours, scheduler.sigmas.numpy(), rtol=0, atol=1.2e-7)


@pytest.mark.parametrize(("num_steps", "num_tokens"), [(6, 1024), (28, 4096), (4, 256), (10, 100)])
def test_flux_equals_diffusers(num_steps, num_tokens):
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(FLUX_CONFIG)
    # As FluxPipeline calls it.
    sigmas = np.linspace(1.0, 1 / num_steps, num_steps)
    scheduler.set_timesteps(sigmas=sigmas, mu=calculate_shift(num_tokens))
    ours = schedule.flux_sigmas(num_steps, num_tokens)
    np.testing.assert_allclose(ours, scheduler.sigmas.numpy(), rtol=0, atol=1.2e-7)


@pytest.mark.parametrize("num_steps", [1, 5, 40])
def test_schedules_run_strictly_from_one_to_zero(num_steps):
    for sigmas in (schedule.sd3_sigmas(num_steps), schedule.flux_sigmas(num_steps, 1024)):
        assert sigmas.shape == (num_steps + 1,)
        assert sigmas[0] == 1.0 and sigmas[-1] == 0.0
        assert np.all(np.diff(sigmas) < 0)


def test_config_chooses_the_schedule():
    np.testing.assert_array_equal(
        schedule.from_scheduler_config(SD3_CONFIG, 10), schedule.sd3_sigmas(10)
    )
    np.testing.assert_array_equal(
        schedule.from_scheduler_config(FLUX_CONFIG, 6, num_image_tokens=1024),
        schedule.flux_sigmas(6, 1024),
    )
    # Every option that diffusers writes into the file, at its default, changes nothing.
    complete = dict(FlowMatchEulerDiscreteScheduler(shift=2.0).config)
    np.testing.assert_array_equal(
        schedule.from_scheduler_config(complete, 7), schedule.sd3_sigmas(7, shift=2.0)
    )


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("use_karras_sigmas", True),
        ("use_beta_sigmas", True),
        ("use_exponential_sigmas", True),
        ("invert_sigmas", True),
        ("stochastic_sampling", True),
        ("shift_terminal", 0.02),
        ("time_shift_type", "linear"),
        ("_class_name", "DDIMScheduler"),
    ],
)
def test_unsupported_option_is_named(option, value):
    with pytest.raises(ValueError, match=str(value)) as error:
        schedule.from_scheduler_config({**SD3_CONFIG, option: value}, 10)
    if option != "_class_name":
        assert option in str(error.value)


def test_dynamic_shifting_needs_the_image_size():
    with pytest.raises(ValueError, match="num_image_tokens"):
        schedule.from_scheduler_config(FLUX_CONFIG, 10)


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="num_steps is 0"):
        schedule.sd3_sigmas(0)
    with pytest.raises(ValueError, match="num_steps is 0"):
        schedule.flux_sigmas(0, 1024)
    with pytest.raises(ValueError, match="num_tokens is 0"):
        schedule.flux_sigmas(4, 0)
    with pytest.raises(ValueError, match="shift is 0"):
        schedule.sd3_sigmas(4, shift=0.0)
