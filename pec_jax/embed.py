"""Embeds prompts beforehand: `python -m pec_jax.embed --model=DIR --prompts=FILE --out=DIR`.

Training with `--config.prompts.embeddings=DIR` then needs no text encoder in memory. The command
may be interrupted and given again; it goes on where it stopped.
"""

from __future__ import annotations

from absl import app, flags

from pec_jax import io
from pec_jax.errors import exit_with_sentence, quiet_libraries

_MODEL = flags.DEFINE_string(
    "model", "shapes", "Pipeline directory, hub id organisation/model@revision, or `shapes`."
)
_VARIANT = flags.DEFINE_string("variant", "", "Of the weights' files, such as fp16.")
_PROMPTS = flags.DEFINE_multi_string(
    "prompts", None, "Prompt file (.txt or .jsonl); give it again for more: train and held-out."
)
_DTYPE = flags.DEFINE_enum(
    "dtype", "float32", ["float32", "bfloat16"], "In which the encoders compute, and of the files."
)
_T5_LENGTH = flags.DEFINE_integer(
    "t5_length", 0, "Tokens T5 sees; 0 is diffusers' choice (SD3 256, FLUX 512).", lower_bound=0
)
_OUT = flags.DEFINE_string("out", None, "Directory to write to.")


def main(argv: list[str]) -> None:
    """Parses, embeds; a mistake of the user becomes one sentence and exit status 2."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}.")
    for flag in (_PROMPTS, _OUT):
        if not flag.value:
            raise app.UsageError(f"--{flag.name} is missing; see --help.")
    from pec_jax.data import (
        encode_prompts as embedding,  # imports jax; --help and typos need not wait for it
    )

    with exit_with_sentence():
        embedding.run(
            _MODEL.value,
            _PROMPTS.value,
            io.path(_OUT.value),
            dtype=_DTYPE.value,
            t5_length=_T5_LENGTH.value,
            variant=_VARIANT.value,
        )


if __name__ == "__main__":
    quiet_libraries()
    app.run(main)
