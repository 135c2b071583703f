"""Embeds prompts beforehand: `python -m pec_jax.embed --model=DIR --prompts=FILE --out=DIR`.

Training with `--config.prompts.embeddings=DIR` then needs no text encoder in memory. The command
may be interrupted and given again; it goes on where it stopped.
"""

from __future__ import annotations

from absl import flags

from pec_jax import command_line, io
from pec_jax.errors import exit_on_user_error

_MODEL = flags.DEFINE_string(
    "model", "shapes", "Pipeline directory, hub id organisation/model@revision, or `shapes`."
)
_VARIANT = flags.DEFINE_string(
    "variant", "", "Variant of the weight files, such as fp16; '' is the plain one."
)
_PROMPTS = flags.DEFINE_multi_string(
    "prompts",
    None,
    "Prompt file (.txt or .jsonl); repeat the flag for more: train and held-out.",
    required=True,
)
_DTYPE = flags.DEFINE_enum(
    "dtype",
    "float32",
    ["float32", "bfloat16"],
    "Type in which the encoders compute, and of the stored embeddings.",
)
_T5_LENGTH = flags.DEFINE_integer(
    "t5_length",
    0,
    "Number of tokens T5 sees; 0 is diffusers' choice (SD3 256, FLUX 512).",
    lower_bound=0,
)
_OUT = command_line.required_string("out", "Directory to write to.")


def main(argv: list[str]) -> None:
    """Parses, embeds; a mistake of the user becomes one sentence and exit status 2."""
    command_line.refuse_arguments(argv)
    from pec_jax import compilation  # imports jax; --help and typos need not wait
    from pec_jax.data import encode_prompts

    with exit_on_user_error():
        compilation.keep_programs()
        encode_prompts.run(
            _MODEL.value,
            _PROMPTS.value,
            io.path(_OUT.value),
            dtype=_DTYPE.value,
            t5_length=_T5_LENGTH.value,
            variant=_VARIANT.value,
        )


if __name__ == "__main__":
    command_line.run(main)
