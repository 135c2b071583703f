"""DiffusionNFT's pieces: against torch, on policy, and the old policy's schedule."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from pec_jax.rl import nft

SHAPES = [(6, 4, 4, 2), (6, 5, 8), (6, 2, 3, 3, 2)]
CLIP = 5.0


def _case(shape, seed=0, drift=0.2):
    rng = np.random.default_rng(seed)
    x_0, noise, v_old, change, v_ref = (rng.normal(size=shape).astype(np.float32) for _ in range(5))
    sigma = rng.uniform(0.05, 1.0, size=shape[0]).astype(np.float32)
    advantages = (3 * rng.normal(size=shape[0])).astype(np.float32)
    case = x_0, noise, sigma, v_old + np.float32(drift) * change, v_old, v_ref, advantages
    return tuple(map(jnp.asarray, case))


def _loss(velocity, case, beta, kl_weight):
    x_0, noise, sigma, _, v_old, v_ref, advantages = case
    target = nft.forward_process(x_0, noise, sigma).target
    r = nft.optimality(advantages, CLIP)
    losses = nft.losses(velocity, v_old, target, sigma, r, beta=beta, clip=CLIP)
    return jnp.mean(losses + kl_weight * nft.velocity_kl(velocity, v_ref)), losses


def _torch_loss(velocity, case, beta, kl_weight):
    """The authors' loss in float64: predictions of x_0 from x_t, not errors of velocities."""
    x_0, noise, sigma, _, v_old, v_ref, advantages = (
        torch.tensor(np.asarray(a), dtype=torch.float64) for a in case
    )
    t = sigma.view(-1, *[1] * (x_0.ndim - 1))
    dims = tuple(range(1, x_0.ndim))
    x_t = (1 - t) * x_0 + t * noise
    r = torch.clamp(torch.clamp(advantages, -CLIP, CLIP) / CLIP / 2 + 0.5, 0, 1)

    def regression(v):
        prediction = x_t - t * v
        with torch.no_grad():
            size = (prediction - x_0).abs().mean(dims, keepdim=True).clip(min=1e-5)
        return ((prediction - x_0) ** 2 / size).mean(dims)

    positive = regression(beta * velocity + (1 - beta) * v_old)
    negative = regression((1 + beta) * v_old - beta * velocity)
    losses = CLIP * (r * positive / beta + (1 - r) * negative / beta)
    kl = ((velocity - v_ref) ** 2).mean(dims)
    return (losses + kl_weight * kl).mean(), losses


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("beta", [1.0, 0.1])
@pytest.mark.parametrize("kl_weight", [0.0, 1e-4, 1.0])
def test_loss_and_gradient_are_the_authors(shape, beta, kl_weight):
    case = _case(shape)
    (loss, losses), gradient = jax.value_and_grad(_loss, has_aux=True)(
        case[3], case, beta, kl_weight
    )
    velocity = torch.tensor(case[3], dtype=torch.float64, requires_grad=True)
    expected, expected_losses = _torch_loss(velocity, case, beta, kl_weight)
    expected.backward()
    assert losses.shape == (shape[0],) and losses.dtype == jnp.float32
    np.testing.assert_allclose(losses, expected_losses.detach(), rtol=1e-5)
    np.testing.assert_allclose(loss, expected.detach(), rtol=1e-5)
    np.testing.assert_allclose(gradient, velocity.grad, rtol=1e-5, atol=1e-7)


def test_one_sigma_for_all_is_that_sigma_for_each():
    case = _case(SHAPES[0])
    one = (*case[:2], np.float32(0.4), *case[3:])
    each = (*case[:2], np.full(6, 0.4, np.float32), *case[3:])
    np.testing.assert_array_equal(
        _loss(case[3], one, 0.5, 0.1)[1], _loss(case[3], each, 0.5, 0.1)[1]
    )


def test_optimality_golden():
    advantages = jnp.asarray([-9.0, -5.0, -1.0, 0.0, 2.5, 5.0, 9.0])
    np.testing.assert_allclose(
        nft.optimality(advantages, CLIP), [0, 0, 0.4, 0.5, 0.75, 1, 1], rtol=1e-6
    )
    assert not jnp.any(jax.grad(lambda a: jnp.sum(nft.optimality(a, CLIP)))(advantages))


