"""Stage `report`: what the finished pipeline can do, in numbers, a picture and a model card.

Every number comes from the run: the stages' own, and samples judged here by the rule-based checker.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pec_jax.families.base import Pipeline
from pec_jax.families.pipeline import load_pipeline
from pec_jax.flow.sampler import FlowSampler
from pec_jax.types import Conditioning
from pec_jax.world import judge
from pec_jax.world import scenes as shapes
from pec_jax.world.pretraining.loop import Session

SETTINGS = ((10, 1.0), (10, 4.5), (28, 1.0), (28, 4.5))  # (steps, guidance)
SPECIFIED_IMAGES = 512
OPEN_IMAGES = 64  # of each open prompt
GRID_PROMPTS = (
    "a small red circle at the top on a dark background",
    "a large blue square in the center on a light background",
    "a large green cross on the left on a dark background",
    "a small pink triangle at the bottom on a light background",
    "a circle",
    "a large shape on a light background",
    "a shape",
)
GRID_COLUMNS = 12
STAGES = ("skeleton", "vae", "clip", "t5", "transformer", "dino", "pickscore")


@dataclasses.dataclass(frozen=True)
class Painter:
    """Prompts to images with the finished pipeline."""

    pipeline: Pipeline
    negative: Conditioning  # [1, ...] the empty prompt

    @classmethod
    def of(cls, directory: Path) -> Painter:
        pipeline = load_pipeline(directory)
        assert pipeline.text is not None  # the embedded pipeline has its text encoders
        return cls(pipeline, jax.tree.map(jnp.asarray, pipeline.text.encode([""])))

    @functools.cached_property
    def _variables(self):
        return jax.tree.map(
            jnp.asarray, (self.pipeline.transformer_variables, self.pipeline.vae_variables)
        )

    def __call__(self, prompts: list[str], key: jax.Array, steps: int, guidance: float):
        """Images [N, 32, 32, 3] in [0, 1] of N prompts, by the probability-flow ODE."""
        assert self.pipeline.text is not None
        text = jax.tree.map(jnp.asarray, self.pipeline.text.encode(prompts))
        return _paint(self, self._variables, text, self.negative, key, steps, guidance)

    def __hash__(self) -> int:
        return id(self)


@functools.partial(jax.jit, static_argnums=(0, 5, 6))
def _paint(painter: Painter, variables, text, negative, key, steps: int, guidance: float):
    pipeline = painter.pipeline
    shape = pipeline.latent_shape()
    noise = jax.random.normal(key, (text.tokens.shape[0], *shape))
    field, sampler = pipeline.guide(guidance, negative), FlowSampler(pipeline.sigmas(steps, shape))
    latents = sampler.final(lambda x, sigma: field(variables[0], x, sigma, text), noise, None)
    return pipeline.decode(variables[1], latents)


def color_entropy(colors: np.ndarray) -> float:
    """Entropy of a colour histogram over that of a flat one, H / log 8 in [0, 1]; colors [N]."""
    if len(colors) == 0:
        return 0.0
    share = np.bincount(colors, minlength=len(shapes.COLORS)) / len(colors)
    share = share[share > 0]
    return float(-(share * np.log(share)).sum() / np.log(len(shapes.COLORS)))


def specified(painter: Painter, key: jax.Array, steps: int, guidance: float) -> dict[str, float]:
    """Attribute accuracy on prompts that name everything: strict, and of each attribute."""
    rows = shapes.all_attributes()
    rows = rows[(rows >= 0).all(-1)]
    row_key, noise_key = jax.random.split(key)
    rows = rows[np.asarray(jax.random.permutation(row_key, len(rows)))[:SPECIFIED_IMAGES]]
    images = painter([shapes.caption(row) for row in rows], noise_key, steps, guidance)
    detected = judge.detect(images)
    right = np.asarray(detected.attributes) == rows
    right &= np.asarray(detected.found)[:, None]
    return {
        "strict": float(right.all(-1).mean()),
        "mean": float(right.mean()),
        "found": float(np.mean(detected.found)),
        **{name: float(r) for name, r in zip(shapes.ATTRIBUTES, right.mean(0))},
    }


def unspecified(painter: Painter, key: jax.Array, steps: int, guidance: float) -> dict[str, float]:
    """Diversity on prompts that leave the colour open: mean relative entropy of colours found."""
    prompts = shapes.prompt_splits()["heldout_open"][:8]
    repeated = [prompt for prompt in prompts for _ in range(OPEN_IMAGES)]
    images = painter(repeated, key, steps, guidance)
    detected = judge.detect(images)
    colors = np.asarray(detected.attributes)[:, shapes.COLOR]
    found = np.asarray(detected.found)
    groups = [
        colors[i : i + OPEN_IMAGES][found[i : i + OPEN_IMAGES]]
        for i in range(0, len(colors), OPEN_IMAGES)
    ]
    named = np.stack([shapes.parse(prompt) for prompt in repeated])
    return {
        "color_entropy": float(np.mean([color_entropy(group) for group in groups])),
        "color_entropy_pooled": color_entropy(colors[found]),
        "score": float(np.mean(judge.score(images, jnp.asarray(named)))),
    }


def grid(painter: Painter, key: jax.Array, path: Path, steps: int, guidance: float) -> None:
    """Writes a contact sheet: a row for each of GRID_PROMPTS, enlarged four times."""
    from PIL import Image

    prompts = [prompt for prompt in GRID_PROMPTS for _ in range(GRID_COLUMNS)]
    images = np.asarray(painter(prompts, key, steps, guidance))
    images = np.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=0.5)
    side = images.shape[1]
    sheet = images.reshape(len(GRID_PROMPTS), GRID_COLUMNS, side, side, 3)
    sheet = sheet.transpose(0, 2, 1, 3, 4).reshape(len(GRID_PROMPTS) * side, -1, 3)
    sheet = np.repeat(np.repeat(sheet, 4, axis=0), 4, axis=1)
    Image.fromarray((sheet * 255.0).round().astype(np.uint8)).save(path)


def _table(rows: list[tuple[str, str]]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)])


def model_card(numbers: dict[str, Any]) -> str:
    """The model card, from the numbers of `report.json`."""
    stages, samples = numbers["stages"], numbers["samples"]

    def percent(value: float) -> str:
        return f"{100 * value:.1f}%"

    quality = []
    for name, result in samples.items():
        accuracy = result["specified"]
        each = ", ".join(f"{a} {percent(accuracy[a])}" for a in shapes.ATTRIBUTES)
        quality.append((f"{name}: mean over attributes", percent(accuracy["mean"])))
        quality.append((f"{name}: all five right", percent(accuracy["strict"])))
        quality.append((f"{name}: each", each))
        quality.append((f"{name}: colour entropy, open", percent(result["open"]["color_entropy"])))
    encoders = [
        ("VAE, PSNR", f"{stages['vae']['psnr_db']:.1f} dB"),
        ("CLIP, held-out contrastive loss", f"{stages['clip']['loss']:.3f} nats"),
        ("CLIP, image to text among 640 captions", percent(stages["clip"]["retrieval_640"])),
        ("the same, second text tower", percent(stages["clip"]["retrieval_640_second"])),
        ("T5, held-out loss", f"{stages['t5']['loss']:.3f} nats"),
        ("T5, masked tokens right", percent(stages["t5"]["masked_accuracy"])),
        ("transformer, held-out flow-matching loss", f"{stages['transformer']['loss']:.4f}"),
        ("PickScore, agreement with single choices", percent(stages["pickscore"]["pair_accuracy"])),
        ("the same, of the true utility", percent(stages["pickscore"]["pair_accuracy_best"])),
        ("PickScore, pairs in the right order", percent(stages["pickscore"]["order_accuracy"])),
    ]
    encoders += [
        (f"DINO, kNN accuracy of {name}", percent(stages["dino"][f"knn/{name}"]))
        for name in shapes.ATTRIBUTES
    ]
    times = [(name, f"{stages[name]['seconds']:.0f} s") for name in STAGES]
    return CARD.format(
        parameters=f"{stages['transformer']['parameters'] / 1e6:.2f}",
        megabytes=f"{numbers['bytes'] / 1e6:.1f}",
        quality=_table(quality),
        encoders=_table(encoders),
        times=_table(times),
        seed=numbers["seed"],
        scale=numbers["steps_scale"],
    )


CARD = """---
license: apache-2.0
library_name: diffusers
pipeline_tag: text-to-image
---

