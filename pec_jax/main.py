"""Trains: `python -m pec_jax.main --config=configs/shapes_pec.py --workdir=DIR [--config.a.b=v]`.

Resumes if DIR holds a checkpoint of the same config.
"""

from __future__ import annotations

import sys
from pathlib import Path

from absl import app, flags
from ml_collections import config_flags

from pec_jax.errors import exit_with_sentence, quiet_libraries

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Config file, e.g. configs/shapes_pec.py.", lock_config=True
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Where the run is written, and resumed from.")
_ALLOW_CONFIG_CHANGE = flags.DEFINE_bool(
    "allow_config_change", False, "Resume a run although its config differs from this one."
)


def make_configs_importable(argv: list[str]) -> None:
    """Lets a config file import its neighbours as `configs.x`, from whichever directory."""
    for i, argument in enumerate(argv):
        name, _, value = argument.lstrip("-").partition("=")
        if argument.startswith("-") and name == "config":
            path = value or (argv[i + 1] if i + 1 < len(argv) else "")
            sys.path.append(str(Path(path).absolute().parent.parent))


def main(argv: list[str]) -> None:
    """Parses, validates, trains; a mistake of the user becomes one sentence and exit status 2."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
    for flag in (_CONFIG, _WORKDIR):
        if not flag.value:
            raise app.UsageError(f"--{flag.name} is missing; see --help.")
    from pec_jax import train  # imports jax; --help and typos need not wait for it

    with exit_with_sentence():
        train.train(_CONFIG.value, _WORKDIR.value, allow_config_change=_ALLOW_CONFIG_CHANGE.value)


def run() -> None:
    """The entry point, with typos in overrides answered in one sentence."""
    make_configs_importable(sys.argv)
    quiet_libraries()
    try:
        app.run(main, flags_parser=_parse)
    except KeyboardInterrupt:
        sys.exit(130)


def _parse(argv: list[str]) -> list[str]:
    try:
        return app.parse_flags_with_usage(argv)
    except (AttributeError, KeyError, TypeError, ValueError, OSError, ImportError) as error:
        # ml_collections reports a misspelt or mistyped override, or a missing file, this way
        sys.exit(f"Error: {error}".replace("\\n", "\n"))


if __name__ == "__main__":
    run()
