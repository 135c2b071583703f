"""What the commands that take `--config` share; imports neither jax nor anything that does."""

from __future__ import annotations

import sys
from pathlib import Path

from absl import app, flags
from ml_collections import config_flags


def define_config() -> flags.FlagHolder:
    """The flag --config, whose fields are overridden by --config.a.b=v."""
    return config_flags.DEFINE_config_file(
        "config", None, "Config file, e.g. configs/shapes_pec.py.", lock_config=True
    )


def make_configs_importable(argv: list[str]) -> None:
    """Lets a config file import its neighbours as `configs.x`, from whichever directory."""
    for i, argument in enumerate(argv):
        name, _, value = argument.lstrip("-").partition("=")
        if argument.startswith("-") and name == "config":
            path = value or (argv[i + 1] if i + 1 < len(argv) else "")
            sys.path.append(str(Path(path).absolute().parent.parent))


def parse(argv: list[str]) -> list[str]:
    """Parses flags, with typos in overrides answered in one sentence."""
    try:
        return app.parse_flags_with_usage(argv)
    except (AttributeError, KeyError, TypeError, ValueError, OSError, ImportError) as error:
        # ml_collections reports a misspelt or mistyped override, or a missing file, this way
        sys.exit(f"Error: {error}".replace("\\n", "\n"))
