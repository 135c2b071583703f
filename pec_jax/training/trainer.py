"""The host loop: data, step, log, save, evaluate. No maths."""

from __future__ import annotations

import functools
import math
import os
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from absl import logging
from clu import parameter_overview
from etils import epath
from jax.sharding import Mesh
from jaxtyping import Array
from ml_collections import ConfigDict

from pec_jax import io
from pec_jax.config import schema
from pec_jax.data.stream import PromptStream
from pec_jax.distributed import mesh as mesh_lib
from pec_jax.distributed import processes
from pec_jax.errors import RunError
from pec_jax.evaluation.fit import exponential_fit
from pec_jax.evaluation.metrics import Moments
from pec_jax.evaluation.steps import read_steps
from pec_jax.rewards.asking import told_by_name
from pec_jax.rl.composition import States
from pec_jax.rl.train_step import base_entropy, train_step
from pec_jax.training import base_cache, base_evaluation, loggers, record
from pec_jax.training.build import (
    BASE_STREAM,
    EVAL_STREAM,
    TRAIN_STREAM,
    Experiment,
    build,
    stream_key,
)
from pec_jax.training.checkpoint import Checkpointer, OtherModelError, told_when_unwritable
from pec_jax.training.evaluator import Evaluation, Evaluator
from pec_jax.training.metric_writer import MetricWriter, make_writer
from pec_jax.training.progress import Lines, make_progress
from pec_jax.training.run_directory import RunDirectory
from pec_jax.types import Batch, PyTree, TrainState

# A bonus that is less than this of the shaped reward's std within a group pays next to nothing.
MIN_SHARE = 0.02
SHOWN = ("reward/mean", "reward/std", "entropy/perceptual", "entropy/policy", "time/step_seconds")


def train(
    config_dict: Mapping[str, Any] | ConfigDict,
    workdir: str | os.PathLike[str],
    *,
    allow_config_change: bool = False,
    log: Sequence[str] = ("tensorboard",),
) -> dict[str, float]:
    """Trains to the end, from the newest checkpoint in `workdir` if there is one.

    Args:
      config_dict: a ConfigDict or nested dict as `configs/base.py` makes it.
      workdir: the run directory, local or gs://BUCKET/PATH.
      allow_config_change: resume although the directory's config differs in what binds a run.
      log: names of `loggers.LOGGERS` that are told of the run, beside its own files.

    Returns:
      The final evaluation, as in `eval.json`; empty if the run was told to stop early.

    Raises:
      ConfigError, RunError, ValueError, OSError: sentences for a person.
    """
    config = schema.from_config_dict(config_dict)
    loggers.check(log)
    mesh = mesh_lib.make_mesh(config)
    with RunDirectory(workdir) as directory:
        start = functools.partial(directory.start, allow_config_change=allow_config_change)
        processes.on_primary(lambda: start(config))
        logging.info("Loading models and encoding prompts ...")
        experiment = build(config, mesh_lib.placement(mesh, config))
        run = _Run(experiment, directory, mesh, log)
        with (
            mesh_lib.active(mesh, config),
            told_when_unwritable(directory.path, directory.checkpoints),
            told_by_name(),
            processes.stop_requests() as stop,
        ):
            return run.loop(stop)


