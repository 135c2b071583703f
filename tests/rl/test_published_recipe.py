"""One iteration of Flow-GRPO as published, in PyTorch beside ours: rollout, advantages, updates.

Tiny pipelines in float32. Both sides take the same prompts, start, noise, rewards and adapters; the
second implementation is `recipe_oracle.py`.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax import traverse_util

from pec_jax.config import Config, from_config_dict
from pec_jax.configs import flux_grpo, sd3_grpo
from pec_jax.families.pipeline import load_pipeline
from pec_jax.families.tiny import write_pipeline
from pec_jax.models.lora import linear_layers
from pec_jax.perception.networks import Networks
from pec_jax.rl import rollout as rollouts
from pec_jax.rl.advantages import group_advantages
from pec_jax.rl.average import Average
from pec_jax.rl.train_step import Program
from pec_jax.rl.update import update
from pec_jax.training import build, parts
from pec_jax.types import Batch, Conditioning, Frozen, Rollout, Trajectory
from tests.rl import recipe_oracle as published

GROUPS, SIZE, STEPS, RANK, ALPHA = 3, 4, 4, 4, 8.0
IMAGES = GROUPS * SIZE
# Finished iterations of two updates: so the average moves at the first update, the 7th of all.
BEFORE = 3
PIXELS = 32
CONFIGS = {"sd3": sd3_grpo, "flux": flux_grpo}
ENDS = {"sd3": published.SD3_TARGETS, "flux": published.FLUX_TARGETS}
TRANSFORMERS = {
    "sd3": {"num_layers": 2, "dual_attention_layers": [0]},
    "flux": {"num_layers": 1, "num_single_layers": 1},
}
# As PickScore's; the second group's are equal, so that its advantages are 0.
REWARDS = np.random.default_rng(1).normal(0.22, 0.02, (GROUPS, SIZE)).astype(np.float32)
REWARDS[1] = 0.21
# float32 on both sides: sums over 256 latents and over tokens in another order differ by 1e-6
# of a velocity's size, which guidance and the steps amplify about tenfold.
TOLERANCE = 1e-4


# Each program runs once: most of the time would go into optimizing its machine code.
jit = functools.partial(
    jax.jit,
    compiler_options={
        "xla_backend_optimization_level": 0,
        "xla_llvm_disable_expensive_passes": True,
    },
)


class Case(NamedTuple):
    """A published recipe: what the oracle is told, and what our config changes in the family's."""

    family: str
    recipe: published.Recipe
    guidance: float
    fields: dict[str, Any]


def recipe(**changes: Any) -> published.Recipe:
    """The published values, and KL in all of them.

    The published learning rate is 3e-4. Here it is one at which ratios of the second update lie
    close to the clip range on either side: twice or half the range would be seen.
    """
    return published.Recipe(beta=0.01, **changes)


CASES = {
    "sd3": Case(
        "sd3",
        recipe(
            kind="sde",
            noise_levels=(0.7,) * STEPS,
            trained=(0, 1, 2),
            drop_zero=True,
            learning_rate=1e-4,
            microbatches=2,
        ),
        4.5,
        {},
    ),
    # Flow-GRPO-Fast. Its configs leave out guidance and KL, which its code has.
    "sd3 cps": Case(
        "sd3",
        recipe(
            kind="cps",
            noise_levels=(0.8, 0.8, 0, 0),
            trained=(0, 1),
            drop_zero=True,
            learning_rate=7e-5,
            microbatches=2,
        ),
        4.5,
        {
            "sampler.kernel": "cps",
            "sampler.noise": "trained",
            "sampler.log_density": "squared_error",
            "sampler.noise_level": 0.8,
            "sampler.window": (0, 2),
        },
    ),
    # Its config leaves out the KL. Gradients of so small a model have norms of .02 and .05, so that
    # one of them is clipped at .03; `test_the_optimizer_is_the_published_one` has the config's 1.
    "flux": Case(
        "flux",
        recipe(
            kind="sde",
            noise_levels=(0.9,) * STEPS,
            trained=(0, 1, 2),
            drop_zero=False,
            learning_rate=3e-4,
            microbatches=6,
            max_grad_norm=0.03,
        ),
        3.5,
        {"constraints.kl.weight": 0.01, "optimizer.grad_clip": 0.03},
    ),
}


