"""The host loop: data, step, log, save, evaluate. No maths."""

from __future__ import annotations

import functools
import math
import os
import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from absl import logging
from clu import parameter_overview, periodic_actions
from etils import epath
from jax.sharding import Mesh

from pec_jax import io
from pec_jax.config import schema as config_lib
from pec_jax.data.stream import PromptStream
from pec_jax.distributed import mesh as sharding
from pec_jax.distributed import processes as hosts
from pec_jax.errors import RunError
from pec_jax.evaluation.fit import exponential_fit
from pec_jax.rl import program as program_lib
from pec_jax.rl.program import initial_state
from pec_jax.rl.train_step import base_entropy, train_step
from pec_jax.training.build import (
    BASE_STREAM,
    EVAL_STREAM,
    TRAIN_STREAM,
    World,
    make_world,
    stream_key,
)
from pec_jax.training.checkpoint import Checkpointer, OtherModelError
from pec_jax.training.evaluator import Evaluator
from pec_jax.training.metric_writer import (
    MetricWriter,
    Progress,
    make_writer,
    read_steps,
)
from pec_jax.training.run_directory import RunDirectory
from pec_jax.types import Array, Batch, PyTree, TrainState

SHOWN = ("reward/mean", "reward/std", "entropy/perceptual", "entropy/policy", "time/step_seconds")


def train(
    config_dict: Mapping[str, Any],
    workdir: str | os.PathLike[str],
    *,
    allow_config_change: bool = False,
) -> dict[str, float]:
    """Trains to the end, from the newest checkpoint in `workdir` if there is one.

    Args:
      config_dict: a ConfigDict or nested dict as `configs/base.py` makes it.
      workdir: the run directory, local or gs://BUCKET/PATH.
      allow_config_change: resume although the directory's config differs.

    Returns:
      The final evaluation, as in `eval.json`; empty if the run was told to stop early.

    Raises:
      ConfigError, RunError, ValueError, OSError: sentences for a person.
    """
    config = config_lib.from_config_dict(config_dict)
    mesh = sharding.make_mesh(config)
    with RunDirectory(workdir) as directory:
        start = functools.partial(directory.start, allow_config_change=allow_config_change)
        hosts.first_does(lambda: start(config))
        logging.info("Loading models and encoding prompts ...")
        world = make_world(config, sharding.placement(mesh, config))
        run = _Run(world, directory, mesh)
        with sharding.active(mesh, config), hosts.stop_requests() as stop:
            return run.loop(stop)


