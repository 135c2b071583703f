"""Whether an image shows the text that its prompt quotes, by OCR on the host.

The score is flow_grpo's (Liu et al. 2025, arXiv 2505.05470), the engine another: see docs/ocr.md.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from pec_jax.config import ConfigError
from pec_jax.data.prompts import Prompt
from pec_jax.host import ocr
from pec_jax.perception.networks import Networks
from pec_jax.rewards.base import Reward, RewardOptions, field, register
from pec_jax.rewards.host import encode_prompts, host_reward
from pec_jax.types import PyTree


@dataclasses.dataclass(frozen=True)
class OcrOptions(RewardOptions):
    """Of the OCR reward."""

    workers: int = field(
        "Worker processes of each process of the run; 0 gives every core a thread.", 0, low=0
    )
    threads: int = field("Threads of each worker process.", 1, low=1)
    limit_side_len: int = field(
        "The text detector enlarges images whose shorter side has fewer pixels than this.",
        512,
        low=32,
    )
    text_score: float = field(
        "Lines that are read with less confidence are dropped.", 0.5, low=0.0, high=1.0
    )
    timeout: float = field("Seconds after which an image is given up.", 60.0, low=0.1)


@register("ocr", OcrOptions)
def make(options: OcrOptions, networks: Networks) -> Reward:
    """`ocr.ocr_score` of what is read in each image; NaN where it could not be read."""
    engine = ocr.Engine(options.threads, options.limit_side_len, options.text_score)
    readers = ocr.Readers(engine, options.workers, options.timeout)

    def judge(images: np.ndarray, prompts: list[Prompt]) -> np.ndarray:
        return scores(readers.read(images), prompts)

    return dataclasses.replace(
        host_reward("ocr", judge, timeout=None),  # its readers have one
        prepare=prepare,
        input_shapes=lambda n: encode_prompts([Prompt('a sign that says "Hello World"')] * n),
    )


def scores(texts: Sequence[str | None], prompts: Sequence[Prompt]) -> np.ndarray:
    """What was read in N images, against what their N prompts quote: [N]."""
    return np.array(
        [
            math.nan if text is None else ocr.ocr_score(text, ocr.target_text(prompt.text))
            for text, prompt in zip(texts, prompts, strict=True)
        ],
        np.float32,
    )


def prepare(variables: PyTree, prompts: Sequence[Prompt]) -> np.ndarray:
    """The prompts as bytes, see `host_reward`.

    Raises:
        ConfigError: a prompt quotes nothing, or the engine is not installed.
    """
    if missing := ocr.missing_packages():
        raise ConfigError(f"config.rewards.ocr needs {' and '.join(missing)}: {ocr.INSTALL}.")
    without = [p.text for p in prompts if not ocr.is_readable(ocr.target_text(p.text))]
    if without:
        raise ConfigError(
            f"config.rewards.ocr compares images with the text that their prompt quotes, and "
            f"{len(without)} of {len(prompts)} prompts quote none; the first is "
            f"{without[0][:200]!r}. Put the text into double quotes, or use other prompts."
        )
    return encode_prompts(prompts)