def config_of(case: Case, root: Path) -> Config:
    """The shipped config of the family, at a tiny size and in float32."""
    config = CONFIGS[case.family].get_config()
    config.model.update({"path": str(root), "height": PIXELS, "width": PIXELS, "remat": "none"})
    config.model.update({"dtype": "float32", "param_dtype": "float32"})
    config.sampler.update({"num_steps": STEPS, "storage_dtype": "float32"})
    config.trainable.update({"rank": RANK, "alpha": ALPHA})
    config.batch.update({"groups": GROUPS, "group_size": SIZE})
    config.optimizer.learning_rate = case.recipe.learning_rate
    for section in (config.rewards.pickscore, config.encoders.pickscore, config.encoders.dino):
        section.model = ""  # the pipeline's own
    config.update_from_flattened_dict(case.fields)
    return from_config_dict(config)


class Ours(NamedTuple):
    """Our side of a case."""

    root: Path
    program: Program
    inputs: tuple[Frozen, Batch]
    adapters: Any  # tree of random adapters, both factors far from 0

    def by_name(self, tree: Any) -> dict[str, np.ndarray]:
        """The arrays of a tree like `adapters` under torch's names."""
        layers, found = linear_layers(self.inputs[0].transformer["params"]), {}
        for path, values in traverse_util.flatten_dict(tree).items():
            values = np.asarray(values)
            stacked = values if values.ndim == 3 else values[None]
            found |= {
                f"{name}.{path[-1]}": value
                for name, value in zip(layers[path[:-1]], stacked, strict=True)
            }
        return found


def load(case: Case, root: Path) -> Ours:
    """Reads a pipeline as a run does, but draws prompts' embeddings at random."""
    config, rng = config_of(case, root), np.random.default_rng(2)
    pipeline = load_pipeline(root, text=False)
    judges = build.make_judges(config, Networks(root / "encoders", Path))

    def prompts(count):
        draw = lambda a: jnp.asarray(rng.normal(size=(count, *a.shape)), jnp.float32)  # noqa: E731
        return jax.tree.map(draw, pipeline.conditioning_shapes())

    frozen = Frozen(pipeline.transformer_variables, pipeline.vae_variables, prompts(1), {})
    batch = Batch(jnp.arange(GROUPS), prompts(GROUPS), {})
    adapters = jax.tree.map(
        lambda a: jnp.asarray(0.2 * rng.normal(size=a.shape), jnp.float32),
        parts.trainable_params(config, pipeline.transformer_variables["params"]),
    )
    program = build.make_program(config, pipeline, judges)
    return Ours(root, program, (frozen, batch), adapters)


def text_of(conditioning: Conditioning, repeats: int = 1) -> published.Text:
    """Prompts for the oracle, each several times."""
    return published.Text(
        *(
            torch.tensor(np.repeat(np.asarray(a), repeats, axis=0))
            for a in (conditioning.tokens, conditioning.pooled)
        )
    )


def oracle_of(case: Case, ours: Ours) -> tuple[published.Model, list[str]]:
    """The oracle's model without adapters, and the layers that the published code adapts."""
    if case.family == "sd3":
        negative = text_of(ours.inputs[0].negative)
        model = published.sd3(ours.root, STEPS, case.guidance, negative)
    else:
        height, width, _ = ours.program.drawing.policy.latent_shape
        model = published.flux(ours.root, STEPS, case.guidance, (height, width))
    return model, published.targets(model.transformer, ENDS[case.family])


def to_oracle(family: str, x: Any) -> torch.Tensor:
    """Our latents [..., h, w, C] in the layout of the oracle."""
    x = torch.tensor(np.asarray(x)).movedim(-1, -3)
    if family == "sd3":
        return x
    *lead, channels, height, width = x.shape
    packed = diffusers.FluxPipeline._pack_latents(
        x.reshape(-1, channels, height, width), int(np.prod(lead)), channels, height, width
    )
    return packed.reshape(*lead, *packed.shape[1:])


def to_ours(family: str, x: torch.Tensor) -> np.ndarray:
    """The way back."""
    if family == "flux":
        flat = diffusers.FluxPipeline._unpack_latents(x.flatten(0, -3), PIXELS, PIXELS, 4)
        x = flat.reshape(*x.shape[:-2], *flat.shape[1:])
    return x.movedim(-3, -1).numpy()