class _Run:
    """One process's share of a run: the compiled step and everything around it."""

    def __init__(self, world: World, directory: RunDirectory, mesh: Mesh):
        config = world.config
        self._world, self._config, self._directory = world, config, directory
        self._mesh = mesh
        self._frozen = sharding.put_replicated(world.frozen, mesh)
        self._key = sharding.put_replicated(stream_key(config, TRAIN_STREAM), mesh)
        self._stream = PromptStream(len(world.train), config.batch.groups, config.seed)
        self._shardings = program_lib.state_shardings(
            world.program, world.params, world.param_axes, sharding.placement(mesh, config)
        )
        self._params = jax.tree.map(sharding.put_array, world.params, self._shardings.params)
        self._step = jax.jit(
            functools.partial(train_step, world.program),
            donate_argnums=0,
            out_shardings=(self._shardings, sharding.replicated(mesh)),
        )
        self._checkpointer = Checkpointer(directory.checkpoints, config.schedule.keep_checkpoints)
        eval_key = sharding.put_replicated(stream_key(config, EVAL_STREAM), mesh)
        self._evaluator = Evaluator(world, eval_key, mesh)

    def loop(self, stop: hosts.StopRequests) -> dict[str, float]:
        """Iterates from where the run stands to its end, or until told to stop."""
        state, first = self._start()
        hosts.first_does(lambda: self._directory.commit(self._config))
        writer = make_writer(self._directory, first, first=hosts.is_first())
        progress = Progress(self._config.num_iterations, first, SHOWN, first=hosts.is_first())
        log = _Log(writer, progress, self._config)
        actions = self._actions(writer, log)
        base = self._base_evaluation()
        if first == 0:
            self._save_samples(writer, 0, state)
        logging.info("Compiling the train step: the first iteration takes its time ...")
        try:
            stopped = False
            for iteration in range(first, self._config.num_iterations):
                if stopped := stop.agreed(iteration):
                    break
                batch = self._batch(iteration)
                state, metrics = self._step(state, self._frozen, batch, self._key)
                log.add(iteration + 1, metrics)
                if iteration + 1 < self._config.num_iterations:
                    for action in actions:
                        action(iteration + 1, state=state)
            log.flush()
            return self._finish(state, base, writer, stopped=stopped)
        finally:
            progress.close()
            writer.close()
            self._checkpointer.close()

    def _start(self) -> tuple[TrainState, int]:
        """The newest intact checkpoint's state, or a new one; and how many iterations it has."""
        make = functools.partial(
            initial_state,
            optimizer=self._world.program.optimizer,
            constraint_weight=self._config.constraint.weight,
        )
        state = jax.jit(make, out_shardings=self._shardings)(self._params)
        try:
            restored = self._checkpointer.restore(state)
        except OtherModelError as error:
            changes = self._directory.changes(self._config)
            raise RunError("\n  ".join([str(error), *changes])) from None
        if restored is not None:
            logging.info("Resuming after iteration %d.", int(restored.step))
            return restored, int(restored.step)
        logging.info(
            "Trainable parameters:\n%s",
            parameter_overview.get_parameter_overview(
                self._world.params, include_stats=False, max_lines=12
            ),
        )
        if self._world.program.constraint.needs_target:
            state = state.replace(entropy_target=self._entropy_target())
        return state, 0

    def _entropy_target(self) -> Array:
        """H* = the base model's H_perc over some batches + log of the share to be kept."""
        constraint = self._config.constraint
        measure = jax.jit(
            functools.partial(base_entropy, self._world.program),
            out_shardings=sharding.replicated(self._mesh),
        )
        key = stream_key(self._config, BASE_STREAM)
        logging.info("Measuring the base model's perceptual entropy ...")
        values = []
        for i in range(constraint.base_batches):
            folded = sharding.put_replicated(jax.random.fold_in(key, i), self._mesh)
            values.append(float(measure(self._params, self._frozen, self._batch(i), folded)))
        base = sum(values) / len(values)
        target = base + math.log(constraint.target)
        logging.info("It is %.4f nats a dimension; the target is %.4f.", base, target)
        return sharding.put_replicated(np.float32(target), self._mesh)

    def _batch(self, iteration: int) -> Batch:
        """The prompts of an iteration; each host reads the rows of its own groups."""
        groups = self._config.batch.groups
        ids = self._stream.ids(iteration)[sharding.local_groups(self._mesh, groups)]
        return sharding.put_batch(self._world.train.gather(ids), self._mesh, groups)

    def _actions(self, writer: MetricWriter, log: _Log) -> list[periodic_actions.PeriodicCallback]:
        """What happens every so many iterations; the last one is left to `_finish`."""
        every = self._config.schedule

        def save(state: TrainState) -> None:
            log.flush()
            self._save(writer, state)

        def sample(state: TrainState) -> None:
            self._save_samples(writer, int(state.step), state)

        def evaluate(state: TrainState) -> None:
            log.flush()
            writer.scalars(int(state.step), self._evaluator(self._eval_params(state), self._frozen))

        pairs = (
            (every.sample_every, sample),
            (every.eval_every, evaluate),
            (every.checkpoint_every, save),  # last: what it covers has been written by then
        )
        return [
            periodic_actions.PeriodicCallback(
                every_steps=steps, callback_fn=function, pass_step_and_time=False
            )
            for steps, function in pairs
            if steps
        ]

    def _finish(
        self, state: TrainState, base: dict[str, float], writer: MetricWriter, *, stopped: bool
    ) -> dict[str, float]:
        step = int(state.step)
        self._save(writer, state)
        self._checkpointer.wait()
        if stopped and step < self._config.num_iterations:
            logging.info("Stopped after iteration %d; the same command goes on from there.", step)
            return {}
        self._save_samples(writer, step, state)
        result = self._full_evaluation(self._eval_params(state))
        result |= {f"base/{name}": value for name, value in base.items()}
        result |= {"seed": self._config.seed, "iterations": step}
        if hosts.is_first():
            result |= reward_entropy_fit(self._directory.metrics_file)
            io.write_json(self._directory.evaluation_file, result)
            _report(result)
        return result

    def _save(self, writer: MetricWriter, state: TrainState) -> None:
        """A checkpoint, after the metrics that it covers, if the directory is still ours."""
        hosts.first_does(self._directory.check_held)
        writer.flush()
        self._checkpointer.save(state)

    def _base_evaluation(self) -> dict[str, float]:
        """The model as it was before training; kept in a file, for a resumed run has lost it."""
        path = self._directory.base_evaluation_file
        if hosts.first_says(path.exists()):
            return io.read_json(path)
        result = self._full_evaluation(self._params)
        if hosts.is_first():
            io.write_json(path, result)
        return result

    def _full_evaluation(self, params: PyTree) -> dict[str, float]:
        return self._evaluator(params, self._frozen) | self._evaluator.output_entropy(
            params, self._frozen
        )

    def _eval_params(self, state: TrainState) -> PyTree:
        return state.ema if self._config.eval.use_ema else state.params

    def _save_samples(self, writer: MetricWriter, step: int, state: TrainState) -> None:
        images = self._evaluator.sample_grid(self._eval_params(state), self._frozen)
        path = writer.grid(step, images, [p.text for p in self._world.sample_prompts])
        logging.info("Samples: %s", path)


