"""Fine-tunes a model: `python -m pec_jax.main --config=shapes_pec --workdir=DIR [--config.a.b=v]`.

Resumes if DIR holds a checkpoint of the same config. On several hosts, start the same command on
each with --distributed.
"""

from __future__ import annotations

from absl import app, flags

from pec_jax import command_line
from pec_jax.errors import exit_on_user_error

_CONFIG = command_line.define_config()
_WORKDIR = command_line.required_string(
    "workdir", "Directory that the run is written to, and resumed from."
)
_ALLOW_CONFIG_CHANGE = flags.DEFINE_bool(
    "allow_config_change",
    False,
    "Resume a run although its config differs in a field that binds it.",
)
_LOG = flags.DEFINE_list(
    "log",
    ["tensorboard"],
    "Who is told of the run beside its own files: tensorboard, wandb, mlflow; jsonl alone is none.",
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
_JOIN_TIMEOUT = flags.DEFINE_integer(
    "join_timeout", 300, "Seconds for which the other processes are waited for.", lower_bound=1
)


def main(argv: list[str]) -> None:
    """Parses, validates, trains; a mistake of the user becomes one sentence and exit status 2."""
    command_line.refuse_arguments(argv)
    for flag in (_COORDINATOR, _NUM_PROCESSES, _PROCESS_ID):
        if flag.value is not None and not _DISTRIBUTED.value:
            raise app.UsageError(f"--{flag.name} means nothing without --distributed.")
    from pec_jax.config.schema import from_config_dict
    from pec_jax.training import loggers

    with exit_on_user_error():
        from_config_dict(_CONFIG.value)  # what it refuses need not wait for jax
        loggers.check(_LOG.value)
        from pec_jax import compilation
        from pec_jax.distributed import joining
        from pec_jax.training import trainer as train

        if _DISTRIBUTED.value:
            joining.join(
                _COORDINATOR.value,
                _NUM_PROCESSES.value,
                _PROCESS_ID.value,
                timeout=_JOIN_TIMEOUT.value,
            )
        else:
            joining.refuse_unjoined_process()
        compilation.keep_programs()
        train.train(
            _CONFIG.value,
            _WORKDIR.value,
            allow_config_change=_ALLOW_CONFIG_CHANGE.value,
            log=_LOG.value,
        )


def run() -> None:
    """The entry point."""
    command_line.run(main)


if __name__ == "__main__":
    run()
