"""Sampling from a pipeline directory, with or without what a run has learned."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from io import BytesIO

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from etils import epath
from tqdm import tqdm

from pec_jax import io
from pec_jax.data.prompts import Prompt, check_text, read_prompts
from pec_jax.families.base import Pipeline
from pec_jax.families.locate import pipeline_directory, transformer_path
from pec_jax.families.pipeline import load_pipeline
from pec_jax.flow.sampler import FlowSampler
from pec_jax.training.learned import LearnedRun, open_learned
from pec_jax.training.metric_writer import image_grid, save_png, to_picture
from pec_jax.types import Array, Conditioning, PyTree

MAX_GRID_COLUMNS, MAX_GRID_ROWS = 12, 32


@dataclasses.dataclass(frozen=True)
class Request:
    """What to draw; the fields are the flags of `pec_jax.sample`."""

    model: str
    prompts: tuple[str, ...] = ()
    prompt_file: str | None = None
    transformer: str = ""  # in place of the pipeline's
    lora: str | None = None
    use_ema: bool = True
    negative_prompt: str = ""  # for prompts that have none of their own
    num_images: int = 4
    height: int = 0
    width: int = 0
    num_steps: int = 28
    guidance: float | None = None  # None: what the kind of model is published with
    seed: int = 0
    sampler: str = "ode"
    noise_level: float = 0.7
    init_latents: str | None = None
    dtype: str = "float32"
    variant: str = ""
    t5_length: int = 0
    batch_size: int = 16


def run(request: Request, out: epath.Path) -> None:
    """Draws the images of a request and writes PNGs, `grid.png` and `latents.npy` into `out`.

    Raises:
      ValueError, RunError, OSError: sentences for a person.
    """
    for text in (*request.prompts, request.negative_prompt):
        check_text(text)
    prompts = [Prompt(text) for text in request.prompts]
    if request.prompt_file:
        prompts += read_prompts(request.prompt_file)
    request = dataclasses.replace(request, prompts=tuple(p.text for p in prompts))
    negatives = [request.negative_prompt if p.negative is None else p.negative for p in prompts]
    out.mkdir(parents=True, exist_ok=True)
    root = pipeline_directory(request.model, request.variant, request.transformer)
    learned = None
    if request.lora:
        shapes = transformer_path(request.transformer, weights=False)
        learned = open_learned(request.lora, root, shapes)
    if isinstance(learned, LearnedRun):
        learned.warn_of_another_transformer(request.transformer)
    dtype = jnp.dtype(request.dtype)
    pipeline = load_pipeline(
        root,
        dtype,
        param_dtype=dtype,
        t5_length=request.t5_length,
        variant=request.variant,
        transformer=transformer_path(request.transformer),
        sharding=jax.sharding.SingleDeviceSharding(jax.local_devices()[0]),
    )
    shape = pipeline.latent_shape(request.height, request.width)
    count = len(request.prompts) * request.num_images
    noise = initial_latents(request, count, shape)
    variables = pipeline.transformer_variables
    if learned is not None:
        variables = learned.variables(pipeline, use_ema=request.use_ema)
    latents, images = draw(request, pipeline, variables, noise, negatives)
    save(out, prompts, latents, images)
    logging.info("%d images of %d prompts: %s", count, len(request.prompts), out)


def initial_latents(request: Request, count: int, shape: tuple[int, ...]) -> Array:
    """Unit Gaussian noise [N, h, w, C]; image i has the same noise whatever N is.

    Raises:
      ValueError: `init_latents` is not a .npy file of the right shape.
    """
    if request.init_latents is None:
        keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(request.seed), i))(
            jnp.arange(count)
        )
        return jax.vmap(lambda key: jax.random.normal(key, shape))(keys)
    path = io.path(request.init_latents)
    height, width, channels = shape
    expected = (count, channels, height, width)
    try:
        # Mapped: a header that promises more than the file holds is refused, and not allocated.
        stored = np.load(io.local_copy(path), mmap_mode="r", allow_pickle=False)
    except OSError:
        raise
    except Exception as error:  # a damaged header reaches Python's own tokenizer
        raise ValueError(f"{path} is not a .npy file of numbers: {error}") from None
    if not isinstance(stored, np.ndarray):
        raise ValueError(f"{path} is an .npz archive; save one array with numpy.save.")
    if stored.shape not in (expected, (1, *expected[1:])) or stored.dtype.kind != "f":
        raise ValueError(
            f"{path} holds {stored.dtype} of shape {stored.shape}; these prompts and sizes need "
            f"floats of shape {expected}, or {(1, *expected[1:])} for the same start everywhere."
        )
    with np.errstate(over="ignore"):
        stored = np.broadcast_to(stored.astype(np.float32), expected)
    if not np.isfinite(stored).all():
        raise ValueError(f"{path} holds numbers that are not finite in float32.")
    return jnp.asarray(stored.transpose(0, 2, 3, 1))


def draw(
    request: Request,
    pipeline: Pipeline,
    variables: PyTree,
    noise: Array,
    negatives: Sequence[str] = (),
) -> tuple[np.ndarray, np.ndarray]:
    """Draws the images of a request's prompts.

    Args:
      request: what to draw.
      pipeline: with its text encoders.
      variables: of its transformer.
      noise: [N, h, w, C], the images of a prompt one after the other.
      negatives: each prompt's negative prompt; the request's if there are none.

    Returns:
      Latents [N, h, w, C] as the sampler leaves them, and images [N, H, W, 3] in [0, 1].
    """
    prompt_of = np.repeat(np.arange(len(request.prompts)), request.num_images)  # [N]
    assert pipeline.text is not None  # `run` loads it
    texts = [*request.prompts, *(negatives or [request.negative_prompt] * len(request.prompts))]
    unique = {text: row for row, text in enumerate(dict.fromkeys(texts))}
    encoded = pipeline.text.encode(list(unique))
    rows_of = np.array([unique[text] for text in texts]).reshape(2, -1)[:, prompt_of]  # [2, N]
    stochastic = request.sampler != "ode"
    sampler = FlowSampler(
        pipeline.sigmas(request.num_steps, noise.shape[1:]),
        kernel=request.sampler,
        noise_level=request.noise_level,
        stochastic=(True,) * request.num_steps if stochastic else (),
    )
    guidance = request.guidance
    if guidance is None:
        guidance = pipeline.default_guidance
    if any(texts[len(request.prompts) :]):
        _warn_of_unused_negatives(pipeline, guidance)

    @jax.jit
    def draw_batch(variables, vae, x_1: Array, text: Conditioning, other: Conditioning, key: Array):
        velocity = pipeline.guide(guidance, other)
        latents = sampler.final(lambda x, s: velocity(variables, x, s, text), x_1, key)
        return latents, pipeline.decode(vae, latents)

    variables, vae = jax.device_put((variables, pipeline.vae_variables))
    size = min(request.batch_size, len(prompt_of))
    batches = []
    for start in tqdm(range(0, len(prompt_of), size), unit="batch", desc="sampling"):
        rows = np.arange(start, start + size) % len(prompt_of)  # the last batch wraps around
        texts_now = (jax.tree.map(lambda a: a[of[rows]], encoded) for of in rows_of)  # noqa: B023
        key = jax.random.fold_in(jax.random.key(request.seed + 1), start)
        batches.append(jax.device_get(draw_batch(variables, vae, noise[rows], *texts_now, key)))
    latents, images = (np.concatenate(parts)[: len(prompt_of)] for parts in zip(*batches))
    return latents, images


def _warn_of_unused_negatives(pipeline: Pipeline, guidance: float) -> None:
    if pipeline.embeds_guidance:
        reason = "this model was distilled with guidance and takes none"
    elif guidance == 1:
        reason = "at --guidance=1 there is no guidance"
    else:
        return
    logging.warning("Negative prompts change nothing: %s.", reason)


def save(
    out: epath.Path, prompts: Sequence[Prompt], latents: np.ndarray, images: np.ndarray
) -> None:
    """Writes one PNG per image, which prompt is whose, the contact sheet and the latents."""
    buffer = BytesIO()
    np.save(buffer, latents.transpose(0, 3, 1, 2).astype(np.float32))
    io.write_bytes(out / "latents.npy", buffer.getvalue())
    num_images, lines = len(images) // len(prompts), []
    for number, image in enumerate(images):
        name, prompt = f"{number:05d}.png", prompts[number // num_images]
        save_png(out / name, to_picture(image))
        record = {**prompt.metadata, "file": name, "prompt": prompt.text}
        lines.append(json.dumps(record, ensure_ascii=False) + "\n")
    io.write_text(out / "images.jsonl", "".join(lines))
    grouped = images.reshape(len(prompts), num_images, *images.shape[1:])
    shown = grouped[:MAX_GRID_ROWS, :MAX_GRID_COLUMNS]
    save_png(out / "grid.png", image_grid(shown, [p.text for p in prompts[:MAX_GRID_ROWS]]))
