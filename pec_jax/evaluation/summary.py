"""From the scores and features of images to the numbers that are published of them.

| name | definition, mean over prompts |
|---|---|
| `quality/<reward>` | mean of the reward over a prompt's images |
| `diversity/pairwise_l2_<encoder>` | mean Euclidean distance of two images' raw features |
| `diversity/pairwise_cos_<encoder>` | mean of 1 - cosine of two images' features |
| `diversity/vendi_<encoder>` | Vendi score, cosine kernel: from 1 to the number of images |
| `diversity/variance_<encoder>` | mean squared distance of unit features to their mean |

All are taken within a prompt. Vendi scores and the spread of a few images depend on how many there
are: compare numbers of as many images per prompt.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from pec_jax.evaluation import metrics


def summarise(
    scores: Mapping[str, np.ndarray],
    features: Mapping[str, np.ndarray],
    diversities: Mapping[str, np.ndarray],
) -> dict[str, float]:
    """Numbers of as many images of each prompt.

    Args:
        scores: reward to [P, N]; nan for an image that it could not judge.
        features: encoder to raw features [P, N, d].
        diversities: reward to [P]; nan for a prompt of which it can say nothing.

    Returns:
        As `intervals`, with `failures/<reward>` where a reward could not judge some, and
        `count/prompts` and `count/images_per_prompt`.
    """
    result = intervals(per_prompt(scores, features, diversities)) | failures(scores)
    first = next(iter([*scores.values(), *features.values()]))
    result["count/prompts"], result["count/images_per_prompt"] = first.shape[:2]
    return result


def intervals(numbers: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Means over prompts, and `<name>/low` and `<name>/high`, their 95% bootstrap interval.

    Args:
        numbers: name to [P]; nan where there is none. What no prompt has is left out.
    """
    result: dict[str, float] = {}
    for name, values in numbers.items():
        known = values[np.isfinite(values)]
        if known.size:
            interval = metrics.bootstrap_interval(known, seed=0)
            low, high = float(interval.low), float(interval.high)
            result |= {name: float(known.mean()), f"{name}/low": low, f"{name}/high": high}
    return result


def failures(scores: Mapping[str, np.ndarray]) -> dict[str, float]:
    """`failures/<reward>`: the share of the images that it could not judge, where there are any."""
    shares = {name: float(np.mean(~np.isfinite(values))) for name, values in scores.items()}
    return {f"failures/{name}": share for name, share in shares.items() if share}


def per_prompt(
    scores: Mapping[str, np.ndarray],
    features: Mapping[str, np.ndarray],
    diversities: Mapping[str, np.ndarray],
) -> dict[str, np.ndarray]:
    """Each number of each prompt [P]; arguments as of `summarise`.

    An image whose features are not finite leaves its prompt without that encoder's numbers: nan.
    """
    found = {f"quality/{name}": _mean_of_known(value) for name, value in scores.items()}
    found |= {f"diversity/{name}": value for name, value in diversities.items()}
    for name, value in features.items():
        whole = np.isfinite(value).all(axis=(1, 2))
        filled = np.where(whole[:, None, None], value, 0.0)
        measured = {
            f"diversity/pairwise_l2_{name}": metrics.mean_pairwise_distance(filled),
            f"diversity/pairwise_cos_{name}": metrics.mean_pairwise_distance(filled, "cosine"),
            f"diversity/vendi_{name}": metrics.vendi_score(filled),
            f"diversity/variance_{name}": metrics.unit_variance(filled),
        }
        found |= {key: np.where(whole, numbers, np.nan) for key, numbers in measured.items()}
    return found


def _mean_of_known(values: np.ndarray) -> np.ndarray:
    """Mean [P] over the images [P, N] that could be judged; nan where none could."""
    known = np.isfinite(values)
    total = np.where(known, values, 0.0).sum(axis=1)
    return np.where(known.any(axis=1), total / np.maximum(known.sum(axis=1), 1), np.nan)
