import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pec_jax.data.prompts import Prompt
from pec_jax.rewards import base
from pec_jax.rewards.base import Reward, as_8bit, combine, make, register


@pytest.fixture
def two_rewards(monkeypatch):
    """A registry of two: the mean of a channel times a parameter, and a number per prompt."""
    monkeypatch.setattr(base, "REGISTRY", {})

    @register("red")
    def red(options):
        base.reject_unknown_options("red", options, ("gain",))
        return Reward(
            "red",
            lambda prompts: {},
            lambda params, images, inputs: params["gain"] * images[..., 0].mean((-2, -1)),
            {"gain": jnp.float32(options.get("gain", 1.0))},
        )

    @register("length")
    def length(options):
        return Reward(
            "length",
            lambda prompts: np.array([len(p.text) for p in prompts]),
            lambda params, images, inputs: jnp.repeat(inputs[:, None], images.shape[1], 1),
        )


IMAGES = jax.random.uniform(jax.random.key(0), (2, 3, 4, 4, 3))
PROMPTS = [Prompt("a"), Prompt("four")]


def test_weighted_sum(two_rewards):
    reward = combine({"red": 2.0, "length": -0.5}, {"red": {"gain": 3.0}})
    inputs = reward.prepare(PROMPTS)
    total, parts = jax.jit(reward.score)(reward.params, IMAGES, inputs)
    red = 3.0 * np.asarray(IMAGES)[..., 0].mean((-2, -1))
    length = np.array([[1.0] * 3, [4.0] * 3])
    np.testing.assert_allclose(parts["red"], red, rtol=1e-6)
    np.testing.assert_array_equal(parts["length"], length)
    np.testing.assert_allclose(total, 2 * red - 0.5 * length, rtol=1e-6)
    assert total.dtype == parts["length"].dtype == jnp.float32


def test_parameters_are_arguments_not_constants(two_rewards):
    reward = combine({"red": 1.0})
    score = jax.jit(reward.score)
    once, _ = score({"red": {"gain": jnp.float32(1.0)}}, IMAGES, {"red": {}})
    twice, _ = score({"red": {"gain": jnp.float32(2.0)}}, IMAGES, {"red": {}})
    np.testing.assert_allclose(twice, 2 * once, rtol=1e-6)


def test_weight_zero_only_logs(two_rewards):
    reward = combine({"red": 0.0, "length": 1.0})
    total, parts = reward.score(reward.params, IMAGES * jnp.nan, reward.prepare(PROMPTS))
    assert np.isnan(parts["red"]).all() and np.isfinite(total).all()


def test_unknown_names_are_answered_with_the_valid_ones(two_rewards):
    with pytest.raises(ValueError, match=r"Unknown reward 'blue'. Valid names: length, red\."):
        combine({"blue": 1.0})
    with pytest.raises(ValueError, match="Valid options: gain"):
        make("red", {"gian": 2.0})


@pytest.mark.parametrize(
    ("weights", "options", "message"),
    [
        ({}, None, "at least one reward, of length, red"),
        ({"red": float("nan")}, None, "'red' must be finite"),
        ({"red": 0.0}, None, "All reward weights are 0"),
        ({"red": 1.0}, {"length": {}}, "not used: length"),
    ],
)
def test_senseless_sums_are_refused(two_rewards, weights, options, message):
    with pytest.raises(ValueError, match=message):
        combine(weights, options)


def test_a_name_is_taken_once(two_rewards):
    with pytest.raises(ValueError, match=r"'red' is already taken by .*two_rewards"):
        register("red")(make)
    again = base.REGISTRY["red"]
    assert register("red")(again) is again  # a notebook cell that is run twice


def test_wrong_shape_names_the_reward(two_rewards):
    register("bad")(lambda options: Reward("bad", lambda p: {}, lambda *_: jnp.zeros(2)))
    with pytest.raises(ValueError, match=r"'bad' returned an array of shape \(2,\)"):
        reward = combine({"bad": 1.0})
        reward.score(reward.params, IMAGES, reward.prepare(PROMPTS))


def test_the_documented_example_runs(monkeypatch):
    monkeypatch.setattr(base, "REGISTRY", dict(base.REGISTRY))
    example = base.__doc__.split("```python\n")[1].split("```")[0]
    exec(example, {"__name__": "warmth"})
    reward = combine({"warmth": 1.0})
    warm = jnp.zeros((1, 2, 4, 4, 3)).at[0, 1, ..., 0].set(0.5)
    total, _ = reward.score(reward.params, warm, reward.prepare([Prompt("any")]))
    np.testing.assert_allclose(total, [[0.0, 0.5]])


def test_8bit_levels_are_those_of_a_saved_png():
    images = jnp.linspace(-0.1, 1.1, 10_001)
    expected = np.round(np.clip(np.asarray(images), 0, 1) * 255).astype(np.uint8)
    np.testing.assert_array_equal(np.round(np.asarray(as_8bit(images)) * 255), expected)
    np.testing.assert_array_equal(as_8bit(as_8bit(images)), as_8bit(images))
