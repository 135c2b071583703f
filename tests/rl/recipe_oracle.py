"""Flow-GRPO's published training recipe in PyTorch, on diffusers' transformers and schedulers.

A second implementation to compare with. It is written from the published formulas and shares no
code with the package: arrays come in as they are, and leave as NumPy arrays by torch's names.

Source: Liu et al. 2025, Flow-GRPO (arXiv 2505.05470); yifan123/flow_grpo@74db691:
scripts/train_sd3.py, train_sd3_fast.py and train_flux.py, with flow_grpo/stat_tracking.py,
flow_grpo/ema.py and flow_grpo/diffusers_patch/sd3_sde_with_logprob.py.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import diffusers
import numpy as np
import torch
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from torch import Tensor, nn

# The layers that the published scripts adapt, as PEFT takes them: the ends of module names.
_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj")
SD3_TARGETS = tuple(f"attn.{name}" for name in (*_ATTENTION, "to_add_out"))
FLUX_TARGETS = SD3_TARGETS + tuple(
    f"{block}.net.{layer}" for block in ("ff", "ff_context") for layer in ("0.proj", "2")
)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What the published config files set.

    Attributes:
        kind: "sde" or "cps".
        noise_levels: of each of the T steps.
        trained: indices of the trained steps.
        beta: weight of the KL to the base model.
        drop_zero: whether samples of advantage 0 leave the batch, as in the scripts for SD3.
        learning_rate: of AdamW.
        microbatches: of one optimizer update.
    """

    kind: str
    noise_levels: tuple[float, ...]
    trained: tuple[int, ...]
    beta: float
    drop_zero: bool
    learning_rate: float
    microbatches: int
    clip_range: float = 1e-4
    updates: int = 2
    max_grad_norm: float = 1.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 1e-4


@dataclasses.dataclass(frozen=True)
class Text:
    """Encoded prompts: tokens [N, L, D] and pooled [N, Dp]."""

    tokens: Tensor
    pooled: Tensor

    def rows(self, index: list[int]) -> Text:
        """Some of them."""
        return Text(self.tokens[index], self.pooled[index])


@dataclasses.dataclass(frozen=True)
class Model:
    """A transformer and its schedule.

    Attributes:
        transformer: diffusers'.
        timesteps: [T] as the scheduler gives them, in (0, 1000].
        sigmas: [T + 1].
        predict: (latents [N, ...], timestep [N], text) -> guided velocity [N, ...].
    """

    transformer: nn.Module
    timesteps: Tensor
    sigmas: Tensor
    predict: Callable[[Tensor, Tensor, Text], Tensor]

    def velocity(self, latents: Tensor, step: int, text: Text) -> Tensor:
        """The guided velocity at a step."""
        return self.predict(latents, self.timesteps[step].expand(len(latents)), text)


def sd3(root: Path, num_steps: int, guidance: float, negative: Text) -> Model:
    """Stable Diffusion 3 with classifier-free guidance; latents [N, C, h, w]."""
    network = diffusers.SD3Transformer2DModel.from_pretrained(root / "transformer")
    network.requires_grad_(False)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_pretrained(root / "scheduler")
    scheduler.set_timesteps(num_steps)

    def predict(latents: Tensor, timestep: Tensor, text: Text) -> Tensor:
        count = len(latents)
        both = network(
            hidden_states=torch.cat([latents, latents]),
            timestep=torch.cat([timestep, timestep]),
            encoder_hidden_states=torch.cat([negative.tokens.expand(count, -1, -1), text.tokens]),
            pooled_projections=torch.cat([negative.pooled.expand(count, -1), text.pooled]),
            return_dict=False,
        )[0]
        without, with_text = both[:count], both[count:]
        return without + guidance * (with_text - without)

    return Model(network, scheduler.timesteps, scheduler.sigmas, predict)