# The shapes pipeline

A Stable Diffusion 3 pipeline small enough to train on two CPU cores: 32 x 32 images of one
object, prompts such as "a small red circle at the top on a dark background". It is the default of
`pec_jax`: large enough to show what reinforcement learning does to the diversity of images, small
enough to show it in minutes.

The transformer has {parameters} M parameters, two layers with dual attention, rms-normalised
queries and keys. Beside it stand three encoders, `encoders/clip`, `encoders/dino` and
`encoders/pickscore`. Everything together is {megabytes} MB of fp32 safetensors.

```python
from diffusers import StableDiffusion3Pipeline

pipe = StableDiffusion3Pipeline.from_pretrained("pec_jax/shapes/assets")
pipe("a red circle", num_inference_steps=10, guidance_scale=4.5, max_sequence_length=14)
```

`max_sequence_length=14` is needed: all text encoders here read 14 tokens, and
diffusers would pad to 256.

## Data

Drawn by `pec_jax.world.scenes`, which needs no download and contains nothing personal: one of four
shapes, eight colours, two sizes, five positions and two backgrounds, all equally likely. A
caption names a random subset of them. There are 2430 captions; they are in lower case, without a
full stop.

## Recipe

`python -m pec_jax.pretrain --out=DIR` (seed {seed}, steps x {scale}) makes all of
it; AdamW with cosine decay, and an exponential moving average of the weights is what is kept.

