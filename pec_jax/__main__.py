"""Lists the commands, or runs one.

`pec-jax COMMAND [flags]` is the same as `python -m pec_jax.COMMAND [flags]`.
"""

from __future__ import annotations

import ast
import runpy
import sys
from pathlib import Path

import pec_jax
from pec_jax.config.errors import unknown
from pec_jax.errors import report

_HERE = Path(__file__).parent


def commands() -> dict[str, str]:
    """Name -> what it does, from the first line of each command's docstring; imports none."""
    found = {}
    for path in sorted(_HERE.glob("[!_]*.py")):
        source = path.read_text(encoding="utf-8")
        if '\nif __name__ == "__main__":\n' in source:
            line = (ast.get_docstring(ast.parse(source)) or "").partition("\n")[0]
            found[path.stem] = line.partition(": `")[0]
    return found


def main() -> None:
    """The entry point of `pec-jax` and `python -m pec_jax`."""
    known, name = commands(), (sys.argv[1:] or ["--help"])[0]
    if name in ("--help", "-h", "help"):
        print(f"{pec_jax.__doc__}\n\nUsage: pec-jax COMMAND [flags]; pec-jax COMMAND --help\n")
        print("\n".join(f"  {command:<10}{line}" for command, line in known.items()))
    elif name == "--version":
        print(pec_jax.__version__)
    elif name in known:
        del sys.argv[1]
        runpy.run_module(f"pec_jax.{name}", run_name="__main__", alter_sys=True)
    else:
        sys.exit(report(unknown("command", name, known)))


if __name__ == "__main__":
    main()