def test_forward_process_ends_in_the_image_and_the_noise():
    x_0, noise, *_ = _case(SHAPES[1])
    np.testing.assert_array_equal(nft.forward_process(x_0, noise, 0.0).x_t, x_0)
    np.testing.assert_array_equal(nft.forward_process(x_0, noise, 1.0).x_t, noise)
    noised = nft.forward_process(x_0, noise, 0.3)
    np.testing.assert_allclose(noised.x_t - 0.3 * noised.target, x_0, atol=1e-6)
    np.testing.assert_allclose(noised.x_t + 0.7 * noised.target, noise, atol=1e-6)


def test_implicit_velocities_mirror_each_other_in_the_old_policy():
    _, _, _, velocity, v_old, *_ = _case(SHAPES[0])
    positive, negative = nft.implicit_velocities(velocity, v_old, 0.3)
    np.testing.assert_allclose((positive + negative) / 2, v_old, atol=1e-6)
    np.testing.assert_allclose(positive - negative, 0.6 * (velocity - v_old), atol=1e-6)
    np.testing.assert_allclose(
        nft.implicit_velocities(velocity, v_old, 1.0)[0], velocity, atol=1e-6
    )


@pytest.mark.parametrize("beta", [1.0, 0.1])
def test_on_policy_the_value_is_blind_to_r_and_the_gradient_is_the_advantage(beta):
    x_0, noise, sigma, _, v_old, _, advantages = _case(SHAPES[0])
    target = nft.forward_process(x_0, noise, sigma).target
    advantages = jnp.asarray([-4.0, -1.0, 0.0, 0.5, 2.0, 7.0])

    def losses(v, a):
        r = nft.optimality(a, CLIP)
        return nft.losses(v, v_old, target, sigma, r, beta=beta, clip=CLIP)

    plain = nft.x_0_loss(v_old, target, sigma)
    for a in (advantages, advantages[::-1]):
        np.testing.assert_allclose(losses(v_old, a), CLIP / beta * plain, rtol=1e-6)
    gradient = jax.grad(lambda v: jnp.sum(losses(v, advantages)))(v_old)
    regression = jax.grad(lambda v: jnp.sum(nft.x_0_loss(v, target, sigma)))(v_old)
    weight = jnp.clip(advantages, -CLIP, CLIP)[:, None, None, None]
    np.testing.assert_allclose(gradient, weight * regression, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(gradient[2], 0.0, atol=1e-7)  # r = 1/2
    assert float(jnp.abs(gradient).max()) > 1e-3


def test_a_step_against_the_gradient_brings_good_images_nearer_and_bad_ones_further():
    x_0, noise, sigma, _, v_old, *_ = _case(SHAPES[0])
    target = nft.forward_process(x_0, noise, sigma).target
    r = jnp.asarray([1.0, 1.0, 1.0, 0.0, 0.0, 0.0])
    gradient = jax.grad(
        lambda v: jnp.sum(nft.losses(v, v_old, target, sigma, r, beta=1.0, clip=1.0))
    )(v_old)
    change = nft.x_0_loss(v_old - 0.1 * gradient, target, sigma) - nft.x_0_loss(
        v_old, target, sigma
    )
    assert np.all(change[:3] < 0) and np.all(change[3:] > 0)


def test_only_the_models_velocity_carries_a_gradient():
    x_0, noise, sigma, velocity, v_old, v_ref, advantages = _case(SHAPES[0])
    target = nft.forward_process(x_0, noise, sigma).target
    r = nft.optimality(advantages, CLIP)

    def loss(velocity, v_old, v_ref, r):
        losses = nft.losses(velocity, v_old, target, sigma, r, beta=0.5, clip=CLIP)
        return jnp.sum(losses + nft.velocity_kl(velocity, v_ref))

    gradients = jax.grad(loss, argnums=(0, 1, 2, 3))(velocity, v_old, v_ref, r)
    assert [bool(jnp.any(g != 0)) for g in gradients] == [True, False, False, False]


def test_x_0_loss_grows_linearly_and_is_finite_at_no_error():
    """Self-normalised: an error twice as large counts twice, not four times."""
    x_0, noise, sigma, velocity, *_ = _case(SHAPES[0])
    target = nft.forward_process(x_0, noise, sigma).target
    once = nft.x_0_loss(target + velocity, target, sigma)
    np.testing.assert_allclose(
        nft.x_0_loss(target + 2 * velocity, target, sigma), 2 * once, rtol=1e-5
    )
    value, gradient = jax.value_and_grad(lambda v: jnp.sum(nft.x_0_loss(v, target, sigma)))(target)
    assert float(value) == 0.0 and not np.any(gradient)
    tiny = nft.x_0_loss(target * (1 + 1e-6), target, sigma)
    error = sigma.reshape(-1, 1, 1, 1) * (np.float32(1 + 1e-6) * target - target)
    np.testing.assert_allclose(tiny, np.mean(np.square(error), axis=(1, 2, 3)) / 1e-5, rtol=0.2)


def test_velocity_kl_is_a_mean_square():
    _, _, _, velocity, _, v_ref, _ = _case(SHAPES[2])
    expected = np.mean((velocity.astype(np.float64) - v_ref) ** 2, axis=(1, 2, 3, 4))
    np.testing.assert_allclose(nft.velocity_kl(velocity, v_ref), expected, rtol=1e-6)


def test_each_image_is_trained_at_distinct_levels_of_the_sampler_and_by_its_own_key():
    sigmas = np.linspace(1.0, 0.0, 11, dtype=np.float32)
    keys = jax.random.split(jax.random.key(0), 500)
    drawn = np.asarray(nft.draw_sigmas(keys, sigmas, 9))
    assert drawn.shape == (9, 500)
    assert all(len(set(column)) == 9 for column in drawn.T)
    assert set(drawn.ravel()) == set(sigmas[:-1])
    # Each level is the one left out of 50 images; the count's standard deviation is 6.7.
    missing = [500 - np.sum(drawn == s) for s in sigmas[:-1]]
    assert max(abs(m - 50) for m in missing) < 30
    np.testing.assert_array_equal(nft.draw_sigmas(keys[7:9], sigmas, 9), drawn[:, 7:9])
    for wrong in (0, 11):
        with pytest.raises(ValueError, match="choose 1 to 10"):
            nft.draw_sigmas(keys, sigmas, wrong)


@pytest.mark.parametrize(
    ("schedule", "golden"),
    [
        ("on_policy", {0: 0, 1: 0, 10_000: 0}),
        ("ramp", {0: 0, 1: 0.001, 250: 0.25, 500: 0.5, 501: 0.5, 10_000: 0.5}),
        ("delayed_ramp", {0: 0, 75: 0, 76: 0.0075, 175: 0.75, 208: 0.9975, 209: 0.999}),
    ],
)
def test_decay_of_the_old_policy(schedule, golden):
    decay = jax.jit(lambda n: nft.old_policy_decay(schedule, n))
    for updates, expected in golden.items():
        np.testing.assert_allclose(decay(updates), expected, rtol=1e-6)


def test_an_unknown_decay_is_refused():
    with pytest.raises(ValueError, match="on_policy, ramp, delayed_ramp"):
        nft.old_policy_decay("cosine", 0)


def test_the_old_policy_follows():
    old = {"a": jnp.asarray([1.0, 2.0]), "b": jnp.ones(2, jnp.bfloat16)}
    params = {"a": jnp.asarray([3.0, 6.0]), "b": jnp.zeros(2, jnp.bfloat16)}
    moved = nft.follow(old, params, jnp.float32(0.25))
    np.testing.assert_allclose(moved["a"], [2.5, 5.0])
    assert moved["b"].dtype == jnp.bfloat16
    jax.tree.map(np.testing.assert_array_equal, nft.follow(old, params, 0.0), params)
