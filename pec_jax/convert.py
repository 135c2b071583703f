"""Converts torch's files: `python -m pec_jax.convert --file=F.pt --out=DIR`.

Writes the file's tensors as DIR/model.safetensors, names and types unchanged; the source's SHA-256
stands in the header. Only tensors are read: a file that could run code is refused.
"""

from __future__ import annotations

from pec_jax import command_line, io
from pec_jax.errors import exit_on_user_error

_FILE = command_line.required_string("file", "A .pt, .pth, .bin or .safetensors file of tensors.")
_OUT = command_line.required_string("out", "Directory that model.safetensors is written to.")


def main(argv: list[str]) -> None:
    """Parses, converts; a mistake of the user becomes one sentence and exit status 2."""
    command_line.refuse_arguments(argv)
    from pathlib import Path

    from pec_jax.weights import model_files

    with exit_on_user_error():
        print(model_files.convert(Path(io.path(_FILE.value)), Path(io.path(_OUT.value))))


if __name__ == "__main__":
    command_line.run(main)
