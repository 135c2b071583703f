"""Which encoders in which shares, and the estimator between features and surprisals."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from pec_jax.config import ConfigError
from pec_jax.config.schema import PerceptionConfig
from pec_jax.perception.entropy import ESTIMATORS, gaussian_surprisal, scale_features
from pec_jax.perception.spaces import estimators, shares, surprisal_function

NO_NOISE = np.zeros(0, np.float32)
STEP_STD = np.array([0.3, 0.4], np.float32)  # of root mean square 0.3536


def config(**changes):
    values = {
        "encoder": "dino",
        "estimator": "logdet",
        "scale": "unit",
        "bandwidth": 0.0,
        "eps": 1e-3,
        "k": 1,
        "at": "final",
    }
    return PerceptionConfig(**(values | changes))


def features(*names):
    rng = np.random.default_rng(0)
    return {name: rng.normal(size=(2, 5, 16)).astype(np.float32) for name in names}


@pytest.mark.parametrize(
    "text, expected",
    [
        ("dino", {"dino": 1.0}),
        ("3*clip", {"clip": 1.0}),
        ("dino + 0.5 * clip", {"dino": 2 / 3, "clip": 1 / 3}),
        (" 1e1*dino+10 *clip + 20* pickscore ", {"dino": 0.25, "clip": 0.25, "pickscore": 0.5}),
    ],
)
def test_shares_sum_to_one(text, expected):
    assert shares(config(encoder=text)) == pytest.approx(expected)


@pytest.mark.parametrize("text", ["dino + dino", "-1 * dino", "", "x * dino", "dino +", "0*dino"])
def test_what_is_no_sum_of_encoders_is_refused(text):
    with pytest.raises(ConfigError, match=r"config\.perception\.encoder is .* a sum of"):
        shares(config(encoder=text))


def test_an_unknown_encoder_is_answered_with_the_known_ones():
    with pytest.raises(ConfigError, match=r"'dimo'\. Did you mean 'dino'\? Valid: clip, dino"):
        shares(config(encoder="clip + dimo"))


def test_a_sum_of_encoders_is_the_weighted_mean_of_their_surprisals():
    given = features("dino", "clip")
    both, dino, clip = (
        surprisal_function(config(encoder=encoder), STEP_STD)(given)
        for encoder in ("dino + 0.5 * clip", "dino", "clip")
    )
    assert both.shape == (2, 5)
    np.testing.assert_allclose(both, (2 * dino + clip) / 3, rtol=1e-5)


def test_estimators_have_the_options_of_the_config():
    f = features("dino")["dino"]
    found = estimators(config(scale="unit_sqrt_d"), STEP_STD)
    assert list(found) == list(ESTIMATORS)
    scaled = scale_features(f, "unit_sqrt_d")
    for name, options in (("logdet", {"eps": 1e-3}), ("knn", {"k": 1})):
        expected = ESTIMATORS[name](scaled, **options)
        np.testing.assert_array_equal(found[name](f), expected, err_msg=name)


@pytest.mark.parametrize("bandwidth, expected", [(0.0, np.sqrt(0.125)), (0.2, 0.2)])
def test_a_bandwidth_of_zero_is_the_policys_own(bandwidth, expected):
    given = features("dino")
    options = config(estimator="gaussian", bandwidth=bandwidth)
    found = jax.jit(surprisal_function(options, STEP_STD))(given)
    by_hand = gaussian_surprisal(scale_features(given["dino"], "unit"), expected)
    np.testing.assert_allclose(found, by_hand, rtol=1e-5, atol=1e-6)  # near 0, terms of 1 cancel


def test_without_noise_a_bandwidth_must_be_given():
    assert "gaussian" not in estimators(config(), NO_NOISE)
    with pytest.raises(ConfigError, match=r"config\.perception\.bandwidth is 0.*give a bandwidth"):
        surprisal_function(config(estimator="gaussian"), NO_NOISE)
    given = config(estimator="gaussian", bandwidth=0.3)
    assert surprisal_function(given, NO_NOISE)(features("dino")).shape == (2, 5)