def step_noise(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """What a rollout draws [T, N, ...]: its key is folded with the image and then the step."""

    def draw(step, image):
        image_key = jax.random.fold_in(key, image)
        return jax.random.normal(jax.random.fold_in(image_key, step), shape)

    over_images = jax.vmap(draw, (None, 0))
    return jax.vmap(over_images, (0, None))(jnp.arange(STEPS), jnp.arange(IMAGES))


@pytest.fixture(scope="module", autouse=True)
def one_torch_thread():
    """On busy cores torch's threads wait for each other: minutes, where one takes a second."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Drawn(NamedTuple):
    """One rollout on both sides."""

    case: Case
    ours: Ours
    path: Trajectory
    model: published.Model
    layers: list[str]
    parameters: dict[str, torch.nn.Parameter]
    states: torch.Tensor  # [T + 1, N, ...]
    logps: torch.Tensor  # [T, N]


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory):
    """Family -> directory; cached."""

    @functools.cache
    def write(family):
        root = tmp_path_factory.mktemp(family) / "model"
        return write_pipeline(root, family, TRANSFORMERS[family])

    return write


@pytest.fixture(scope="module", params=CASES)
def drawn(request, pipelines):
    with jax.default_matmul_precision("highest"):
        case = CASES[request.param]
        ours = load(case, pipelines(case.family))
        key, shape = jax.random.key(3), ours.program.drawing.policy.latent_shape
        sample = jit(functools.partial(rollouts.rollout, ours.program.drawing))
        path = sample(ours.adapters, ours.inputs, key)
        noise = jit(step_noise, static_argnums=1)(jax.random.fold_in(key, 1), shape)
        model, layers = oracle_of(case, ours)
        values = ours.by_name(ours.adapters)
        parameters = published.adapt(model.transformer, layers, values, ALPHA / RANK)
        states, logps = published.rollout(
            model,
            case.recipe,
            to_oracle(case.family, path.x_t[0]),
            to_oracle(case.family, noise),
            text_of(ours.inputs[1].conditioning, SIZE),
        )
        yield Drawn(case, ours, path, model, layers, parameters, states, logps)


class Recording(NamedTuple):
    """The state of an optimizer that remembers."""

    inner: optax.OptState
    count: jax.Array
    grads: Any  # [updates, ...] before clipping
    params: Any  # [updates, ...] before the update


def recording(inner: optax.GradientTransformation, updates: int) -> optax.GradientTransformation:
    """The same optimizer, which remembers the gradients and parameters it is given."""

    def init(params):
        empty = jax.tree.map(lambda a: jnp.zeros((updates, *a.shape)), params)
        return Recording(inner.init(params), jnp.int32(0), empty, empty)

    def step(grads, state, params):
        changes, after = inner.update(grads, state.inner, params)
        seen = (
            jax.tree.map(lambda a, new: a.at[state.count].set(new), old, now)
            for old, now in ((state.grads, grads), (state.params, params))
        )
        return changes, Recording(after, state.count + 1, *seen)

    return optax.GradientTransformation(init, step)


class Trained(NamedTuple):
    """The two updates of one iteration on both sides; arrays by torch's names."""

    drawn: Drawn
    start: dict[str, np.ndarray]
    expected: list[published.Update]
    grads: list[dict[str, np.ndarray]]  # of each update
    parameters: list[dict[str, np.ndarray]]  # after each update
    ema: dict[str, np.ndarray]
    metrics: dict[str, float]


@pytest.fixture(scope="module")
def trained(drawn):
    """Both sides learn from the oracle's trajectory."""
    case, ours = drawn.case, drawn.ours
    text = text_of(ours.inputs[1].conditioning, SIZE)
    samples = published.Samples(drawn.states, drawn.logps, published.advantages(REWARDS), text)
    start = published.arrays(drawn.parameters)
    expected = published.train(
        drawn.model, drawn.parameters, case.recipe, samples, BEFORE * case.recipe.updates
    )
    states = jnp.asarray(to_ours(case.family, drawn.states))
    path = Trajectory(states[-1], states[:-1], states[1:], jnp.asarray(drawn.logps.numpy()))
    learner = ours.program.learner
    learner = dataclasses.replace(
        learner, optimizer=recording(learner.optimizer, case.recipe.updates)
    )
    program = dataclasses.replace(ours.program, learner=learner)
    state = program.initial_state(ours.adapters).replace(step=jnp.int32(BEFORE))
    found = Rollout(path, jnp.asarray(REWARDS), jnp.zeros_like(REWARDS))
    learn = jit(functools.partial(update, learner))
    state, metrics = learn(state, ours.inputs, found, jax.random.key(0))
    seen, name = state.opt_state, ours.by_name
    return Trained(
        drawn,
        start,
        expected,
        [name(jax.tree.map(operator.itemgetter(i), seen.grads)) for i in range(len(expected))],
        [name(jax.tree.map(operator.itemgetter(1), seen.params)), name(state.params)],
        name(state.ema),
        {key: float(value) for key, value in metrics.items()},
    )


def test_the_lora_is_on_the_published_layers(drawn):
    ours = {name.rpartition(".")[0] for name in drawn.ours.by_name(drawn.ours.adapters)}
    assert ours == set(drawn.layers)
    if drawn.case.family == "sd3":  # which has a second attention, and leaves it alone
        assert any(".attn2." in name for name, _ in drawn.model.transformer.named_modules())


def test_the_rollout_takes_the_published_steps(drawn):
    """Also the last step of FLUX, which is noisy though it is not trained."""
    expected = to_ours(drawn.case.family, drawn.states)
    scale = expected.std(axis=tuple(range(1, expected.ndim)), keepdims=True)
    assert (np.abs(drawn.path.x_next - expected[1:]) < TOLERANCE * scale[1:]).all()
    assert (np.abs(drawn.path.x_0 - expected[-1]) < TOLERANCE * scale[-1]).all()


def test_the_rollout_has_the_published_log_probs(drawn):
    recipe = drawn.case.recipe
    np.testing.assert_allclose(drawn.path.logp, drawn.logps.numpy(), atol=TOLERANCE, rtol=0)
    noisy = np.asarray(recipe.noise_levels) > 0
    np.testing.assert_array_equal(np.any(drawn.path.logp != 0, axis=1), noisy)
    sampler = drawn.ours.program.drawing.policy.sampler
    assert tuple(sampler.trained_steps) == recipe.trained


def test_the_advantages_are_the_published_ones():
    rewards = np.random.default_rng(4).normal(0.22, 0.02, (6, 24)).astype(np.float32)
    rewards[2] = 0.3  # a group of equal rewards
    rewards[4, 3] = 0.5  # beyond 5 standard deviations
    expected = np.clip(published.advantages(rewards), -5, 5)
    found = group_advantages(rewards, std="global")
    # float32 keeps rewards to 1e-8, which the std of .03 divides.
    np.testing.assert_allclose(found, expected, atol=1e-5, rtol=0)
    assert expected[4, 3] == 5 and not expected[2].any() and not np.any(found[2])


def test_some_ratios_are_clipped_in_the_second_update_and_some_are_not(trained):
    """Of the oracle: else the comparisons would not see the clipping."""
    first, second = trained.expected
    assert first.clip_fraction == 0 and first.stopped == 0
    assert 0 < second.stopped < 1 and second.clip_fraction > 0


def test_the_gradients_are_the_published_ones(trained):
    for found, expected in zip(trained.grads, trained.expected, strict=True):
        # Sums over images, tokens and steps in another order, in which much cancels: against
        # float64, both sides are off by up to 6e-5 of the smaller tensors.
        whole = np.sqrt(sum(np.square(g).sum() for g in expected.grads.values()))
        typical = whole / np.sqrt(len(expected.grads))
        assert expected.grad_norm == pytest.approx(whole, rel=1e-5)
        for name, value in expected.grads.items():
            error = np.linalg.norm(found[name] - value)
            assert error < TOLERANCE * max(np.linalg.norm(value), typical), name


def rounding_allowed(trained: Trained, name: str, updates: int) -> np.ndarray:
    """How far a parameter may be off after some updates, elementwise.

    Of each update 1e-4 of its change, which the learning rate bounds. Adam divides by the size |g|
    of an element's gradients, so that rounding of 1e-4 of the tensor's is 1e-4 rms / |g| of a step.
    And a parameter is rounded itself, twice an update on either side.
    """
    rate = trained.drawn.case.recipe.learning_rate
    allowed, squares = 2 * updates * np.spacing(np.abs(trained.start[name])), []
    for update_ in trained.expected[:updates]:
        squares.append(np.square(update_.grads[name]))
        size = np.sqrt(np.mean(squares, axis=0))
        rms = np.sqrt(np.mean(squares))
        enlarged = np.divide(TOLERANCE * rms, size, out=np.zeros_like(size), where=size > 0)
        allowed = allowed + rate * (TOLERANCE + enlarged)
    return allowed


@pytest.mark.parametrize("updates", [1, 2])
def test_the_parameters_are_the_published_ones(trained, updates):
    found, expected = trained.parameters[updates - 1], trained.expected[updates - 1].parameters
    assert set(found) == set(expected)
    for name, value in expected.items():
        error = np.abs(found[name] - value)
        assert (error <= rounding_allowed(trained, name, updates)).all(), name


def test_the_average_moves_as_the_published_one(trained):
    """The start is left behind at the 7th update, by 8 / 17 for each micro-batch."""
    left = (8 / 17) ** trained.drawn.case.recipe.microbatches
    for name, value in trained.expected[-1].ema.items():
        start, after = trained.start[name], trained.expected[0].parameters[name]
        np.testing.assert_allclose(value - start, (1 - left) * (after - start), atol=1e-7)
        error = np.abs(trained.ema[name] - value)
        assert (error <= rounding_allowed(trained, name, 1)).all(), name


def test_the_metrics_are_the_published_ones(trained):
    """Ours are means over the updates. Ratios of dropped samples are in ours only."""
    metrics, expected, recipe = trained.metrics, trained.expected, trained.drawn.case.recipe

    def mean(field):
        return np.mean([getattr(update, field) for update in expected])

    # The losses of the two updates, of size .3 to .5, almost cancel.
    assert metrics["policy/loss"] == pytest.approx(mean("loss"), abs=TOLERANCE * 0.1)
    kl_loss = recipe.beta * mean("kl_loss")
    assert metrics["constraint/kl/loss"] == pytest.approx(kl_loss, rel=TOLERANCE)
    assert metrics["policy/grad_norm"] == pytest.approx(mean("grad_norm"), rel=TOLERANCE)
    assert metrics["policy/logp_drift"] < TOLERANCE
    if not recipe.drop_zero:
        assert metrics["policy/clip_fraction"] == pytest.approx(mean("clip_fraction"), abs=1e-6)


def test_the_optimizer_is_the_published_one():
    """AdamW behind clipping at norm 1, with a rate at which weight decay shows in float32."""
    config = sd3_grpo.get_config()
    config.optimizer.learning_rate = 0.1
    optimizer = parts.make_optimizer(from_config_dict(config))
    recipe = dataclasses.replace(CASES["sd3"].recipe, learning_rate=0.1)
    rng = np.random.default_rng(5)
    params = jnp.asarray(rng.normal(size=(8, 5)), jnp.float32)
    theirs = torch.nn.Parameter(torch.tensor(np.asarray(params)))
    adamw, state = published.adamw([theirs], recipe), optimizer.init(params)
    step = jax.jit(optimizer.update)
    for scale in (1e-4, 0.05, 1.0, 0.01, 3.0, 0.1) * 4:  # norms of .0006 to 20
        grad = (scale * rng.normal(size=params.shape)).astype(np.float32)
        changes, state = step(grad, state, params)
        params = optax.apply_updates(params, changes)
        theirs.grad = torch.tensor(grad)
        torch.nn.utils.clip_grad_norm_([theirs], recipe.max_grad_norm)
        adamw.step()
    # 24 steps of up to .1. optax has 1 - .999^n in float32, off by 1e-5 of itself at first, and
    # torch divides by the norm plus 1e-6. Weight decay moved the parameters by 2e-4 of their size.
    np.testing.assert_allclose(params, theirs.detach().numpy(), atol=2e-5, rtol=0)


@pytest.mark.parametrize("microbatches", [2, 6])
def test_the_average_of_many_updates_is_the_published_one(microbatches):
    """Ours makes all moves of an update at once, before the next update.

    The published one makes the last r - 1 of them during the next update, whose parameters only
    change in its last micro-batch. After an iteration of two updates both are the same.
    """
    average, rng = Average(0.9, 8, microbatches, True), np.random.default_rng(6)
    params = {"a": rng.normal(size=(5, 3))}
    theirs, ours = params, jax.tree.map(jnp.float32, params)
    moves, global_step = 0, 0
    move = jax.jit(average.moved)
    for number in range(1, 41):
        for part in range(microbatches):
            if part == microbatches - 1:
                np.testing.assert_allclose(ours["a"], theirs["a"], atol=1e-5)
                params = {"a": params["a"] + rng.normal(size=params["a"].shape)}
                global_step += 1
            before, theirs = theirs, published.ema_step(theirs, params, global_step)
            moves += theirs is not before
        ours = move(ours, jax.tree.map(jnp.float32, params), jnp.int32(number))
        if number % 2 == 0:  # an iteration ends
            np.testing.assert_allclose(ours["a"], theirs["a"], atol=1e-5)
    assert moves == 5 * microbatches  # after updates 7, 15, 23, 31 and 39