class _Log:
    """Metrics on their way to the files, one iteration late.

    Reading a number waits for the step that makes it. So the numbers of an iteration are read
    after the next one has been dispatched, and the device never waits for the host.
    """

    def __init__(self, writer: MetricWriter, progress: Progress, config: config_lib.Config):
        self._writer, self._progress, self._config = writer, progress, config
        self._pending: tuple[int, dict[str, Array]] | None = None
        self._last = time.perf_counter()
        self._skipped = 0

    def add(self, step: int, metrics: dict[str, Array]) -> None:
        """Takes the numbers of `step`, writes those of the step before."""
        self.flush()
        self._pending = (step, metrics)

    def flush(self) -> None:
        """Writes what is pending.

        Raises:
          RunError: after `optimizer.max_skipped` updates in a row that were not finite.
        """
        if self._pending is None:
            return
        step, metrics = self._pending
        self._pending = None
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        now = time.perf_counter()
        values["time/step_seconds"] = now - self._last
        batch = self._config.batch
        values["time/images_per_second"] = batch.groups * batch.group_size / (now - self._last)
        self._last = now
        if step % self._config.schedule.log_every == 0 or step == self._config.num_iterations:
            self._writer.scalars(step, values)
        self._progress.update(step, values)
        self._count_skipped(step, values)

    def _count_skipped(self, step: int, values: Mapping[str, float]) -> None:
        if not values["policy/skipped"]:
            return
        in_a_row = int(values["policy/skipped_in_a_row"])
        logging.warning(
            "Iteration %d: a reward or gradient was not finite; %d update(s) in a row left out.",
            step,
            in_a_row,
        )
        if in_a_row >= self._config.optimizer.max_skipped:
            raise RunError(
                f"{in_a_row} updates in a row were not finite (iteration {step}). The parameters "
                "are those before the first of them, in the newest checkpoint. Lower "
                "config.optimizer.learning_rate, or look for the reward that is not finite in "
                "metrics.jsonl."
            )


def reward_entropy_fit(path: epath.Path) -> dict[str, float]:
    """The paper's R = -a exp(H_perc) + b over the iterations of a run; nothing if undefined."""
    steps = read_steps(path)
    fit = exponential_fit(
        [step["reward/mean"] for step in steps], [step["entropy/perceptual"] for step in steps]
    )
    return {f"fit/{k}": v for k, v in fit._asdict().items() if math.isfinite(v)}


def _report(result: Mapping[str, float]) -> None:
    """The final numbers beside those of the base model, for a person."""
    lines = [f"{'metric':32} {'base':>10} {'now':>10}"]
    for name in sorted(result):
        shown = name.startswith(("quality/", "diversity/", "entropy/"))
        if shown and not name.endswith(("/low", "/high")):
            lines.append(f"{name:32} {result[f'base/{name}']:10.4f} {result[name]:10.4f}")
    logging.info("Held-out evaluation:\n%s", "\n".join(lines))