def flux(root: Path, num_steps: int, guidance: float, size: tuple[int, int]) -> Model:
    """FLUX.1 with the guidance scale as an input; latents packed [N, tokens, 4 C].

    Args:
        root: of the pipeline.
        num_steps: T.
        guidance: the scale.
        size: height and width in latent pixels.
    """
    network = diffusers.FluxTransformer2DModel.from_pretrained(root / "transformer")
    network.requires_grad_(False)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_pretrained(root / "scheduler")
    height, width = size[0] // 2, size[1] // 2
    c = scheduler.config
    shift = calculate_shift(
        height * width, c.base_image_seq_len, c.max_image_seq_len, c.base_shift, c.max_shift
    )
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1.0 / num_steps, num_steps), mu=shift)
    places = diffusers.FluxPipeline._prepare_latent_image_ids(
        1, height, width, "cpu", torch.float32
    )

    def predict(latents: Tensor, timestep: Tensor, text: Text) -> Tensor:
        return network(
            hidden_states=latents,
            timestep=timestep / 1000,
            guidance=torch.full([len(latents)], guidance),
            pooled_projections=text.pooled,
            encoder_hidden_states=text.tokens,
            txt_ids=torch.zeros(text.tokens.shape[1], 3),
            img_ids=places,
            return_dict=False,
        )[0]

    return Model(network, scheduler.timesteps, scheduler.sigmas, predict)


class LowRank(nn.Module):
    """A linear layer plus scale x a b; `active` turns the adapter off for the base model."""

    def __init__(self, base: nn.Linear, a: Tensor, b: Tensor, scale: float) -> None:
        super().__init__()
        self.base, self.scale, self.active = base, scale, True
        self.a, self.b = nn.Parameter(a), nn.Parameter(b)

    def forward(self, x: Tensor) -> Tensor:
        out = self.base(x)
        return out + self.scale * ((x @ self.a) @ self.b) if self.active else out


def targets(transformer: nn.Module, ends: Sequence[str]) -> list[str]:
    """Names of the linear layers that a list of name ends selects, as PEFT reads it."""
    return [
        name
        for name, module in transformer.named_modules()
        if isinstance(module, nn.Linear)
        and any(name == end or name.endswith(f".{end}") for end in ends)
    ]


def adapt(
    transformer: nn.Module, names: Sequence[str], values: dict[str, np.ndarray], scale: float
) -> dict[str, nn.Parameter]:
    """Puts adapters in place.

    Args:
        transformer: changed in place.
        names: of the layers.
        values: "<name>.a" [in, r] and "<name>.b" [r, out].
        scale: alpha / r.

    Returns:
        The parameters that learn, by the names of `values`.
    """
    parameters: dict[str, nn.Parameter] = {}
    for name in names:
        a, b = (torch.tensor(values[f"{name}.{part}"]) for part in "ab")
        base = transformer.get_submodule(name)
        assert isinstance(base, nn.Linear)
        layer = LowRank(base, a, b, scale)
        transformer.set_submodule(name, layer)
        parameters |= {f"{name}.a": layer.a, f"{name}.b": layer.b}
    return parameters


@contextlib.contextmanager
def base_model(transformer: nn.Module) -> Iterator[None]:
    """The transformer without its adapters."""
    layers = [module for module in transformer.modules() if isinstance(module, LowRank)]
    for layer in layers:
        layer.active = False
    try:
        yield
    finally:
        for layer in layers:
            layer.active = True


@dataclasses.dataclass(frozen=True)
class Step:
    """One sampler step: the kernel's mean, the std of its noise, and the scale in the KL."""

    mean: Tensor  # [N, ...]
    std: Tensor  # []
    scale: Tensor  # []; std / sqrt(-dt) of "sde", std of "cps"


