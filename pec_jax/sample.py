"""Draws images: `python -m pec_jax.sample --model=shapes --prompt="a red cat" --out=DIR`.

Writes one PNG per image, a contact sheet `grid.png`, and `latents.npy` in diffusers' layout
[N, C, h, w], fp32, unscaled as the scheduler leaves them.
"""

from __future__ import annotations

from absl import app, flags

from pec_jax import command_line, io
from pec_jax.config.user_file import import_plugins
from pec_jax.errors import exit_on_user_error

_MODEL = flags.DEFINE_string(
    "model", "shapes", "Pipeline directory, hub id organisation/model@revision, or `shapes`."
)
_TRANSFORMER = flags.DEFINE_string(
    "transformer",
    "",
    "Transformer in place of the pipeline's: a file of weights as its publisher or diffusers has "
    "it, a directory, or a hub id@revision.",
)
_VARIANT = flags.DEFINE_string(
    "variant", "", "Variant of the weight files, such as fp16; '' is the plain one."
)
_LORA = flags.DEFINE_string(
    "lora",
    None,
    "A run directory (its newest checkpoint); a LoRA of diffusers, PEFT, kohya, ComfyUI, XLabs: a "
    "file, a directory that holds one, or a hub id organisation/repository@revision.",
)
_USE_EMA = flags.DEFINE_bool(
    "use_ema", True, "Of a run, use the averaged parameters, not the last."
)
_PROMPT = flags.DEFINE_multi_string("prompt", [], "Prompt to draw; repeat the flag for more.")
_PROMPTS = flags.DEFINE_string(
    "prompts",
    None,
    "File of prompts, .txt or .jsonl, to draw after those of --prompt; a line of .jsonl may have a "
    "negative_prompt of its own.",
)
_NEGATIVE = flags.DEFINE_string(
    "negative_prompt", "", "Prompt that guidance steers away from, of prompts without their own."
)
_NUM_IMAGES = flags.DEFINE_integer("num_images", 4, "Number of images per prompt.", lower_bound=1)
_HEIGHT = flags.DEFINE_integer(
    "height", 0, "Height in pixels; 0 is the model's own size.", lower_bound=0
)
_WIDTH = flags.DEFINE_integer(
    "width", 0, "Width in pixels; 0 is the model's own size.", lower_bound=0
)
_NUM_STEPS = flags.DEFINE_integer("num_steps", 28, "Number of sampler steps.", lower_bound=1)
_GUIDANCE = command_line.bounded_float(
    "guidance",
    None,
    "Guidance scale, 1 is off; by default 4.5 for SD3 and 3.5 for FLUX.1-dev.",
    low=0,
    high=100,
)
_T5_LENGTH = flags.DEFINE_integer(
    "t5_length",
    0,
    "Number of tokens T5 sees; 0 is diffusers' choice (SD3 256, FLUX 512).",
    lower_bound=0,
)
_SEED = command_line.define_seed("Seed of the initial latents and of the sampler's noise.")
_SAMPLER = flags.DEFINE_enum(
    "sampler", "ode", ["ode", "flow_sde", "dance_sde", "cps"], "Transition kernel of the sampler."
)
_NOISE_LEVEL = command_line.bounded_float(
    "noise_level", 0.7, "Noise level of a stochastic sampler.", low=0, high=10
)
_INIT_LATENTS = flags.DEFINE_string(
    "init_latents", None, "A .npy file [N, C, h, w], or [1, C, h, w] for all images, to start from."
)
_DTYPE = flags.DEFINE_enum(
    "dtype", "float32", ["float32", "bfloat16"], "Compute type of the model."
)
_BATCH_SIZE = flags.DEFINE_integer(
    "batch_size", 16, "Number of images drawn at once.", lower_bound=1
)
_OUT = command_line.required_string("out", "Directory to write to.")
command_line.define_plugin()


def main(argv: list[str]) -> None:
    """Parses, samples; a mistake of the user becomes one sentence and exit status 2."""
    command_line.refuse_arguments(argv, hint=" Quote the prompt.")
    if not _PROMPT.value and not _PROMPTS.value:
        raise app.UsageError("--prompt or --prompts is missing; see --help.")
    from pec_jax import compilation  # imports jax; --help and typos need not wait
    from pec_jax.inference import draw

    with exit_on_user_error():
        import_plugins(flags.FLAGS.plugin)  # a run's config may name what they register
        compilation.keep_programs()
        draw.run(
            draw.Request(
                model=_MODEL.value,
                transformer=_TRANSFORMER.value,
                lora=_LORA.value,
                use_ema=_USE_EMA.value,
                prompts=tuple(_PROMPT.value),
                prompt_file=_PROMPTS.value,
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
    command_line.run(main)
