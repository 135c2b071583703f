"""Exports a run for diffusers: `python -m pec_jax.export --workdir=DIR --kind=lora --out=DIR`.

The kind `lora` is a file for `pipe.load_lora_weights`, the kind `transformer` a directory for
`from_pretrained`, with the LoRA merged into the weights.
"""

from __future__ import annotations

from absl import app, flags

from pec_jax import io
from pec_jax.errors import exit_with_sentence, quiet_libraries

_WORKDIR = flags.DEFINE_string("workdir", None, "The run whose newest checkpoint is exported.")
_KIND = flags.DEFINE_string("kind", None, "What to write: lora or transformer.")
_OUT = flags.DEFINE_string("out", None, "Directory to write to: new, empty or an earlier export.")
_USE_EMA = flags.DEFINE_bool("use_ema", True, "The averaged parameters, not the last.")
_DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Of the tensors written.")


def main(argv: list[str]) -> None:
    """Parses, exports; a mistake of the user becomes one sentence and exit status 2."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
    for flag in (_WORKDIR, _KIND, _OUT):
        if not flag.value:
            raise app.UsageError(f"--{flag.name} is missing; see --help.")
    from pec_jax.inference import (
        export as exporting,  # imports jax; --help and typos need not wait for it
    )

    with exit_with_sentence():
        exporting.run(
            io.path(_WORKDIR.value),
            _KIND.value,
            io.path(_OUT.value),
            use_ema=_USE_EMA.value,
            dtype=_DTYPE.value,
        )


if __name__ == "__main__":
    quiet_libraries()
    app.run(main)
