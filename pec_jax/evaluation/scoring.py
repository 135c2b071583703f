"""Scores of images that are already there: any model's, with any rewards and perceptual spaces."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from pec_jax import io
from pec_jax.config.registry import ENCODERS, REWARDS
from pec_jax.data.prompts import Prompt
from pec_jax.errors import RunError
from pec_jax.evaluation.image_sets import ImageSet, image_size, read_images
from pec_jax.evaluation.judge_specs import Spec
from pec_jax.perception.networks import Networks
from pec_jax.perception.preprocessing import to_uint8_levels
from pec_jax.rewards.base import Reward
from pec_jax.rewards.combined import variables_of
from pec_jax.types import Array, PyTree

FINISHED, PLAN = "parts", "plan.json"


@dataclasses.dataclass(frozen=True)
class Judges:
    """Who measures.

    Attributes:
        rewards: label -> reward.
        spaces: label -> (key of its variables, (variables, images) -> features).
        networks: that hold the variables.
    """

    rewards: Mapping[str, Reward]
    spaces: Mapping[str, tuple[str, Any]]
    networks: Networks


@dataclasses.dataclass(frozen=True)
class Scores:
    """Of every image, in the order of its set.

    Attributes:
        rewards: label -> [N] fp32; nan where the image could not be judged.
        features: label -> raw features [N, d].
        diversities: name -> [P], of each prompt, of rewards that see whole groups.
    """

    rewards: dict[str, np.ndarray]
    features: dict[str, np.ndarray]
    diversities: dict[str, np.ndarray]


def load_judges(rewards: Sequence[Spec], spaces: Sequence[Spec], networks: Networks) -> Judges:
    """Loads what the specs name.

    Raises:
        ValueError: as the definitions say.
    """
    made = {spec.label: REWARDS[spec.name].make(spec.options, networks) for spec in rewards}
    encoders = {spec.label: ENCODERS[spec.name].make(spec.options, networks) for spec in spaces}
    return Judges(
        made, {label: (e.network, e.image_features) for label, e in encoders.items()}, networks
    )


def score_images(
    image_set: ImageSet, judges: Judges, batch_size: int, out: Path, plan: Mapping[str, Any]
) -> Scores:
    """Measures all images, some at a time; what is done is kept, and not done again.

    Args:
        image_set: what to measure.
        judges: who measures.
        batch_size: images at a time.
        out: directory for what is done.
        plan: what this is about, as JSON.

    Raises:
        RunError: `out` holds a part of something else.
    """
    keep = _Finished(out / FINISHED, plan)
    prompts = _distinct_prompts(image_set)
    inputs = {
        label: reward.prepare(variables_of(reward, judges.networks.variables), prompts)
        for label, reward in judges.rewards.items()
    }
    measure = jax.jit(_measure_function(judges))
    variables = judges.networks.variables
    parts: list[tuple[list[int], dict[str, np.ndarray]]] = []
    with tqdm(total=len(image_set), desc="scoring", unit="image") as bar:
        for number, batch in enumerate(_batches(image_set, batch_size)):
            found = keep.read(number)
            if found is None:
                padded = (batch * batch_size)[:batch_size] if len(batch) < batch_size else batch
                pixels = jnp.asarray(read_images(image_set, padded), jnp.float32) / 255.0
                rows = np.asarray([image_set.groups[i] for i in padded])
                own = jax.tree.map(lambda a: a[rows], inputs)  # noqa: B023
                measured = jax.device_get(measure(variables, pixels[:, None], own))
                found = {key: np.asarray(value)[: len(batch)] for key, value in measured.items()}
                keep.write(number, found)
            parts.append((batch, found))
            bar.update(len(batch))
    scores = _joined(image_set, judges, parts)
    for label, reward in judges.rewards.items():
        if reward.measure is not None:
            _measure_groups(image_set, reward, (variables, inputs[label]), scores)
    return scores


def finish(out: Path) -> None:
    """Removes what was kept for another start."""
    shutil.rmtree(out / FINISHED, ignore_errors=True)


def _measure_function(judges: Judges):
    """(variables, images [N, 1, H, W, 3], inputs [N, ...]) -> "reward/LABEL" [N], "space/..."."""

    def measure(variables: Mapping[str, PyTree], images: Array, inputs: PyTree) -> dict[str, Array]:
        found = {}
        for label, reward in judges.rewards.items():
            scores = reward.score(variables_of(reward, variables), images, inputs[label])
            found[f"reward/{label}"] = scores[:, 0].astype(jnp.float32)
        flat = to_uint8_levels(images)[:, 0]
        for label, (network, features) in judges.spaces.items():
            found[f"space/{label}"] = features(variables[network] if network else {}, flat)
        return found

    return measure


def _measure_groups(
    image_set: ImageSet,
    reward: Reward,
    known: tuple[Mapping[str, PyTree], PyTree],
    scores: Scores,
) -> None:
    """Adds what a reward measures of whole groups, and its other scores of their images.

    Args:
        image_set: the images.
        reward: with a `measure`.
        known: all variables, and the reward's inputs [P, ...].
        scores: to add to.
    """
    assert reward.measure is not None
    measure, (variables, inputs) = jax.jit(reward.measure), known
    own, groups = variables_of(reward, variables), image_set.members()
    for group, members in enumerate(groups):
        pixels = jnp.asarray(read_images(image_set, members), jnp.float32)[None] / 255.0
        rows = jax.tree.map(lambda a: a[group : group + 1], inputs)  # noqa: B023
        found = jax.device_get(measure(own, pixels, rows))
        for name, value in found.diversities.items():
            scores.diversities.setdefault(name, np.zeros(len(groups)))[group] = value[0]
        for name, value in found.scores.items():
            scores.rewards.setdefault(name, np.zeros(len(image_set)))[members] = value[0]


def _distinct_prompts(image_set: ImageSet) -> list[Prompt]:
    return [image_set.prompts[members[0]] for members in image_set.members()]


def _batches(image_set: ImageSet, batch_size: int) -> Iterator[list[int]]:
    """Numbers of images of one size, in order."""
    by_size: dict[tuple[int, int], list[int]] = {}
    for number in range(len(image_set)):
        by_size.setdefault(image_size(image_set, number), []).append(number)
    for numbers in by_size.values():
        for start in range(0, len(numbers), batch_size):
            yield numbers[start : start + batch_size]


def _joined(
    image_set: ImageSet,
    judges: Judges,
    parts: Sequence[tuple[list[int], dict[str, np.ndarray]]],
) -> Scores:
    order = np.argsort(np.concatenate([batch for batch, _ in parts]))

    def whole(key: str) -> np.ndarray:
        return np.concatenate([found[key] for _, found in parts])[order]

    return Scores(
        {label: whole(f"reward/{label}") for label in judges.rewards},
        {label: whole(f"space/{label}") for label in judges.spaces},
        {},
    )


class _Finished:
    """Batches that are done, one file each."""

    def __init__(self, directory: Path, plan: Mapping[str, Any]):
        self._directory = directory
        digest = hashlib.sha256(json.dumps(plan, sort_keys=True).encode()).hexdigest()
        stored = directory / PLAN
        if stored.is_file() and io.read_json(stored).get("digest") != digest:
            raise RunError(
                f"{directory.parent} holds unfinished scores of other images, prompts or judges: "
                f"give another --out, or delete {directory}."
            )
        io.write_json(stored, {"digest": digest, **plan})

    def read(self, number: int) -> dict[str, np.ndarray] | None:
        """Of a batch; None where it is not done, or its file is damaged."""
        try:
            with np.load(self._file(number), allow_pickle=False) as stored:
                return {key: stored[key] for key in stored.files}
        except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile):
            return None

    def write(self, number: int, found: Mapping[str, np.ndarray]) -> None:
        """Keeps a batch, whole or not at all."""

        def save(temporary: Path) -> None:
            with temporary.open("wb") as file:
                np.savez(file, **found)  # type: ignore[arg-type]

        io.replace_file(self._file(number), save)

    def _file(self, number: int) -> Path:
        return self._directory / f"{number:06d}.npz"