def step(model: Model, recipe: Recipe, latents: Tensor, index: int, text: Text) -> Step:
    """The transition kernel of a step at some latents."""
    velocity, level = model.velocity(latents, index, text), recipe.noise_levels[index]
    sigma, after = model.sigmas[index], model.sigmas[index + 1]
    dt = after - sigma
    if recipe.kind == "cps":
        std = after * math.sin(level * math.pi / 2)
        image, noise = latents - sigma * velocity, latents + (1 - sigma) * velocity
        mean = (1 - after) * image + torch.sqrt(after**2 - std**2) * noise
        return Step(mean, std, std)
    below_one = model.sigmas[1] if sigma == 1 else sigma
    scale = level * torch.sqrt(sigma / (1 - below_one))
    drift = scale**2 / (2 * sigma)
    mean = latents * (1 + drift * dt) + velocity * (1 + drift * (1 - sigma)) * dt
    return Step(mean, scale * torch.sqrt(-dt), scale)


def log_prob(kind: str, taken: Tensor, at: Step) -> Tensor:
    """[N], mean over dimensions; of "cps" the squared error without any constant."""
    error = (taken.detach() - at.mean) ** 2
    if kind == "cps":
        return -error.flatten(1).mean(1)
    density = -error / (2 * at.std**2) - torch.log(at.std) - math.log(math.sqrt(2 * math.pi))
    return density.flatten(1).mean(1)


@torch.no_grad()
def rollout(
    model: Model, recipe: Recipe, x_1: Tensor, noise: Tensor, text: Text
) -> tuple[Tensor, Tensor]:
    """Samples with given noise.

    Args:
        model: with the adapters on.
        recipe: the sampler.
        x_1: [N, ...].
        noise: [T, N, ...] unit Gaussian.
        text: [N, ...].

    Returns:
        All states [T + 1, N, ...] and log-probs [T, N].
    """
    states, logps = [x_1], []
    for index, drawn in enumerate(noise):
        at = step(model, recipe, states[-1], index, text)
        states.append(at.mean + at.std * drawn)
        logps.append(log_prob(recipe.kind, states[-1], at))
    return torch.stack(states), torch.stack(logps)


def advantages(rewards: np.ndarray) -> np.ndarray:
    """Rewards [P, K] less their prompt's mean, over the std of the whole batch and 1e-4; float64.

    They are clipped at 5 in the loss only.
    """
    rewards = np.asarray(rewards, np.float64)
    return (rewards - rewards.mean(axis=1, keepdims=True)) / (rewards.std() + 1e-4)


@dataclasses.dataclass(frozen=True)
class Samples:
    """One rollout, group by group."""

    states: Tensor  # [T + 1, P K, ...]
    logps: Tensor  # [T, P K]
    advantages: np.ndarray  # [P, K]
    text: Text  # [P K, ...]


@dataclasses.dataclass(frozen=True)
class Update:
    """What one optimizer update was made of, and what it led to; arrays by parameter."""

    loss: float
    kl_loss: float  # without beta
    clip_fraction: float  # ratios outside of the clip range
    stopped: float  # share of samples whose gradient the clipping removes
    grad_norm: float  # before clipping
    grads: dict[str, np.ndarray]  # before clipping
    parameters: dict[str, np.ndarray]  # after it
    ema: dict[str, np.ndarray]


def microbatches(recipe: Recipe, advantages: np.ndarray) -> list[list[list[int]]]:
    """Samples by update and micro-batch.

    The published code shuffles all samples before it cuts them into micro-batches, and keeps some
    of advantage 0, drawn at random, where the number of the others is not divisible: neither can
    be reproduced. Here update u takes the u-th part of each group in order.
    """
    groups, size = advantages.shape
    part, plan = size // recipe.updates, []
    for update in range(recipe.updates):
        rows = [g * size + update * part + k for g in range(groups) for k in range(part)]
        if recipe.drop_zero:
            rows = [row for row in rows if advantages.flat[row] != 0]
        assert len(rows) % recipe.microbatches == 0, "micro-batches of one size"
        length = len(rows) // recipe.microbatches
        plan.append([rows[i : i + length] for i in range(0, len(rows), length)])
    return plan


class Loss(NamedTuple):
    """The loss of one micro-batch at one step, and what is logged of it."""

    total: Tensor
    kl: Tensor  # without beta
    outside: Tensor  # [N] whether a ratio is outside of the clip range
    stopped: Tensor  # [N] whether clipping removes a sample's gradient


