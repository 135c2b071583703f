"""Exports a run for diffusers: `python -m pec_jax.export --workdir=DIR --kind=lora --out=DIR`.

The kind `lora` is a file for `pipe.load_lora_weights`, the kind `transformer` a directory for
`from_pretrained`, with the LoRA merged into the weights.
"""

from __future__ import annotations

from absl import flags

from pec_jax import command_line, io
from pec_jax.config.user_file import import_plugins
from pec_jax.errors import exit_on_user_error

_WORKDIR = command_line.required_string("workdir", "The run whose newest checkpoint is exported.")
_KIND = flags.DEFINE_enum("kind", None, ["lora", "transformer"], "What to write.", required=True)
_OUT = command_line.required_string(
    "out", "Directory to write to: new, empty or an earlier export."
)
_USE_EMA = flags.DEFINE_bool("use_ema", True, "Export the averaged parameters, not the last ones.")
_DTYPE = flags.DEFINE_enum(
    "dtype", "float32", ["float32", "bfloat16"], "Type of the tensors written."
)
command_line.define_plugin()


def main(argv: list[str]) -> None:
    """Parses, exports; a mistake of the user becomes one sentence and exit status 2."""
    command_line.refuse_arguments(argv)
    from pec_jax.inference import export  # imports jax; --help and typos need not wait

    with exit_on_user_error():
        import_plugins(flags.FLAGS.plugin)  # a run's config may name what they register
        export.run(
            io.path(_WORKDIR.value),
            _KIND.value,
            io.path(_OUT.value),
            use_ema=_USE_EMA.value,
            dtype=_DTYPE.value,
        )


if __name__ == "__main__":
    command_line.run(main)
