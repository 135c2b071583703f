"""The sampler: agreement of sampling and scoring, statistics of its steps, guidance."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from pec_jax.flow import transition
from pec_jax.flow.sampler import FlowSampler, guided
from pec_jax.flow.schedule import sd3_sigmas
from pec_jax.flow.window import FORWARD, Motion, stochastic_steps
from pec_jax.types import Conditioning, Transition

N, SHAPE, T = 4, (4, 4, 2), 10
SIGMAS = sd3_sigmas(T)


def _conditioning(n=N, seed=0):
    rng = np.random.default_rng(seed)
    return Conditioning(
        tokens=jnp.asarray(rng.normal(size=(n, 3, 2)), jnp.float32),
        pooled=jnp.asarray(rng.normal(size=(n, 5)), jnp.float32),
    )


def _model(params, x_t, sigma, conditioning):
    """A little network: depends on every argument, and mixes the dimensions of an image."""
    sigma = jnp.broadcast_to(sigma, x_t.shape[:1])[:, None, None, None]
    text = conditioning.pooled.mean(-1) + conditioning.tokens.sum((-1, -2))
    return jnp.tanh(x_t @ params["w"] + sigma * params["b"] + text[:, None, None, None])


PARAMS = {
    "w": jnp.asarray([[0.5, -0.2], [0.3, 0.9]], jnp.float32),
    "b": jnp.asarray([0.1, -0.4], jnp.float32),
}


def _velocity(x_t, sigma, params=PARAMS):
    """The network with its weights and prompts in place."""
    return _model(params, x_t, sigma, _conditioning())


def _noise(n=N, seed=1):
    return jax.random.normal(jax.random.key(seed), (n, *SHAPE))


def _sampler(kernel="flow_sde", stochastic=None, noise_level=0.7, dtype=jnp.float32):
    stochastic = stochastic_steps(T) if stochastic is None else stochastic
    return FlowSampler(SIGMAS, kernel, noise_level, stochastic, dtype)


@functools.cache
def _sample(key=0, **options):
    """A path through the compiled sampler."""
    sampler = _sampler(**options)
    return jax.jit(lambda: sampler.sample(_velocity, _noise(), jax.random.key(key)))()


@functools.cache
def _sample_ode():
    return jax.jit(lambda: FlowSampler(SIGMAS).final(_velocity, _noise(), None))()


def _taken(path, step):
    """One step of all images, as the update reads it back."""
    return Transition(path.x_t[step], path.x_next[step], SIGMAS[step], SIGMAS[step + 1])


def test_trajectory_is_one_path():
    path = _sample()
    assert path.x_t.shape == path.x_next.shape == (T, N, *SHAPE)
    assert path.logp.shape == (T, N)
    np.testing.assert_array_equal(path.x_t[0], _noise())
    np.testing.assert_array_equal(path.x_t[1:], path.x_next[:-1])
    np.testing.assert_array_equal(path.x_0, path.x_next[-1])


@pytest.mark.parametrize("kernel", ["flow_sde", "dance_sde", "cps"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_scoring_a_stored_step_gives_its_ratio_one(kernel, dtype):
    """Both inside one jit each, as rollout and update are."""
    path = _sample(kernel=kernel, dtype=dtype)
    assert path.x_t.dtype == path.x_next.dtype == dtype
    assert path.logp.dtype == path.x_0.dtype == jnp.float32
    sampler = _sampler(kernel, dtype=dtype)

    @jax.jit
    def rescore(path):
        taken = Transition(path.x_t, path.x_next, jnp.asarray(SIGMAS[:-1]), jnp.asarray(SIGMAS[1:]))
        return jax.lax.map(lambda step: sampler.log_prob(_velocity, step).logp, taken)

    logp = rescore(path)
    assert float(jnp.abs(path.logp[: T - 1]).min()) > 0
    # A tenth of the finest clip range in use (1e-5).
    np.testing.assert_allclose(jnp.exp(logp - path.logp)[: T - 1], 1.0, atol=1e-6)


def test_log_prob_is_of_the_rounded_state():
    """In bfloat16 the log-prob of the unrounded state is off by more than the clip range."""
    path = _sample(dtype=jnp.bfloat16)
    step = T - 2
    mean, std = transition.flow_sde(
        path.x_t[step],
        _velocity(path.x_t[step], SIGMAS[step]),
        SIGMAS[step],
        SIGMAS[step + 1],
        noise_level=0.7,
        sigma_max=SIGMAS[1],
    )
    rounded = transition.log_prob(path.x_next[step], mean, std)
    np.testing.assert_allclose(path.logp[step], rounded, atol=1e-5)
    noise = jax.random.normal(jax.random.fold_in(jax.random.key(0), step), (N, *SHAPE))
    unrounded = transition.log_prob(mean + std * noise, mean, std)
    assert float(jnp.abs(unrounded - rounded).max()) > 1e-4


def test_log_prob_takes_a_sigma_per_image():
    path = _sample()
    steps, batch = np.array([0, 2, 5, 8]), np.arange(N)
    states = path.x_t[steps, batch], path.x_next[steps, batch]
    taken = Transition(*states, SIGMAS[steps], SIGMAS[steps + 1])
    logp, mean, std = _sampler().log_prob(_velocity, taken)
    np.testing.assert_allclose(logp, path.logp[steps, batch], atol=1e-5)
    assert mean.shape == (N, *SHAPE) and std.shape == (N, 1, 1, 1)


def test_log_prob_has_the_gradient_of_the_density():
    taken = _taken(_sample(), 4)

    def logp(params):
        velocity = functools.partial(_velocity, params=params)
        return _sampler().log_prob(velocity, taken).logp.sum()

    logp = jax.jit(logp)
    gradient = jax.jit(jax.grad(logp))(PARAMS)["b"][0]
    h = 1e-2
    shifted = [logp({**PARAMS, "b": PARAMS["b"].at[0].add(e)}) for e in (h, -h)]
    np.testing.assert_allclose(gradient, (shifted[0] - shifted[1]) / (2 * h), rtol=2e-2)
    assert abs(float(gradient)) > 1e-2


@pytest.mark.parametrize("kernel", ["flow_sde", "dance_sde", "cps"])
def test_a_sampled_step_has_the_kernels_mean_and_std(kernel):
    many = 4000
    x_1 = jnp.broadcast_to(_noise(1), (many, *SHAPE))
    conditioning = _conditioning(1)  # broadcasts over the images
    velocity = functools.partial(_model, PARAMS, conditioning=conditioning)
    sampler = FlowSampler(SIGMAS[:2], kernel, 0.7, (True,))
    path = jax.jit(lambda: sampler.sample(velocity, x_1, jax.random.key(3)))()
    mean, std = transition.get_kernel(kernel)(
        x_1[:1], velocity(x_1[:1], 1.0), 1.0, SIGMAS[1], noise_level=0.7, sigma_max=SIGMAS[1]
    )
    samples = np.asarray(path.x_0, np.float64)
    error = 5 * float(std) / np.sqrt(many)
    np.testing.assert_allclose(samples.mean(0), mean[0], atol=error)
    np.testing.assert_allclose(samples.std(0), float(std), rtol=5 / np.sqrt(2 * many))
    # Minus the entropy is the mean log-density.
    np.testing.assert_allclose(
        -path.logp.mean(), transition.policy_entropy(std), atol=5 / np.sqrt(2 * many * 32)
    )


def test_ode_steps_have_no_density_and_no_noise():
    window = stochastic_steps(T, (2, 4))
    path, other = (jax.tree.map(np.asarray, _sample(stochastic=window, key=key)) for key in (0, 1))
    noisy = np.asarray(window)
    assert np.all(np.asarray(path.logp)[~noisy] == 0)
    assert np.all(np.asarray(path.logp)[noisy] != 0)
    np.testing.assert_array_equal(path.x_t[:3], other.x_t[:3])
    assert np.abs(path.x_t[3] - other.x_t[3]).min() > 0


@pytest.mark.parametrize("kernel", ["flow_sde", "dance_sde"])
def test_zero_noise_is_the_ode(kernel):
    # Step by step it is so to the last bit (test_transition); two compiled programs may round
    # their sums in another order.
    path = _sample(kernel=kernel, noise_level=0.0)
    np.testing.assert_allclose(path.x_0, _sample_ode(), atol=1e-6)
    np.testing.assert_array_equal(path.logp, 0.0)


def test_cps_last_step_has_no_noise_and_a_finite_score():
    path = _sample(kernel="cps", stochastic=(True,) * T)
    assert np.all(np.isfinite(path.logp))
    np.testing.assert_array_equal(path.logp[-1], 0.0)


def test_ode_is_diffusers_euler_sampler():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(T)
    x = torch.tensor(np.asarray(_noise()))
    for timestep in scheduler.timesteps:
        velocity = _velocity(jnp.asarray(x.numpy()), float(timestep) / 1000)
        x = scheduler.step(torch.tensor(np.asarray(velocity)), timestep, x).prev_sample
    np.testing.assert_allclose(_sample_ode(), x.numpy(), atol=5e-6)


def test_final_is_the_end_of_the_trajectory():
    x_0 = _sampler().final(_velocity, _noise(), jax.random.key(0))
    np.testing.assert_allclose(x_0, _sample().x_0, atol=1e-6)


def test_trained_steps_and_their_std():
    """They are what the schedule says, and what `log_prob` gives."""
    sampler = _sampler(stochastic=stochastic_steps(T, (2, 4)))
    assert (sampler.num_steps, list(sampler.trained_steps)) == (T, [2, 3])
    path = _sample(stochastic=stochastic_steps(T, (2, 4)))
    for step, std in zip(sampler.trained_steps, sampler.step_std(), strict=True):
        found = sampler.log_prob(_velocity, _taken(path, step)).std
        np.testing.assert_allclose(found, std, rtol=1e-6)
    ode = FlowSampler(SIGMAS)
    assert len(ode.trained_steps) == len(ode.step_std()) == 0


@pytest.mark.parametrize("iteration", [0, 1, 3, 6])
def test_a_window_that_has_moved_is_the_window_there(iteration):
    """One program for all places, and the numbers of a sampler that has its window there."""
    first = _sampler(stochastic=stochastic_steps(T, (1, 3)))
    moving = dataclasses.replace(first, motion=Motion(6, FORWARD))
    assert list(moving.reached_steps) == [1, 2, 3, 4, 5, 6, 7]

    @jax.jit
    def sample(iteration, key):
        sampler = moving.at(iteration, key)
        path = sampler.sample(_velocity, _noise(), jax.random.key(0))
        return path, sampler.trained_steps, sampler.step_std()

    path, steps, std = sample(iteration, jax.random.key(7))
    start = 1 + iteration % 6
    there = _sampler(stochastic=stochastic_steps(T, (start, start + 2)))
    expected = jax.jit(lambda: there.sample(_velocity, _noise(), jax.random.key(0)))()
    assert list(steps) == list(there.trained_steps) == [start, start + 1]
    np.testing.assert_allclose(std, there.step_std(), rtol=1e-6)
    np.testing.assert_allclose(path.x_0, expected.x_0, atol=1e-6)
    np.testing.assert_allclose(path.logp, expected.logp, atol=1e-6)
    np.testing.assert_array_equal(path.logp != 0, expected.logp != 0)


def test_a_window_that_stays_is_not_replaced():
    sampler = _sampler()
    assert sampler.at(jnp.int32(3), jax.random.key(0)) is sampler
    assert list(sampler.reached_steps) == list(sampler.trained_steps)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_predictions_are_kept_where_asked_for(dtype):
    """x_0_hat = x_t - sigma v, float32, of the state as it is stored."""
    sample = functools.partial(_sampler(dtype=dtype).sample, keep_predictions=True)
    kept = jax.jit(lambda: sample(_velocity, _noise(), jax.random.key(0)))()
    plain = _sample(dtype=dtype)
    assert plain.x_0_hat is None
    assert kept.x_0_hat.shape == (T, N, *SHAPE) and kept.x_0_hat.dtype == jnp.float32
    for t in range(T):
        velocity = _velocity(kept.x_t[t], SIGMAS[t])
        expected = kept.x_t[t].astype(jnp.float32) - SIGMAS[t] * velocity
        # Two compilations of one formula, on numbers of size 1.
        np.testing.assert_allclose(kept.x_0_hat[t], expected, atol=1e-5)
    # The last step follows the ODE to sigma = 0: it goes where it says, rounded to the storage.
    end = kept.x_0_hat[-1].astype(dtype).astype(jnp.float32)
    np.testing.assert_allclose(kept.x_0, end, atol=1e-5)
    if dtype == jnp.float32:
        # Keeping them moves nothing; ten steps may each round differently in another graph.
        np.testing.assert_allclose(kept.x_0, plain.x_0, atol=1e-5)


def test_noise_is_a_function_of_the_key_and_independent_per_image_and_step():
    path, other = _sample(), _sample(key=1)
    again = _sample.__wrapped__()
    np.testing.assert_array_equal(path.x_0, again.x_0)
    assert float(jnp.abs(path.x_0 - other.x_0).max()) > 0.1

    many = 64
    sampler, x_1 = _sampler("cps", (True,) * T, noise_level=1.0), jnp.zeros((many, *SHAPE))
    still = lambda x_t, sigma: jnp.zeros_like(x_t)  # noqa: E731
    zero = jax.jit(lambda: sampler.sample(still, x_1, jax.random.key(0)))()
    zero = jax.tree.map(np.asarray, zero)
    # cps at noise level 1 forgets the old noise: x_next / sigma_next is the fresh draw, up to
    # the clean image it still sees, which is (1 - sigma_next) of the last state.
    fresh = zero.x_next[:-1] - (1 - SIGMAS[1:-1])[:, None, None, None, None] * zero.x_t[:-1]
    draws = np.asarray(fresh).reshape((T - 1) * many, -1) / np.repeat(SIGMAS[1:-1], many)[:, None]
    correlation = np.corrcoef(draws)[~np.eye(len(draws), dtype=bool)]
    np.testing.assert_allclose(correlation.std(), 1 / np.sqrt(draws.shape[1] - 1), rtol=0.05)
    assert np.abs(correlation).max() < 0.95


def test_guidance_is_extrapolation_from_the_negative():
    calls = []

    def counted(params, x_t, sigma, conditioning):
        calls.append(x_t.shape)
        return _model(params, x_t, sigma, conditioning)

    x, positive, negative = _noise(), _conditioning(), _conditioning(1, seed=9)
    whole = jax.tree.map(lambda a: jnp.repeat(a, N, 0), negative)
    for sigma in (jnp.float32(0.4), jnp.asarray([0.1, 0.4, 0.7, 1.0])):
        v_pos = _model(PARAMS, x, sigma, positive)
        v_neg = _model(PARAMS, x, sigma, whole)
        for form in (negative, whole, jax.tree.map(lambda a: a[0], negative)):
            calls.clear()
            v = guided(counted, 4.5, form)(PARAMS, x, sigma, positive)
            np.testing.assert_allclose(v, v_neg + 4.5 * (v_pos - v_neg), atol=1e-5)
            assert calls == [(2 * N, *SHAPE)]


@pytest.mark.parametrize("absent", ["pooled", "mask"])
def test_guidance_carries_the_fields_that_a_conditioning_has(absent):
    """Interleaved with those of the negative: negative first, then the image's own."""
    fields = {"pooled": jnp.ones((N, 5)), "mask": jnp.ones((N, 3), bool)}
    del fields[absent]
    positive = Conditioning(tokens=jnp.ones((N, 3, 2)), **fields)
    negative = jax.tree.map(lambda a: jnp.zeros_like(a[:1]), positive)
    seen = []

    def velocity(params, x_t, sigma, conditioning):
        seen.append(conditioning)
        return x_t

    guided(velocity, 2.0, negative)(None, _noise(), jnp.float32(0.5), positive)
    assert getattr(seen[0], absent) is None
    for name in ("tokens", *fields):
        given, doubled = getattr(positive, name), getattr(seen[0], name)
        assert doubled.dtype == given.dtype and doubled.shape == (2 * N, *given.shape[1:])
        assert not doubled[::2].any() and (doubled[1::2] == 1).all()


