"""The loop under every stage of pretraining: seeded and resumable.

A stage gives a loss; the loop gives AdamW with warm-up and cosine decay, an exponential moving
average of the parameters, a snapshot every minute, a progress bar and a log.
"""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from safetensors.numpy import load_file, save_file
from tqdm import tqdm

PyTree = Any
# (params, ema, extra, batch, key) -> (loss, (metrics, next extra))
Loss = Callable[..., tuple[jax.Array, tuple[dict[str, jax.Array], PyTree]]]


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How one stage is optimised."""

    name: str
    steps: int
    learning_rate: float
    weight_decay: float = 0.01
    warmup: int = 50
    b2: float = 0.99
    ema_decay: float = 0.99
    log_every: int = 10
    clip: float = 1.0

    def scaled(self, steps_scale: float) -> Recipe:
        """The same recipe for a multiple of its steps, in whole rounds of logging."""
        rounds = max(1, round(self.steps * steps_scale / self.log_every))
        return dataclasses.replace(self, steps=rounds * self.log_every)

    def optimizer(self) -> optax.GradientTransformation:
        """AdamW behind a global-norm clip; decay is for matrices, not for biases and norms."""
        warmup = min(self.warmup, self.steps // 4)
        rate = optax.warmup_cosine_decay_schedule(
            0.0, self.learning_rate, warmup, self.steps, 0.02 * self.learning_rate
        )
        return optax.chain(
            optax.clip_by_global_norm(self.clip),
            optax.adamw(
                rate,
                b2=self.b2,
                weight_decay=self.weight_decay,
                mask=lambda params: jax.tree.map(lambda p: p.ndim > 1, params),
            ),
        )


@struct.dataclass
class FitState:
    """All that a stage must remember between two dispatches."""

    step: jax.Array
    params: PyTree
    ema: PyTree
    opt_state: optax.OptState
    extra: PyTree


@dataclasses.dataclass(frozen=True)
class Session:
    """Where a pretraining run keeps what is not part of the model directory."""

    out: Path
    state: Path
    seed: int = 0
    steps_scale: float = 1.0
    snapshot_seconds: float = 60.0

    def key(self, stage: str) -> jax.Array:
        """The PRNG key of a stage: the run's seed and the stage's name decide it."""
        return jax.random.fold_in(jax.random.key(self.seed), int.from_bytes(stage.encode()[-4:]))

    def numbers_path(self, stage: str) -> Path:
        return self.state / f"{stage}.json"

    def finish(self, stage: str, numbers: dict[str, Any]) -> None:
        """Marks a stage as done, with its numbers, and drops its snapshots."""
        self.state.mkdir(parents=True, exist_ok=True)
        write_atomically(self.numbers_path(stage), (json.dumps(numbers, indent=1) + "\n").encode())
        for snapshot in self.state.glob(f"{stage}*.safetensors"):
            snapshot.unlink()

    @property
    def log_path(self) -> Path:
        return self.state / "log.jsonl"

    def earlier_seconds(self, stage: str) -> float:
        """What processes that were interrupted in a stage have spent on what they left of it."""
        spent: dict[str, tuple[float, float]] = {}  # recipe -> by processes before, by the last one
        lines = self.log_path.read_text().splitlines() if self.log_path.exists() else []
        for row in map(json.loads, lines):
            if row["stage"] != stage and not row["stage"].startswith(f"{stage}-"):
                continue
            before, last = spent.get(row["stage"], (0.0, 0.0))
            if row["step"] <= Recipe.log_every:  # begun anew
                before = 0.0
            elif row["seconds"] < last:  # another process went on
                before += last
            spent[row["stage"]] = before, row["seconds"]
        return sum(before + last for before, last in spent.values())

    def numbers(self, stage: str) -> dict[str, Any] | None:
        """The numbers of a finished stage, or None."""
        path = self.numbers_path(stage)
        return json.loads(path.read_text()) if path.exists() else None


def write_atomically(path: Path, content: bytes) -> None:
    """Writes a file so that it is either absent, old, or complete."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(content)
    os.replace(temporary, path)


