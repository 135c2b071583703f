"""Embeds prompts beforehand: `python -m pec_jax.embed --model=DIR --prompts=FILE --out=DIR`.

Training with `--config.prompts.embeddings=DIR` then needs no text encoder in memory. The command
may be interrupted and given again; it goes on where it stopped.
"""

from __future__ import annotations

from pathlib import Path

from absl import flags

from pec_jax import command_line
from pec_jax.errors import exit_with_sentence

_MODEL = flags.DEFINE_string(
    "model", "shapes", "Pipeline directory, hub id organisation/model@revision, or `shapes`."
)
_VARIANT = flags.DEFINE_string("variant", "", "Of the weights' files, such as fp16.")
_PROMPTS = flags.DEFINE_multi_string(
    "prompts",
    None,
    "Prompt file (.txt or .jsonl); give it again for more: train and held-out.",
    required=True,
)
_DTYPE = flags.DEFINE_enum(
    "dtype", "float32", ["float32", "bfloat16"], "In which the encoders compute, and of the files."
)
_T5_LENGTH = flags.DEFINE_integer(
    "t5_length", 0, "Tokens T5 sees; 0 is diffusers' choice (SD3 256, FLUX 512).", lower_bound=0
)
_OUT = command_line.required_string("out", "Directory to write to.")


def main(argv: list[str]) -> None:
    """Parses, embeds; a mistake of the user becomes one sentence and exit status 2."""
    command_line.refuse_arguments(argv)
    from pec_jax.data import encode_prompts  # imports jax; --help and typos need not wait

    with exit_with_sentence():
        encode_prompts.run(
            _MODEL.value,
            _PROMPTS.value,
            Path(_OUT.value).expanduser(),
            dtype=_DTYPE.value,
            t5_length=_T5_LENGTH.value,
            variant=_VARIANT.value,
        )


if __name__ == "__main__":
    command_line.run(main)
