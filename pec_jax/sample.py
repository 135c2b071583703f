"""Draws images: `python -m pec_jax.sample --model=shapes --prompt="a red circle" --out=DIR`.

Writes one PNG an image, a contact sheet `grid.png`, and `latents.npy` in diffusers' layout
[N, C, h, w], fp32, unscaled as the scheduler leaves them.
"""

from __future__ import annotations

from absl import app, flags

from pec_jax import io
from pec_jax.errors import exit_with_sentence, quiet_libraries

_MODEL = flags.DEFINE_string(
    "model", "shapes", "Pipeline directory, hub id organisation/model@revision, or `shapes`."
)
_VARIANT = flags.DEFINE_string("variant", "", "Of the weights' files, such as fp16.")
_LORA = flags.DEFINE_string(
    "lora", None, "A run directory (its newest checkpoint), or a LoRA file of diffusers or PEFT."
)
_USE_EMA = flags.DEFINE_bool("use_ema", True, "Of a run: averaged parameters, not the last.")
_PROMPT = flags.DEFINE_multi_string("prompt", None, "What to draw; give it again for more prompts.")
_NEGATIVE = flags.DEFINE_string("negative_prompt", "", "What guidance steers away from.")
_NUM_IMAGES = flags.DEFINE_integer("num_images", 4, "Images a prompt.", lower_bound=1)
_HEIGHT = flags.DEFINE_integer("height", 0, "Pixels; 0 is the model's own size.", lower_bound=0)
_WIDTH = flags.DEFINE_integer("width", 0, "Pixels; 0 is the model's own size.", lower_bound=0)
_NUM_STEPS = flags.DEFINE_integer("num_steps", 28, "Sampler steps.", lower_bound=1)
_GUIDANCE = flags.DEFINE_float(
    "guidance", None, "Guidance scale, 1 is off; by default 4.5 for SD3 and 3.5 for FLUX.1-dev."
)
_T5_LENGTH = flags.DEFINE_integer(
    "t5_length", 0, "Tokens T5 sees; 0 is diffusers' choice (SD3 256, FLUX 512).", lower_bound=0
)
_SEED = flags.DEFINE_integer("seed", 0, "Of the initial latents and the sampler's noise.")
_SAMPLER = flags.DEFINE_enum(
    "sampler", "ode", ["ode", "flow_sde", "dance_sde", "cps"], "Transition kernel."
)
_NOISE_LEVEL = flags.DEFINE_float("noise_level", 0.7, "Noise level of a stochastic sampler.")
_INIT_LATENTS = flags.DEFINE_string(
    "init_latents", None, "A .npy file [N, C, h, w], or [1, C, h, w] for all images, to start from."
)
_DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Compute type.")
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 16, "Images drawn at once.", lower_bound=1)
_OUT = flags.DEFINE_string("out", None, "Directory to write to.")


def main(argv: list[str]) -> None:
    """Parses, samples; a mistake of the user becomes one sentence and exit status 2."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}; quote the prompt.")
    for flag in (_PROMPT, _OUT):
        if not flag.value:
            raise app.UsageError(f"--{flag.name} is missing; see --help.")
    from pec_jax.inference import (
        draw as sampling,  # imports jax; --help and typos need not wait for it
    )

    with exit_with_sentence():
        sampling.run(
            sampling.Request(
                model=_MODEL.value,
                lora=_LORA.value,
                use_ema=_USE_EMA.value,
                prompts=tuple(_PROMPT.value),
                negative_prompt=_NEGATIVE.value,
                num_images=_NUM_IMAGES.value,
                height=_HEIGHT.value,
                width=_WIDTH.value,
                num_steps=_NUM_STEPS.value,
                guidance=_GUIDANCE.value,
                seed=_SEED.value,
                sampler=_SAMPLER.value,
                noise_level=_NOISE_LEVEL.value,
                init_latents=_INIT_LATENTS.value,
                dtype=_DTYPE.value,
                variant=_VARIANT.value,
                t5_length=_T5_LENGTH.value,
                batch_size=_BATCH_SIZE.value,
            ),
            io.path(_OUT.value),
        )


if __name__ == "__main__":
    quiet_libraries()
    app.run(main)
