"""Trains: `python -m pec_jax.main --config=configs/shapes_pec.py --workdir=DIR [--config.a.b=v]`.

Resumes if DIR holds a checkpoint of the same config. On several hosts, start the same command on
each with --distributed.
"""

from __future__ import annotations

import sys

from absl import app, flags

from pec_jax import command_line
from pec_jax.errors import exit_with_sentence, quiet_libraries

_CONFIG = command_line.define_config()
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Directory that the run is written to, and resumed from."
)
_ALLOW_CONFIG_CHANGE = flags.DEFINE_bool(
    "allow_config_change", False, "Resume a run although its config differs from this one."
)
_DISTRIBUTED = flags.DEFINE_bool(
    "distributed", False, "Train together with the other processes that run this command."
)
_COORDINATOR = flags.DEFINE_string(
    "coordinator", None, "host:port of process 0; detected on TPU pods and under Slurm."
)
_NUM_PROCESSES = flags.DEFINE_integer(
    "num_processes",
    None,
    "Number of processes that train together; detected likewise.",
    lower_bound=1,
)
_PROCESS_ID = flags.DEFINE_integer(
    "process_id", None, "Index of this process, from 0; detected likewise.", lower_bound=0
)


def main(argv: list[str]) -> None:
    """Parses, validates, trains; a mistake of the user becomes one sentence and exit status 2."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
    for flag in (_CONFIG, _WORKDIR):
        if not flag.value:
            raise app.UsageError(f"--{flag.name} is missing; see --help.")
    joining = (_COORDINATOR, _NUM_PROCESSES, _PROCESS_ID)
    for flag in joining:
        if flag.value is not None and not _DISTRIBUTED.value:
            raise app.UsageError(f"--{flag.name} means nothing without --distributed.")
    from pec_jax.distributed import processes as hosts
    from pec_jax.training import trainer as train

    with exit_with_sentence():
        if _DISTRIBUTED.value:
            hosts.join(*(flag.value for flag in joining))
        else:
            hosts.refuse_to_run_alone()
        train.train(_CONFIG.value, _WORKDIR.value, allow_config_change=_ALLOW_CONFIG_CHANGE.value)


def run() -> None:
    """The entry point."""
    command_line.make_configs_importable(sys.argv)
    quiet_libraries()
    try:
        app.run(main, flags_parser=command_line.parse)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    run()
