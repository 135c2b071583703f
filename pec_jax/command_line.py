"""What the commands share: flags, `--config`, `--plugin`, and mistakes answered in a sentence.

Imports neither jax nor anything that does: `--help` and a mistyped flag are answered at once.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from absl import app, flags
from ml_collections import ConfigDict, config_flags

from pec_jax.config.files import load_config
from pec_jax.config.overrides import check_overrides
from pec_jax.config.user_file import import_plugins
from pec_jax.errors import RunError, quiet_libraries, report

# Flags defined here belong to the command that has them, and so to its --help.
flags.disclaim_key_flags()

# How absl says that a required flag is not there.
_MISSING = re.compile(r"Flag --(\w+) must have a value other than None\.")


class _ConfigParser(flags.ArgumentParser):
    """Loads the config of `--config=NAME_OR_FILE`, after the plugins that it may need."""

    def parse(self, path: str) -> ConfigDict:
        """The config, locked, with every override known to have a field."""
        argv = flags.FLAGS.read_flags_from_files(sys.argv[1:], force_gnu=False)
        import_plugins(list(values_of("plugin", argv)))
        config = load_config(path)
        try:
            check_overrides(config, argv)
        except ValueError as error:  # absl would take it for a mistake in --config's own value
            raise RunError(str(error)) from error
        return config


def define_plugin() -> None:
    """The flag --plugin; the files are imported when flags have been parsed."""
    flags.DEFINE_multi_string(
        "plugin",
        [],
        "A Python file that registers rewards, encoders, constraints or objectives; repeat for "
        "more. It runs before the config file.",
    )


def define_config() -> flags.FlagHolder:
    """The flags --config, whose fields are overridden by --config.a.b=v, and --plugin."""
    define_plugin()
    try:
        holder = config_flags.DEFINE_config_file(
            "config",
            None,
            "Config: a shipped name such as shapes_pec, or a file such as configs/shapes_pec.py. "
            "--config.a.b=v overrides a field.",
        )
    except flags.Error as error:  # it reads a --flagfile at once
        sys.exit(report(str(error)))
    flags.FLAGS["config"].parser = _ConfigParser()
    flags.mark_flag_as_required("config")
    return holder


def required_string(name: str, help_text: str) -> flags.FlagHolder[str]:
    """A flag that must be given, and not empty, as `--out=$UNSET` is."""
    holder = flags.DEFINE_string(name, None, help_text, required=True)
    flags.register_validator(name, lambda value: value != "", message="must not be empty.")
    return holder


def bounded_float(
    name: str, default: float | None, help_text: str, *, low: float, high: float
) -> flags.FlagHolder[Any]:
    """A flag that must be a number in [low, high], which not-a-number is not."""
    holder = flags.DEFINE_float(name, default, help_text, lower_bound=low, upper_bound=high)
    flags.register_validator(
        name,
        lambda value: value is None or math.isfinite(value),
        message=f"must be a number from {low:g} to {high:g}.",
    )
    return holder


def define_seed(help_text: str) -> flags.FlagHolder[int]:
    """The flag --seed; JAX would take larger numbers for smaller ones."""
    return flags.DEFINE_integer("seed", 0, help_text, lower_bound=0, upper_bound=2**32 - 1)


def values_of(name: str, argv: Sequence[str]) -> Iterator[str]:
    """The values of a repeatable flag, before any flag is parsed.

    Args:
        name: the flag, without dashes.
        argv: arguments, without the program's name.
    """
    arguments = iter(argv)
    for argument in arguments:
        if argument == "--":
            return
        flag, equals, value = argument.partition("=")
        if flag in (f"--{name}", f"-{name}"):
            yield value if equals else next(arguments, "")


def run(main: Callable[[list[str]], None]) -> None:
    """Runs a command; a mistake in its flags becomes one sentence and exit status 2."""
    quiet_libraries()

    def answered(argv: list[str]) -> None:
        try:
            main(argv)
        except app.UsageError as error:
            sys.exit(report(str(error)))

    try:
        app.run(answered, flags_parser=parse)
    except KeyboardInterrupt:
        sys.exit(130)


def parse(argv: list[str]) -> list[str]:
    """Parses flags.

    Args:
        argv: the command line, with the program's name.

    Returns:
        The program's name and the arguments that are no flags.

    Raises:
        SystemExit: status 0 after `--help`, 2 after a mistake.
    """
    try:
        return flags.FLAGS(argv)
    except SystemExit:  # absl leaves this way after --help, with status 1
        if "config" in flags.FLAGS and "--helpxml" not in argv:
            sys.stdout.flush()  # what follows imports every reward and method
            from pec_jax.config.describe import describe

            print(f"\n{describe()}")
        sys.exit(0)
    except (flags.Error, RunError, AttributeError, LookupError, TypeError, ValueError) as error:
        # ml_collections reports a mistyped override by any of these
        if any(re.fullmatch(r"--?(v|verbosity)=[1-9]", argument) for argument in argv):
            raise
        missing = [f"--{name}" for name in _MISSING.findall(str(error))]
        are = "is" if len(missing) == 1 else "are"
        sentence = f"{', '.join(missing)} {are} missing; see --help." if missing else str(error)
        sys.exit(report(re.sub(r"^flag (?=--)", "", sentence)))


def refuse_arguments(argv: Sequence[str], hint: str = "") -> None:
    """Refuses what is not a flag.

    Raises:
        app.UsageError: there are such arguments.
    """
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}.{hint}")
