"""From a request to the scores of a folder of images."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from absl import logging

from pec_jax.config import ConfigError
from pec_jax.config.registry import ENCODERS, REWARDS
from pec_jax.evaluation import score_tables, scoring
from pec_jax.evaluation.image_sets import ImageSet, read_image_set
from pec_jax.evaluation.judge_specs import Spec, parse_specs
from pec_jax.families.locate import pipeline_directory
from pec_jax.perception.networks import Networks
from pec_jax.rewards.asking import told_by_name
from pec_jax.weights.hub import model_path

NOWHERE = Path("no-pipeline")


@dataclasses.dataclass(frozen=True)
class Request:
    """What to score; the fields are the flags of `pec_jax.score`."""

    images: Path
    prompts: Path | None
    rewards: tuple[str, ...] = ()
    spaces: tuple[str, ...] = ()
    pipeline: str | None = None
    dtype: str = "float32"
    resize: str = "pil"
    batch_size: int = 16


def run(request: Request, out: Path) -> dict[str, float]:
    """Measures the images and writes the tables into `out`.

    Returns:
        The summary, as in summary.csv.

    Raises:
        ConfigError: nothing to measure, an unknown judge, or one without a model.
        PromptError: images or prompts that cannot be used.
        RunError: `out` holds unfinished scores of something else.
        ValueError: as the loaders say.
    """
    rewards = parse_specs(request.rewards, REWARDS, "--reward")
    spaces = parse_specs(request.spaces, ENCODERS, "--space")
    if not rewards and not spaces:
        raise ConfigError("Nothing to measure: give --reward, --space, or several of them.")
    if request.pipeline is None:
        _check_models("--reward", rewards)
        _check_models("--space", spaces)
    image_set = read_image_set(request.images, request.prompts)
    root = pipeline_directory(request.pipeline) if request.pipeline else NOWHERE
    networks = Networks(
        own=root / "encoders",
        locate=model_path,
        dtype=jnp.dtype(request.dtype),
        rounding=request.resize,
    )
    logging.info("Loading %d rewards and encoders ...", len(rewards) + len(spaces))
    judges = scoring.load_judges(rewards, spaces, networks)
    with told_by_name():
        scores = scoring.score_images(
            image_set, judges, request.batch_size, out, _plan(request, image_set)
        )
    numbers = score_tables.write(image_set, scores, out)
    scoring.finish(out)
    logging.info("%d images: %s", len(image_set), out / "summary.md")
    return numbers


def _check_models(flag: str, specs: list[Spec]) -> None:
    """Raises ConfigError for a judge whose model is not given."""
    for spec in specs:
        if getattr(spec.options, "model", None) == "":
            raise ConfigError(
                f"{flag}={spec.name} names no model: give {flag}={spec.name}:DIR, or --pipeline "
                "with one of its own, such as --pipeline=shapes."
            )


def _plan(request: Request, image_set: ImageSet) -> dict[str, Any]:
    """What a part of the work belongs to."""
    stats = [(image_set.root / file).stat() for file in image_set.files]
    return {
        "files": [[f, s.st_size, s.st_mtime_ns] for f, s in zip(image_set.files, stats)],
        "prompts": [[p.text, p.metadata] for p in image_set.prompts],
        "rewards": request.rewards,
        "spaces": request.spaces,
        "settings": [request.pipeline, request.dtype, request.resize, request.batch_size],
    }