class _Run:
    """One process's share of a run: the compiled step and everything around it."""

    def __init__(
        self, experiment: Experiment, directory: RunDirectory, mesh: Mesh, log: Sequence[str]
    ):
        config = experiment.config
        self._loggers = loggers.Loggers(log, directory.path, schema.to_dict(config))
        self._experiment, self._config, self._directory = experiment, config, directory
        self._mesh = mesh
        self._frozen = mesh_lib.put_replicated(experiment.frozen, mesh)
        self._key = mesh_lib.put_replicated(stream_key(config, TRAIN_STREAM), mesh)
        self._stream = PromptStream(
            len(experiment.tables["train"]), config.batch.groups, config.seed
        )
        self._initial_state = experiment.program.initial_state
        self._shardings = mesh_lib.state_shardings(
            jax.eval_shape(self._initial_state, experiment.params),
            experiment.param_axes,
            experiment.program.learner.optimizer,
            mesh_lib.placement(mesh, config),
        )
        self._params = jax.tree.map(mesh_lib.put_array, experiment.params, self._shardings.params)
        self._step = jax.jit(
            functools.partial(train_step, experiment.program),
            donate_argnums=0,
            out_shardings=(self._shardings, mesh_lib.replicated(mesh)),
        )
        self._checkpointer = Checkpointer(directory.checkpoints, config.schedule.keep_checkpoints)
        eval_key = mesh_lib.put_replicated(stream_key(config, EVAL_STREAM), mesh)
        self._evaluator = Evaluator(experiment, eval_key, mesh)

    def loop(self, stop: processes.StopRequests) -> dict[str, float]:
        """Iterates from where the run stands to its end, or until told to stop."""
        state, first = self._start()
        processes.on_primary(lambda: self._directory.commit(self._config))
        primary = processes.is_primary()
        writer = make_writer(self._directory, first, self._loggers, first=primary)
        progress = make_progress(self._config.num_iterations, first, SHOWN, first=primary)
        log = _Log(writer, progress, self._config)
        iterations = range(first, self._config.num_iterations)
        compiler = ThreadPoolExecutor(1)
        compiling = compiler.submit(self._compile, state) if iterations else None
        try:
            self._base = self._base_evaluation()
            if first == 0:
                writer.ends(0, self._base.numbers)
                self._save_samples(writer, 0, state)
            stopped = False
            for iteration in iterations:
                if stopped := stop.agreed(iteration):
                    break
                assert compiling is not None
                step = compiling.result()
                state, metrics = step(state, self._frozen, self._batch(iteration), self._key)
                log.add(iteration + 1, metrics)
                if iteration + 1 < self._config.num_iterations:
                    self._act(state, iteration + 1, writer, log)
            log.flush()
            return self._finish(state, writer, stopped=stopped)
        finally:
            compiler.shutdown(wait=False)
            progress.close()
            writer.close()
            self._checkpointer.close()

    def _start(self) -> tuple[TrainState, int]:
        """The newest intact checkpoint's state, or a new one; and how many iterations it has.

        Raises:
          RunError: the files of the directory contradict one another.
        """
        state = jax.jit(self._initial_state, out_shardings=self._shardings)(self._params)
        try:
            restored = self._checkpointer.restore(state)
        except OtherModelError as error:
            changes = self._directory.changes(self._config)
            raise RunError("\n  ".join([str(error), *changes.values()])) from None
        if restored is not None:
            step, end = int(restored.step), self._config.num_iterations
            if step > end:
                raise RunError(
                    f"{self._directory.path} has {step} iterations already, more than "
                    f"config.num_iterations = {end}. Choose another --workdir, or at least {step}."
                )
            logging.info("Resuming after iteration %d of %d.", step, end)
            if gap := record.gap(self._directory, step, self._config.schedule.log_every):
                logging.warning("%s", gap)
            return restored, step
        record.check_new(self._directory, self._config.schedule.checkpoint_every)
        logging.info(
            "Trainable parameters:\n%s",
            parameter_overview.get_parameter_overview(
                self._experiment.params, include_stats=False, max_lines=12
            ),
        )
        return state.replace(constraints=self._with_targets(state.constraints)), 0

    def _with_targets(self, states: States) -> States:
        """The constraints' states, with the target of each that has one."""
        found = dict(states)
        for constraint, options in self._experiment.program.learner.constraints:
            if constraint.target is not None:
                base = self._base_entropy(options.base_batches)
                target = constraint.target_entropy(options, base)
                logging.info("It is %.4f nats per dimension; the target is %.4f.", base, target)
                placed = mesh_lib.put_replicated(np.float32(target), self._mesh)
                found[constraint.name] = states[constraint.name] | {"target": placed}
        return found

    def _base_entropy(self, num_batches: int) -> float:
        """The base model's H_perc, mean over some batches of training prompts."""
        measure = jax.jit(
            functools.partial(base_entropy, self._experiment.program),
            out_shardings=mesh_lib.replicated(self._mesh),
        )
        key = stream_key(self._config, BASE_STREAM)
        logging.info("Measuring the base model's perceptual entropy ...")
        values = []
        for i in range(num_batches):
            folded = mesh_lib.put_replicated(jax.random.fold_in(key, i), self._mesh)
            values.append(float(measure(self._params, self._frozen, self._batch(i), folded)))
        return sum(values) / len(values)

    def _batch(self, iteration: int) -> Batch:
        """The prompts of an iteration; each host reads the rows of its own groups."""
        groups = self._config.batch.groups
        ids = self._stream.ids(iteration)[mesh_lib.local_groups(self._mesh, groups)]
        return mesh_lib.put_batch(self._experiment.tables["train"].gather(ids), self._mesh, groups)

    def _compile(self, state: TrainState) -> jax.stages.Compiled:
        """The train step, for states like `state`; in a thread, while the base is evaluated."""
        logging.info("Compiling the train step ...")
        with mesh_lib.active(self._mesh, self._config):  # which a thread does not inherit
            return self._step.lower(state, self._frozen, self._batch(0), self._key).compile()

    def _act(self, state: TrainState, step: int, writer: MetricWriter, log: _Log) -> None:
        """What happens every so many iterations; the last one's is left to `_finish`."""
        every = self._config.schedule
        if _is_due(step, every.sample_every):
            self._save_samples(writer, step, state)
        if _is_due(step, every.eval_every):
            log.flush()
            params = self._eval_params(state)
            evaluation = self._evaluator(params, self._frozen, self._base.moments)
            writer.scalars(step, evaluation.numbers)
        if _is_due(step, every.checkpoint_every):  # last: what it covers has been written by then
            log.flush()
            self._save(writer, state)

    def _finish(
        self, state: TrainState, writer: MetricWriter, *, stopped: bool
    ) -> dict[str, float]:
        step = int(state.step)
        self._save(writer, state)
        self._checkpointer.wait()
        if stopped and step < self._config.num_iterations:
            logging.info("Stopped after iteration %d; the same command resumes it.", step)
            return {}
        self._save_samples(writer, step, state)
        result = self._full_evaluation(self._eval_params(state), self._base.moments).numbers
        writer.ends(step, result)
        result |= {f"base/{name}": value for name, value in self._base.numbers.items()}
        result |= {"seed": self._config.seed, "iterations": step}
        if processes.is_primary():
            result |= reward_entropy_fit(self._directory.metrics_file)
            io.write_json(self._directory.evaluation_file, result)
            _report(result)
        return result

    def _save(self, writer: MetricWriter, state: TrainState) -> None:
        """A checkpoint, after the metrics that it covers, if the directory is still ours."""
        processes.on_primary(self._directory.check_held)
        writer.flush()
        self._checkpointer.save(state)

    def _base_evaluation(self) -> Evaluation:
        """The model as it was before training."""
        directory = self._directory.path
        intact = processes.is_primary() and base_evaluation.read_intact(directory) is not None
        if processes.broadcast_from_primary(intact):
            return base_evaluation.read(directory)
        kept = base_cache.place(self._experiment)
        found = base_cache.read(kept)
        if found is None:
            logging.info("Evaluating the base model ...")
        result = found or self._full_evaluation(self._params)
        if processes.is_primary():
            base_evaluation.write(directory, result)
            if found is None:
                base_cache.write(kept, result)
        return result

    def _full_evaluation(
        self, params: PyTree, base: Mapping[str, Moments] | None = None
    ) -> Evaluation:
        result = self._evaluator(params, self._frozen, base)
        return result._replace(
            numbers=result.numbers | self._evaluator.output_entropy(params, self._frozen)
        )

    def _eval_params(self, state: TrainState) -> PyTree:
        return state.ema if self._config.eval.use_ema else state.params

    def _save_samples(self, writer: MetricWriter, step: int, state: TrainState) -> None:
        processes.on_primary(self._directory.check_held)  # else it would be made anew
        images = self._evaluator.sample_grid(self._eval_params(state), self._frozen)
        path = writer.grid(step, images, [p.text for p in self._experiment.prompts["samples"]])
        logging.info("Samples: %s", path)


