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
from pec_jax.shapes import diversity, finish, judge
from pec_jax.shapes import scenes as shapes
from pec_jax.shapes.pretraining import common
from pec_jax.shapes.pretraining.loop import Session
from pec_jax.types import Conditioning

SETTINGS = {  # name to (steps, guidance, T5's length); 0 is our own, the tokenizer's 12 tokens
    "10 steps, guidance 1": (10, 1.0, 0),
    "28 steps, guidance 1": (28, 1.0, 0),
    "10 steps, guidance 3": (10, 3.0, 0),
    "28 steps, guidance 7, 256 tokens (diffusers' defaults)": (28, 7.0, 256),
}
SPECIFIED_IMAGES = 512
OPEN_PROMPTS, OPEN_IMAGES = 8, 64  # and images of each
GRID_PROMPTS = (
    "a large red fish in the middle on a meadow",
    "three small yellow stars at the top at sunset",
    "two large purple houses at the bottom in the desert",
    "a small orange mushroom on the left in the snow",
    "two cats",
    "three large things in the snow",
    "a thing",
)
GRID_COLUMNS = 12
ENCODERS = ("pickscore", "pickscore_taste", "hps")
STAGES = ("skeleton", "vae", "clip", "t5", "transformer", "dino", *ENCODERS)


@dataclasses.dataclass(frozen=True, eq=False)  # by identity: jitted functions keep it
class Painter:
    """Prompts to images with the finished pipeline."""

    pipeline: Pipeline
    negative: Conditioning  # [1, ...] the empty prompt

    @classmethod
    def of(cls, directory: Path, t5_length: int = 0) -> Painter:
        pipeline = load_pipeline(directory, t5_length=t5_length)
        assert pipeline.text is not None  # the embedded pipeline has its text encoders
        return cls(pipeline, jax.tree.map(jnp.asarray, pipeline.text.encode([""])))

    @functools.cached_property
    def _variables(self):
        return jax.tree.map(
            jnp.asarray, (self.pipeline.transformer_variables, self.pipeline.vae_variables)
        )

    def __call__(self, prompts: list[str], key: jax.Array, steps: int, guidance: float):
        """Images [N, 64, 64, 3] in [0, 1] of N prompts, by the probability-flow ODE."""
        assert self.pipeline.text is not None
        text = jax.tree.map(jnp.asarray, self.pipeline.text.encode(prompts))
        return _paint(self, self._variables, text, self.negative, key, steps, guidance)


@functools.partial(jax.jit, static_argnums=(0, 5, 6))
def _paint(painter: Painter, variables, text, negative, key, steps: int, guidance: float):
    pipeline = painter.pipeline
    shape = pipeline.latent_shape()
    noise = jax.random.normal(key, (text.tokens.shape[0], *shape))
    field, sampler = pipeline.guide(guidance, negative), FlowSampler(pipeline.sigmas(steps, shape))
    latents = sampler.final(lambda x, sigma: field(variables[0], x, sigma, text), noise, None)
    return pipeline.decode(variables[1], latents)


def specified(painter: Painter, key: jax.Array, steps: int, guidance: float) -> dict[str, float]:
    """Attribute accuracy on prompts that name everything: strict, and of each attribute."""
    rows = shapes.all_attributes()
    rows = rows[(rows >= 0).all(-1)]
    row_key, noise_key = jax.random.split(key)
    rows = rows[np.asarray(jax.random.permutation(row_key, len(rows)))[:SPECIFIED_IMAGES]]
    images = painter([shapes.caption(row) for row in rows], noise_key, steps, guidance)
    detected = _detect(images)
    right = np.asarray(detected.attributes) == rows
    right &= np.asarray(detected.found)[:, None]
    return {
        "strict": float(right.all(-1).mean()),
        "mean": float(right.mean()),
        "found": float(np.mean(detected.found)),
        **{name: float(r) for name, r in zip(shapes.ATTRIBUTES, right.mean(0))},
    }


