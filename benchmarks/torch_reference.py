"""One iteration of GRPO in torch, as Flow-GRPO's code has it, with the work of ours and no more.

The networks are diffusers' and transformers' own (`torch_models`). Batch sizes, steps, pieces,
dtypes, guidance, recomputation of logp_old and gradient checkpointing are those of the config. It
does not compute the diversity metrics that our step logs (variances within a group). Everything is
NCHW here; images come group by group, [P * K, ...].
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks import torch_functions as functions
from benchmarks import torch_models
from benchmarks.setups import Setup, host_batch
from benchmarks.torch_models import Models
from pec_jax.perception.entropy import schedule_bandwidth
from pec_jax.rewards.clip import DIVISORS

# (step, images: indices [n] into the P * K) -> unit Gaussian noise [n, C, h, w] float32
Noise = Callable[[int, Tensor], Tensor]


@dataclasses.dataclass(frozen=True)
class Trajectory:
    """The stored path: states in the storage dtype, by step."""

    x_t: Tensor  # [T, N, C, h, w]
    x_next: Tensor  # [T, N, C, h, w]
    logp: Tensor  # [T, N] float32, 0 at ODE steps
    x_0: Tensor  # [N, C, h, w] float32


class TorchStep:
    """Models, optimizer and EMA, and the phases of an iteration as methods.

    `kind` is "eager", "compiled", every network whole by torch.compile, or "blocks", the
    transformer's blocks alone, one by one: nearly as fast, and many times faster to compile.
    """

    def __init__(self, setup: Setup, models: Models, *, kind: str = "eager"):
        functions.check(setup.config)
        self.config, self.program, self.models = setup.config, setup.program, models
        sampler = setup.program.learner.policy.sampler
        self.sigmas = [float(s) for s in sampler.sigmas]
        self.trained = [int(t) for t in sampler.trained_steps]
        self.bandwidth = setup.config.perception.bandwidth or float(
            schedule_bandwidth(sampler.step_std())
        )
        self.dtype = torch_models.DTYPES[self.config.model.dtype]
        batch = host_batch(setup)
        conditioning, negative = batch.conditioning, setup.frozen.negative
        self.text = self._tensor(conditioning.tokens), self._tensor(conditioning.pooled)
        self.negative = self._tensor(negative.tokens), self._tensor(negative.pooled)
        self.reward_inputs = {n: self._tensor(a) for n, a in batch.reward_inputs.items() if a.size}
        # Each of the few shapes gets its own code: faster than one code for all of them.
        compiled = functools.partial(torch.compile, dynamic=False)
        wrap = compiled if kind == "compiled" else (lambda f: f)
        self._transformer = wrap(models.transformer)
        if kind == "blocks":
            self._transformer = torch_models.shared_copy(models.transformer)
            for block in self._transformer.transformer_blocks:
                block.compile(dynamic=False)
        self._decode = wrap(lambda latents: models.vae.decode(latents).sample)
        self._features = {
            name: wrap(lambda pixels, encoder=encoder: torch_models.features(encoder, pixels))
            for name, encoder in models.encoders.items()
        }
        self.params = list(models.lora.values())
        self.ema = [p.detach().clone() for p in self.params]
        o = self.config.optimizer
        self.optimizer = torch.optim.AdamW(
            self.params, o.learning_rate, (o.b1, o.b2), o.eps, o.weight_decay, fused=True
        )
        for p in self.params:  # a layer that nothing asks for learns from a gradient of 0, as ours
            p.grad = torch.zeros_like(p)

    def _tensor(self, array: Any) -> Tensor:
        return torch_models.to_tensor(np.asarray(array, np.float32)).to(self.models.device)

    # Model.

    def velocity(self, x_t: Tensor, sigma: float, groups: Tensor) -> Tensor:
        """[N, C, h, w] float32, guided; `groups` [N] says whose text each image has."""
        dtype, scale = self.dtype, self.config.sampler.guidance
        tokens, pooled = (a[groups] for a in self.text)
        x = x_t
        if scale != 1:
            tokens, pooled = (
                torch.cat([a.expand(len(b), *a.shape[1:]), b])
                for a, b in zip(self.negative, (tokens, pooled))
            )
            x = torch.cat([x_t, x_t])
        v = self._transformer(
            hidden_states=x.to(dtype),
            timestep=torch.full((len(x),), sigma * 1000.0, device=x.device),
            encoder_hidden_states=tokens.to(dtype),
            pooled_projections=pooled.to(dtype),
            return_dict=False,
        )[0].float()
        if scale == 1:
            return v
        v_neg, v_pos = v.chunk(2)
        return v_neg + scale * (v_pos - v_neg)

    def transition(self, x_t: Tensor, step: int, groups: Tensor) -> tuple[Tensor, float]:
        """Mean and std of the SDE's step (the ODE's, and 0, at a step that is not trained)."""
        v = self.velocity(x_t, self.sigmas[step], groups)
        sigma, dt = self.sigmas[step], self.sigmas[step + 1] - self.sigmas[step]
        if step not in self.trained:
            return x_t.float() + v * dt, 0.0
        below_one = self.sigmas[1] if sigma >= 1 else sigma
        scale = self.config.sampler.noise_level * math.sqrt(sigma / (1 - below_one))
        correction = scale**2 / (2 * sigma)
        mean = x_t.float() * (1 + correction * dt) + v * (1 + correction * (1 - sigma)) * dt
        return mean, scale * math.sqrt(-dt)

    # Phases.

    @torch.inference_mode()
    def rollout(self, x_1: Tensor, noise: Noise) -> Trajectory:
        """K paths for each prompt, `batch.rollout_images` of every group at a time.

        Args:
          x_1: [P * K, C, h, w] unit Gaussian noise.
          noise: of the steps.
        """
        dtype = torch_models.DTYPES[self.config.sampler.storage_dtype]
        steps = len(self.sigmas) - 1
        path = torch.empty(steps + 1, *x_1.shape, dtype=dtype, device=x_1.device)
        logp = torch.zeros(steps, len(x_1), device=x_1.device)
        for images, groups in self.pieces(self.config.batch.rollout_images):
            x = path[0, images] = x_1[images].to(dtype)
            for t in range(steps):
                mean, std = self.transition(x, t, groups)
                if std:
                    x = (mean + std * noise(t, images)).to(dtype)
                    logp[t, images] = functions.log_prob(x, mean, std)
                else:
                    x = mean.to(dtype)
                path[t + 1, images] = x
        return Trajectory(path[:-1], path[1:], logp, path[-1].float())

    @torch.inference_mode()
    def decode(self, x_0: Tensor) -> Tensor:
        """Images [N, 3, H, W] in [0, 1], rounded to 8 bits."""
        config = self.models.vae.config
        latents = (x_0 / config.scaling_factor + (config.shift_factor or 0.0)).to(
            self.models.vae.dtype, memory_format=torch.channels_last
        )
        parts = self.in_pieces(lambda part: self._decode(part).float(), latents)
        return torch_models.as_8bit(parts * 0.5 + 0.5)

    @torch.inference_mode()
    def features(self, network: str, images: Tensor) -> Tensor:
        """Features [N, d] of images [N, 3, H, W] by one encoder."""
        settings = self.models.preprocess[network]
        return self.in_pieces(
            lambda part: self._features[network](torch_models.preprocessed(settings, part)), images
        )

    @torch.inference_mode()
    def rewards(self, features: dict[str, Tensor]) -> Tensor:
        """Weighted rewards [P, K] from the features of the rewards' networks."""
        total = torch.zeros((), device=self.models.device)
        combined = self.program.scorer.reward
        for name, weight in combined.weights.items():
            network = combined.rewards[name].network
            unit = torch.nn.functional.normalize(features[network], dim=-1)
            unit = unit.reshape(*self.shape, -1)
            part = torch.einsum("pkd,pd->pk", unit, self.reward_inputs[name])
            if name == "pickscore":
                part = part * self.models.encoders[network].logit_scale.float().exp()
                part = part / DIVISORS["score/26"]
            total = total + weight * part
        return total

    @torch.inference_mode()
    def surprisal(self, features: dict[str, Tensor]) -> Tensor:
        """Perceptual surprisals [P, K] from the features of the spaces' networks."""
        perception, total = self.config.perception, torch.zeros((), device=self.models.device)
        for space in self.program.scorer.spaces.values():
            f = torch.nn.functional.normalize(features[space.network], dim=-1)
            f = f.reshape(*self.shape, -1)
            if perception.scale == "unit_sqrt_d":
                f = f * math.sqrt(f.shape[-1])
            if perception.estimator == "knn":
                total = total + space.share * functions.knn_surprisal(f, perception.k)
            else:
                total = total + space.share * functions.gaussian_surprisal(f, self.bandwidth)
        return total

    def update(self, trajectory: Trajectory, rewards: Tensor, surprisal: Tensor) -> dict[str, Any]:
        """All updates of the iteration; loss and gradient norm of each, and the drift.

        The drift is the largest difference of the first update's log-probs to the rollout's.
        """
        config, batch = self.config.updates, self.config.batch
        # Copies are no inference tensors any more.
        found = functions.signals(self.config, rewards.clone(), surprisal.clone())
        path = trajectory.x_t.clone(), trajectory.x_next.clone()
        size = batch.group_size // config.minibatches
        pieces = [
            list(self.pieces(batch.update_images or size, u * size, size))
            for u in range(config.minibatches)
        ]
        old = self._old_log_probs(path, pieces)
        losses, norms, drift = [], [], torch.zeros((), device=self.models.device)
        for index in range(config.epochs * config.minibatches):
            part = pieces[index % config.minibatches]
            count = len(self.trained) * len(part)
            total = torch.zeros((), device=self.models.device)
            self.optimizer.zero_grad(set_to_none=False)
            for t in self.trained:
                for images, groups in part:
                    logp = self._step_log_prob(path, t, images, groups)
                    before = old[t, images] if index else logp.detach()
                    loss = self._loss(found, images, logp, before) / count
                    loss.backward()
                    total += loss.detach()
                    if index == 0:
                        change = logp.detach() - trajectory.logp[t, images]
                        drift = torch.maximum(drift, change.abs().max())
            losses.append(float(total))
            norms.append(float(self._apply(torch.isfinite(total))))
        return {"loss": losses, "grad_norm": norms, "logp_drift": float(drift)}

    def _loss(self, found: Any, images: Tensor, logp: Tensor, before: Tensor) -> Tensor:
        """The clipped loss of one micro-batch."""
        clip, objective = self.config.updates.advantage_clip, self.config.objective.options
        ratio = (logp.detach() - before).exp()
        advantage = functions.advantages(found, images, ratio, clip)
        return functions.policy_loss(
            logp, before, advantage, objective.clip_low, objective.clip_high
        )

    def _step_log_prob(self, path, step: int, images: Tensor, groups: Tensor) -> Tensor:
        """logp [n] of some images' step under the present policy."""
        mean, std = self.transition(path[0][step, images], step, groups)
        return functions.log_prob(path[1][step, images], mean, std)

    @torch.no_grad()
    def _old_log_probs(self, path, pieces: list[list[tuple[Tensor, Tensor]]]) -> Tensor:
        """logp [T, N] before the first update; the first mini-batch only if it comes again."""
        logp = torch.zeros(path[0].shape[:2], device=self.models.device)
        for part in pieces[0 if self.config.updates.epochs > 1 else 1 :]:
            for t in self.trained:
                for images, groups in part:
                    logp[t, images] = self._step_log_prob(path, t, images, groups)
        return logp

    def _apply(self, finite: Tensor) -> Tensor:
        """Clips, steps and averages, unless something is not finite; returns the norm."""
        o = self.config.optimizer
        norm = torch.nn.utils.clip_grad_norm_(self.params, o.grad_clip or math.inf)
        if bool(finite & torch.isfinite(norm)):
            self.optimizer.step()
            with torch.no_grad():
                torch._foreach_lerp_(self.ema, self.params, 1 - o.ema_decay)
        return norm

    # Pieces of the batch.

    @property
    def shape(self) -> tuple[int, int]:
        """(P, K)."""
        return self.config.batch.groups, self.config.batch.group_size

    def pieces(
        self, size: int, start: int = 0, count: int | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """`size` images of every group at a time (0 is all): their indices, and their groups.

        Of each group, the `count` images from `start` on.
        """
        groups, whole = self.shape
        count, device = count or whole, self.models.device
        owner = torch.arange(groups, device=device)[:, None]
        for first in range(start, start + count, size or count):
            part = torch.arange(first, first + (size or count), device=device)
            yield (owner * whole + part).reshape(-1), owner.expand(-1, len(part)).reshape(-1)

    def in_pieces(self, function: Callable[[Tensor], Tensor], tensor: Tensor) -> Tensor:
        """`function` over [P * K, ...], `batch.decode_images` of every group at a time."""
        size = self.config.batch.decode_images
        if size in (0, self.shape[1]):
            return function(tensor)
        out = None
        for images, _ in self.pieces(size):
            part = function(tensor[images])
            if out is None:
                out = part.new_empty(len(tensor), *part.shape[1:])
            out[images] = part
        return out

    def iteration(self) -> dict[str, float]:
        """One whole iteration; seconds of each phase."""
        seconds: dict[str, float] = {}
        shape = self.program.learner.policy.latent_shape
        size = (math.prod(self.shape), shape[2], *shape[:2])
        device = self.models.device
        with self._clock(seconds, "rollout"):
            x_1 = torch.randn(size, device=device)
            draw = lambda step, images: torch.randn(len(images), *size[1:], device=device)  # noqa: E731
            trajectory = self.rollout(x_1, draw)
        with self._clock(seconds, "decode"):
            images = self.decode(trajectory.x_0)
        with self._clock(seconds, "score"):
            scorer = self.program.scorer
            networks = {reward.network for reward in scorer.reward.rewards.values()}
            features = {network: self.features(network, images) for network in networks}
            rewards = self.rewards(features)
        with self._clock(seconds, "entropy"):
            for network in {space.network for space in scorer.spaces.values()} - networks:
                features[network] = self.features(network, images)
            surprisal = self.surprisal(features)
        with self._clock(seconds, "update"):
            self.update(trajectory, rewards, surprisal)
        return seconds

    @contextlib.contextmanager
    def _clock(self, seconds: dict[str, float], name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        if self.models.device.type == "cuda":
            torch.cuda.synchronize()
        seconds[name] = time.perf_counter() - start