def _is_due(step: int, every: int) -> bool:
    return bool(every) and step % every == 0


class _Log:
    """Metrics on their way to the files, one iteration late.

    Reading a number waits for the step that makes it. So the numbers of an iteration are read
    after the next one has been dispatched, and the device never waits for the host.
    """

    def __init__(self, writer: MetricWriter, progress: Lines, config: schema.Config):
        self._writer, self._progress, self._config = writer, progress, config
        self._pending: tuple[int, dict[str, Array], float | None] | None = None
        self._last = time.perf_counter()
        self._warned: set[str] = set()

    def add(self, step: int, metrics: dict[str, Any]) -> None:
        """Takes the numbers of `step`, writes those of the step before."""
        # A step that asks the host in the middle may run while it is dispatched (on CPUs it does).
        done = time.perf_counter() if all(v.is_ready() for v in metrics.values()) else None
        self.flush()
        self._pending = (step, metrics, done)

    def flush(self) -> None:
        """Writes what is pending.

        Raises:
          RunError: after `optimizer.max_skipped` updates in a row that were not finite.
        """
        if self._pending is None:
            return
        step, metrics, done = self._pending
        self._pending = None
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        now = done or time.perf_counter()
        values["time/step_seconds"] = now - self._last
        batch = self._config.batch
        values["time/images_per_second"] = batch.groups * batch.group_size / (now - self._last)
        self._last = now
        if step % self._config.schedule.log_every == 0 or step == self._config.num_iterations:
            self._writer.scalars(step, values)
        self._progress.update(step, values)
        self._check_failures(step, values)
        self._count_skipped(step, values)
        self._warn_of_small_bonuses(values)

    def _warn_of_small_bonuses(self, values: Mapping[str, float]) -> None:
        for name, share in values.items():
            small = name.endswith("/share") and values[name[: -len("share")] + "weight"] > 0
            if small and share < MIN_SHARE and name not in self._warned:
                self._warned.add(name)
                logging.warning(
                    "%s is %.2g: the bonus is that little of the shaped reward's std within a "
                    "group, and hardly changes what is learned. Raise its weight, or count it in "
                    "unit reward_std; with the gaussian estimator, lower config.perception."
                    "bandwidth.",
                    name,
                    share,
                )

    def _check_failures(self, step: int, values: Mapping[str, float]) -> None:
        """Says which images a reward could not judge, and stops where they are too many."""
        for name, options in self._config.rewards.items():
            share = values.get(f"failures/{name}", 0.0)
            if share > options.max_failures:
                raise RunError(
                    f"The reward {name!r} could not judge {share:.0%} of the images of iteration "
                    f"{step}, more than config.rewards.{name}.max_failures = "
                    f"{options.max_failures:.0%}. The newest checkpoint is from before; if the "
                    "images themselves are broken, lower config.optimizer.learning_rate, else look "
                    "at what judges them, and run the same command again."
                )
            if share:
                logging.warning(
                    "Iteration %d: the reward %r could not judge %.1f%% of the images, which are "
                    "left out.",
                    step,
                    name,
                    100 * share,
                )

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
            base = result.get(f"base/{name}", math.nan)  # where no image could be judged
            lines.append(f"{name:32} {base:10.4f} {result[name]:10.4f}")
    logging.info("Held-out evaluation:\n%s", "\n".join(lines))