def unspecified(painter: Painter, key: jax.Array, steps: int, guidance: float) -> dict[str, float]:
    """What the model makes of open prompts: the diversity of what is open, and the finish."""
    prompts = shapes.prompt_splits()["heldout_open"][:OPEN_PROMPTS]
    repeated = [prompt for prompt in prompts for _ in range(OPEN_IMAGES)]
    images = painter(repeated, key, steps, guidance)
    detected = _detect(images)
    by_prompt = (OPEN_PROMPTS, OPEN_IMAGES)
    entropies = diversity.open_attributes(
        detected.attributes.reshape(*by_prompt, -1),
        detected.found.reshape(by_prompt),
        jnp.asarray([shapes.parse(prompt) for prompt in prompts]),
    )
    finishes = finish.score(detected.defects)
    named = jnp.asarray([shapes.parse(prompt) for prompt in repeated])
    return {
        "entropy": float(np.mean(entropies)),
        "score": float(np.mean(judge.share_right(detected, named))),
        "found": float(np.mean(detected.found)),
        "finish": float(np.mean(finishes)),
        "finish_std": float(np.std(finishes)),
    }


def web(key: jax.Array) -> dict[str, float]:
    """The finish of the pictures that the model has learned from, as the judge reads it."""
    finishes = finish.score(_detect(common.draw_pictures(key, 512).images).defects)
    return {"finish": float(np.mean(finishes)), "finish_std": float(np.std(finishes))}


_detect = jax.jit(judge.detect)


