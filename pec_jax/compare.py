"""Compares finished runs: `python -m pec_jax.compare RUN_DIR... --out=DIR`.

Writes the paper's normalised table (`table.csv`, `table.md`), its figures (`figures/*.png`) and
`report.html`. A RUN_DIR may also be a directory of run directories; `--table=F.csv` compares the
rows of a table instead.
"""

from __future__ import annotations

from absl import app, flags

from pec_jax import command_line, io
from pec_jax.errors import exit_on_user_error

_TABLE = flags.DEFINE_string(
    "table", None, "Csv file with the columns method, quality/* and diversity/*."
)
_OUT = command_line.required_string("out", "Directory to write to.")


def main(argv: list[str]) -> None:
    """Parses, compares; a mistake of the user becomes one sentence and exit status 2."""
    if bool(_TABLE.value) == bool(argv[1:]):
        raise app.UsageError("give either run directories or --table=F.csv; see --help.")
    from pec_jax.evaluation import comparison  # imports matplotlib; --help need not wait for it

    with exit_on_user_error():
        out = io.path(_OUT.value)
        if _TABLE.value:
            comparison.compare_csv(io.path(_TABLE.value), out)
        else:
            comparison.compare_runs([io.path(name) for name in argv[1:]], out)


if __name__ == "__main__":
    command_line.run(main)
