"""Writes a small random pipeline: `python -m pec_jax.tiny --family=flux --out=DIR`.

A genuine Stable Diffusion 3 or FLUX.1 directory with a random transformer, so that every command
can be tried in seconds before the real weights are fetched. Its tokenizers, text encoders,
autoencoder and the encoders of rewards and perception are those of the embedded default.
"""

from __future__ import annotations

import json
from pathlib import Path

from absl import app, flags

from pec_jax import command_line
from pec_jax.errors import exit_on_user_error

_FAMILY = flags.DEFINE_string(
    "family", "sd3", "Kind of pipeline, such as sd3 or flux; an unknown one lists those there are."
)
_OUT = command_line.required_string("out", "Directory to write; it must not exist.")
_CONFIG = flags.DEFINE_string(
    "transformer", "{}", 'JSON object of transformer config entries, such as {"num_layers": 3}.'
)
_SEED = command_line.define_seed("Seed of the random weights.")


def main(argv: list[str]) -> None:
    """Parses, writes; a mistake of the user becomes one sentence and exit status 2."""
    command_line.refuse_arguments(argv)
    try:
        config = json.loads(_CONFIG.value)
    except json.JSONDecodeError as error:
        raise app.UsageError(f"--transformer is not JSON: {error}") from None
    from pec_jax.families.tiny import write_pipeline  # imports jax; --help need not wait for it

    with exit_on_user_error():
        out = write_pipeline(Path(_OUT.value).expanduser(), _FAMILY.value, config, seed=_SEED.value)
        print(f"{out} is written; its images are 32 pixels wide: --height=32 --width=32.")


if __name__ == "__main__":
    command_line.run(main)