def save_tree(path: Path, tree: PyTree) -> None:
    """Writes a pytree's leaves as safetensors, named by their place in the tree."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    named = {jax.tree_util.keystr(place): np.asarray(leaf) for place, leaf in leaves}
    temporary = path.with_name(path.name + ".tmp")
    save_file(named, temporary)
    os.replace(temporary, path)


def load_tree(path: Path, like: PyTree) -> PyTree:
    """Reads what `save_tree` wrote into the structure of `like`.

    Raises:
        ValueError: if the file belongs to another tree; names the leaf.
    """
    stored = load_file(path)

    def restore(place, leaf):
        name = jax.tree_util.keystr(place)
        if name not in stored or stored[name].shape != leaf.shape:
            found = stored[name].shape if name in stored else "nothing"
            raise ValueError(f"{path}: {name} should have shape {leaf.shape}, found {found}.")
        return jnp.asarray(stored[name], leaf.dtype)

    return jax.tree_util.tree_map_with_path(restore, like)


def _step(loss: Loss, recipe: Recipe) -> Callable[..., tuple[FitState, dict[str, jax.Array]]]:
    """One jitted optimisation step; no scan over steps, in which XLA's CPU convolutions crawl."""
    optimizer = recipe.optimizer()

    def step(state: FitState, batch: PyTree, key: jax.Array):
        (value, (metrics, extra)), grads = jax.value_and_grad(loss, has_aux=True)(
            state.params, state.ema, state.extra, batch, key
        )
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        # A young average must not remember the random initialisation.
        decay = jnp.minimum(recipe.ema_decay, (1.0 + state.step) / (10.0 + state.step))
        ema = jax.tree.map(lambda e, p: e + (1.0 - decay) * (p - e), state.ema, params)
        return FitState(state.step + 1, params, ema, opt_state, extra), {"loss": value, **metrics}

    return jax.jit(step, donate_argnums=0)


def fit(
    session: Session,
    recipe: Recipe,
    loss: Loss,
    params: PyTree,
    draw: Callable[[jax.Array], PyTree],
    extra: PyTree = None,
) -> FitState:
    """Trains for the recipe's steps; resumes from the stage's last snapshot if there is one.

    Args:
        session: directories, seed and scale of the steps.
        recipe: steps and optimiser.
        loss: (params, ema, extra, batch, key) -> (loss, (metrics, next extra)).
        params: initial parameters.
        draw: key -> batch, made of jitted parts but not jitted as a whole: fused with the network,
            XLA would draw the same picture again for each of its uses.
        extra: further state that the loss carries on from step to step.

    Returns:
        The final state; its `ema` is what is worth keeping.

    Raises:
        FloatingPointError: if the loss is not finite.
    """
    recipe = recipe.scaled(session.steps_scale)
    session.state.mkdir(parents=True, exist_ok=True)
    snapshot = session.state / f"{recipe.name}.safetensors"
    params = jax.tree.map(lambda p: jnp.array(p, copy=True), params)
    state = FitState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        ema=jax.tree.map(jnp.copy, params),
        opt_state=recipe.optimizer().init(params),
        extra=extra,
    )
    if snapshot.exists():
        state = load_tree(snapshot, state)
    one_step, key = _step(loss, recipe), session.key(recipe.name)
    first, saved, start = int(state.step), time.monotonic(), time.monotonic()
    line = int(os.environ.get("PEC_JAX_PRETRAIN_SLOT", 0))  # where several stages run side by side
    bar = tqdm(
        total=recipe.steps,
        initial=first,
        desc=recipe.name,
        unit="step",
        mininterval=1.0,
        position=line,
    )
    with bar, session.log_path.open("a") as log:
        for done in range(first + recipe.log_every, recipe.steps + 1, recipe.log_every):
            rows = []
            for step in range(done - recipe.log_every, done):
                step_key, draw_key = jax.random.split(jax.random.fold_in(key, step))
                state, metrics = one_step(state, draw(draw_key), step_key)
                rows.append(metrics)
            means = {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}
            if not np.isfinite(means["loss"]):
                raise FloatingPointError(f"{recipe.name}: loss {means['loss']} at step {done}.")
            now = time.monotonic()
            row = {"stage": recipe.name, "step": done, "seconds": round(now - start, 1), **means}
            log.write(json.dumps(row) + "\n")
            log.flush()
            bar.set_postfix({name: f"{value:.4g}" for name, value in means.items()}, refresh=False)
            bar.update(recipe.log_every)
            # The end is kept too: a stage may be interrupted in what follows its training.
            if now - saved > session.snapshot_seconds or done == recipe.steps:
                save_tree(snapshot, state)
                saved = now
    return state