def loss_of(model: Model, recipe: Recipe, samples: Samples, rows: list[int], index: int) -> Loss:
    """The clipped surrogate and the KL of some samples at a step."""
    latents, text = samples.states[index, rows], samples.text.rows(rows)
    at = step(model, recipe, latents, index, text)
    logp = log_prob(recipe.kind, samples.states[index + 1, rows], at)
    with torch.no_grad(), base_model(model.transformer):
        reference = step(model, recipe, latents, index, text)
    worth = torch.tensor(samples.advantages.reshape(-1)[rows]).clamp(-5, 5)
    ratio = torch.exp(logp - samples.logps[index, rows])
    clipped = ratio.clamp(1 - recipe.clip_range, 1 + recipe.clip_range)
    policy = torch.maximum(-worth * ratio, -worth * clipped).mean()
    distance = (at.mean - reference.mean).square().flatten(1).mean(1)
    kl = (distance / (2 * at.scale**2)).mean()
    outside = clipped != ratio
    stopped = outside & (-worth * clipped > -worth * ratio)
    return Loss(policy + recipe.beta * kl, kl, outside, stopped)


def ema_step(
    ema: dict[str, np.ndarray], parameters: dict[str, np.ndarray], global_step: int
) -> dict[str, np.ndarray]:
    """The published average after a micro-batch.

    It moves where g + 1 is a multiple of 8, with decay min((1 + g) / (10 + g), 0.9).
    """
    if (global_step + 1) % 8:
        return ema
    rate = 1 - min((1 + global_step) / (10 + global_step), 0.9)
    return {name: old + rate * (parameters[name] - old) for name, old in ema.items()}


def arrays(parameters: dict[str, nn.Parameter]) -> dict[str, np.ndarray]:
    """Copies of the values of parameters."""
    return {name: value.detach().numpy().copy() for name, value in parameters.items()}


def adamw(parameters: list[nn.Parameter], recipe: Recipe) -> torch.optim.Optimizer:
    """The published optimizer; gradients are clipped beforehand."""
    return torch.optim.AdamW(
        parameters,
        lr=recipe.learning_rate,
        betas=recipe.betas,
        eps=recipe.eps,
        weight_decay=recipe.weight_decay,
    )


def train(
    model: Model,
    parameters: dict[str, nn.Parameter],
    recipe: Recipe,
    samples: Samples,
    global_step: int,
) -> list[Update]:
    """The optimizer updates of one rollout.

    Args:
        model: its adapters change.
        parameters: of the adapters.
        recipe: all that is set.
        samples: the rollout.
        global_step: updates so far, which only the average reads.
    """
    optimizer = adamw(list(parameters.values()), recipe)
    found, ema = [], arrays(parameters)
    for plan in microbatches(recipe, samples.advantages):
        logged = []
        for number, rows in enumerate(plan):
            for index in recipe.trained:
                at = loss_of(model, recipe, samples, rows, index)
                (at.total / (len(plan) * len(recipe.trained))).backward()
                logged.append(tuple(a.detach() for a in at))
            if number == len(plan) - 1:
                grads = {name: np.asarray(value.grad).copy() for name, value in parameters.items()}
                norm = nn.utils.clip_grad_norm_(parameters.values(), recipe.max_grad_norm)
                optimizer.step()
                optimizer.zero_grad()
                global_step += 1
            ema = ema_step(ema, arrays(parameters), global_step)
        means = [torch.stack(a).double().mean().item() for a in zip(*logged, strict=True)]
        loss, kl_loss, clip_fraction, stopped = means
        found.append(
            Update(
                loss=loss,
                kl_loss=kl_loss,
                clip_fraction=clip_fraction,
                stopped=stopped,
                grad_norm=float(norm),
                grads=grads,
                parameters=arrays(parameters),
                ema=ema,
            )
        )
    return found
