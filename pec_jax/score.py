"""Scores any images: `python -m pec_jax.score --images=DIR --reward=NAME:MODEL --out=DIR`.

Reads a folder of images with prompts and measures every reward and every perceptual space asked
for. Writes `scores.csv`, a row per image, and `summary.csv` and `summary.md`, with intervals over
prompts. An interrupted command goes on where it stopped.
"""

from __future__ import annotations

from absl import flags

from pec_jax import command_line, io
from pec_jax.config.user_file import import_plugins
from pec_jax.errors import exit_on_user_error

_IMAGES = command_line.required_string(
    "images", "Directory of the images: those of `pec_jax.sample`, or a subfolder per prompt."
)
_PROMPTS = flags.DEFINE_string(
    "prompts",
    None,
    'Prompts: .jsonl with a line {"file": ..., "prompt": ...} per image, or .txt or .jsonl with a '
    "line per subfolder. By default images.jsonl in --images, or metadata.jsonl in each subfolder.",
)
_REWARD = flags.DEFINE_multi_string(
    "reward",
    [],
    "Reward to measure, NAME[:MODEL][,FIELD=VALUE...], MODEL a directory, file or hub id@revision; "
    "repeat for more.",
)
_SPACE = flags.DEFINE_multi_string(
    "space", [], "Encoder to measure diversity with, likewise; repeat for more."
)
_PIPELINE = flags.DEFINE_string(
    "pipeline",
    None,
    "Pipeline whose own rewards and encoders serve those that name no model, such as `shapes`.",
)
_DTYPE = flags.DEFINE_enum(
    "dtype", "float32", ["float32", "bfloat16"], "Compute type of rewards and encoders."
)
_RESIZE = flags.DEFINE_enum(
    "resize", "pil", ["pil", "float"], "How images are resized: as 8-bit ones, or without rounding."
)
_BATCH_SIZE = flags.DEFINE_integer(
    "batch_size", 16, "Number of images measured at once.", lower_bound=1
)
_OUT = command_line.required_string("out", "Directory to write to.")
command_line.define_plugin()


def main(argv: list[str]) -> None:
    """Parses, scores; a mistake of the user becomes one sentence and exit status 2."""
    command_line.refuse_arguments(argv)
    from pathlib import Path

    from pec_jax import compilation  # imports jax; --help and typos need not wait
    from pec_jax.inference import score

    with exit_on_user_error():
        import_plugins(flags.FLAGS.plugin)
        compilation.keep_programs()
        score.run(
            score.Request(
                images=Path(io.path(_IMAGES.value)),
                prompts=Path(io.path(_PROMPTS.value)) if _PROMPTS.value else None,
                rewards=tuple(_REWARD.value),
                spaces=tuple(_SPACE.value),
                pipeline=_PIPELINE.value,
                dtype=_DTYPE.value,
                resize=_RESIZE.value,
                batch_size=_BATCH_SIZE.value,
            ),
            Path(io.path(_OUT.value)),
        )


if __name__ == "__main__":
    command_line.run(main)