def test_guidance_of_one_is_the_model_itself():
    assert guided(_model, 1.0, None) is _model
    with pytest.raises(ValueError, match="negative"):
        guided(_model, 4.5, None)


def test_steps_and_sigmas_must_agree():
    with pytest.raises(ValueError, match="3 steps"):
        _sampler(stochastic=(True, True, False))


def test_an_unknown_kernel_is_answered_with_the_known_ones():
    with pytest.raises(ValueError, match=r"'flow_sd'.*flow_sde"):
        _sampler("flow_sd")


def test_cps_has_a_step_that_drowns_the_others_on_sd3s_schedule():
    """The step to the last but one sigma; not of the other kernels, nor by the squared error."""
    uneven = {}
    for kernel in ("flow_sde", "dance_sde", "cps"):
        sampler = FlowSampler(sd3_sigmas(10), kernel, 0.7, (True,) * 9 + (False,))
        uneven[kernel] = sampler.uneven_gain()
    assert uneven["cps"] == pytest.approx(131.7, rel=0.01)
    assert uneven["flow_sde"] < 6 and uneven["dance_sde"] < 3
    early = FlowSampler(sd3_sigmas(10), "cps", 0.7, (True, True) + (False,) * 8)
    assert early.uneven_gain() < 2
    late = FlowSampler(sd3_sigmas(10), "cps", 0.7, (False,) * 7 + (True, True, False))
    assert late.uneven_gain() > 30  # of two, one drowns the other
    assert dataclasses.replace(sampler, log_density="squared_error").uneven_gain() < 2