def grid(painter: Painter, key: jax.Array, path: Path, steps: int, guidance: float) -> None:
    """Writes a contact sheet: a row for each of GRID_PROMPTS, enlarged twice."""
    from PIL import Image

    prompts = [prompt for prompt in GRID_PROMPTS for _ in range(GRID_COLUMNS)]
    images = np.asarray(painter(prompts, key, steps, guidance))
    images = np.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=0.5)
    side = images.shape[1]
    sheet = images.reshape(len(GRID_PROMPTS), GRID_COLUMNS, side, side, 3)
    sheet = sheet.transpose(0, 2, 1, 3, 4).reshape(len(GRID_PROMPTS) * side, -1, 3)
    sheet = np.repeat(np.repeat(sheet, 2, axis=0), 2, axis=1)
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
        accuracy, open_ = result["specified"], result["open"]
        each = ", ".join(f"{a} {percent(accuracy[a])}" for a in shapes.ATTRIBUTES)
        quality += [
            (f"**{name}**", ""),
            ("all six attributes right", percent(accuracy["strict"])),
            ("each", each),
            ("entropy of open attributes, of its maximum", percent(open_["entropy"])),
            ("finish, mean ± std", f"{open_['finish']:.2f} ± {open_['finish_std']:.2f}"),
        ]
    training = numbers["web"]
    quality += [
        ("**training data**", ""),
        ("finish, mean ± std", f"{training['finish']:.2f} ± {training['finish_std']:.2f}"),
    ]
    encoders = [
        ("VAE, PSNR", f"{stages['vae']['psnr_db']:.1f} dB"),
        ("CLIP, held-out contrastive loss", f"{stages['clip']['loss']:.3f} nats"),
        ("CLIP, image to text among 4320 captions", percent(stages["clip"]["retrieval"])),
        ("the same, second text tower", percent(stages["clip"]["retrieval_second"])),
        ("T5, held-out loss", f"{stages['t5']['loss']:.3f} nats"),
        ("T5, masked tokens right", percent(stages["t5"]["masked_accuracy"])),
        ("transformer, held-out flow-matching loss", f"{stages['transformer']['loss']:.4f}"),
    ]
    encoders += [
        (f"DINO, kNN accuracy of {name}", percent(stages["dino"][f"knn/{name}"]))
        for name in shapes.ATTRIBUTES
    ]
    for name in ENCODERS:
        stage = stages[name]
        encoders += [
            (f"`{name}`, agreement with single choices", percent(stage["pair_accuracy"])),
            ("the same, of the true utility", percent(stage["pair_accuracy_best"])),
            (
                "correlation with the utility, prompt 'a thing'",
                f"{stage['utility_correlation']:.2f}",
            ),
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

A Stable Diffusion 3 pipeline small enough to train on two CPU cores: 64 x 64 pictures of one to
three objects before a horizon, prompts such as "two small red fish at the top in the snow". It is
the default of `pec_jax`: large enough to show what reinforcement learning does to the diversity of
images, small enough to show it in minutes.

The transformer has {parameters} M parameters, two layers with dual attention, rms-normalised
queries and keys. Beside it stand five encoders: `encoders/clip`, `encoders/dino`, and three
preference models, `encoders/pickscore`, `encoders/pickscore_taste` and `encoders/hps`. Everything
together is {megabytes} MB of safetensors in half precision.

```python
from diffusers import StableDiffusion3Pipeline

pipe = StableDiffusion3Pipeline.from_pretrained("pec_jax/shapes/assets")
pipe("two red fish in the snow").images[0]
```

![samples](samples.png)

## Data

Drawn by `pec_jax.shapes.scenes`, which needs no download and contains nothing personal. A scene has
a number, size, colour, kind, place and background, all equally likely; a caption names a random
subset of them. There are 17,640 captions, in lower case, without a full stop. What no caption names
is the finish (focus, noise, contrast, exposure, framing), which is mediocre in most pictures, as on
the web. `docs/world.md` says why.

## Recipe

`python -m pec_jax.pretrain --out=DIR` (seed {seed}, steps x {scale}) makes all of it; AdamW with
cosine decay, and an exponential moving average of the weights is what is kept.

- `vae`: L1 + L2 + a small KL term.
- `clip`: contrastive, one vision tower with two text towers; they are also `text_encoder` and
  `text_encoder_2`.
- `t5`: masked-token prediction, reading visible tokens back at half weight.
- `transformer`: flow matching, logit-normal noise levels, 10% empty captions; some batches with
  captions padded to 256 tokens, as diffusers does by default. The last quarter of the steps distils
  a mild guidance into the weights, so that none is needed; diffusers' default of 7 works as well.
- `dino`: momentum contrast between two photographs of a scene, among scenes of one caption.
- `pickscore`: `clip` fine-tuned on the choices of a simulated crowd (Bradley-Terry), which wants
  pictures that are well made, what was asked for, of several looks; it has slight tastes.
- `pickscore_taste`: the same for a crowd with one taste and no eye for craft: warm colours, large
  objects, light backgrounds. This is a bias put there on purpose.
- `hps`: another crowd of the first kind, another architecture, from nothing. To evaluate with.

## Pictures, judged by rules

Prompts that name everything for accuracy, open prompts for entropy (100% = all values equally
often) and finish.

{quality}

## Encoders, on images never trained on

{encoders}

## Time

{times}

## Limits

It knows nothing but these scenes. Other words are tokenised, and mean nothing to it.
"""


def run(session: Session) -> dict[str, Any]:
    """Judges the pipeline; writes report.json, README.md and samples.png into it."""
    key, samples = session.key("report"), {}
    for name, (steps, guidance, t5_length) in SETTINGS.items():
        painter = Painter.of(session.out, t5_length)
        samples[name] = {
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
        "web": web(jax.random.fold_in(key, 3)),
    }
    grid(Painter.of(session.out), jax.random.fold_in(key, 2), session.out / "samples.png", 10, 1.0)
    text = json.dumps(numbers, indent=1) + "\n"
    (session.out / "report.json").write_text(text, encoding="utf-8")
    if all("seconds" in stage for stage in stages.values()):
        (session.out / "README.md").write_text(model_card(numbers), encoding="utf-8")
    return samples