- `vae`: L1 + L2 + a small KL term.
- `clip`: contrastive, one vision tower with two text towers; they are also `text_encoder` and
  `text_encoder_2`.
- `t5`: masked-token prediction, reading visible tokens back at half weight.
- `transformer`: flow matching, logit-normal noise levels, 10% empty captions.
- `dino`: self-distillation with two large and two small crops, no captions.
- `pickscore`: `clip` fine-tuned on simulated pairwise preferences (Bradley-Terry). The simulated
  crowd wants what the caption names, and where the caption is silent it likes warm colours, large
  objects and light backgrounds. This is a bias put there on purpose.

## Images, judged by rules

Fully specified prompts for accuracy, prompts that leave the colour open for entropy (100% =
all eight colours equally often).

{quality}

## Encoders, on images never trained on

{encoders}

## Time

{times}

## Limits

It knows nothing but these shapes. Other words are tokenised, and mean nothing to it.
"""


def run(session: Session) -> dict[str, Any]:
    """Judges the pipeline; writes report.json, README.md and samples.png into it."""
    painter = Painter.of(session.out)
    key = session.key("report")
    samples = {}
    for steps, guidance in SETTINGS:
        samples[f"{steps} steps, guidance {guidance}"] = {
            "specified": specified(painter, jax.random.fold_in(key, 0), steps, guidance),
            "open": unspecified(painter, jax.random.fold_in(key, 1), steps, guidance),
        }
    stages = {name: session.numbers(name) or {} for name in STAGES}
    numbers = {
        "seed": session.seed,
        "steps_scale": session.steps_scale,
        "bytes": sum(stage.get("bytes", 0) for stage in stages.values()),
        "stages": stages,
        "samples": samples,
    }
    grid(painter, jax.random.fold_in(key, 2), session.out / "samples.png", 10, 1.0)
    text = json.dumps(numbers, indent=1) + "\n"
    (session.out / "report.json").write_text(text, encoding="utf-8")
    if all("seconds" in stage for stage in stages.values()):
        (session.out / "README.md").write_text(model_card(numbers), encoding="utf-8")
    return samples
