"""The one seam to rewards that cannot be traced: OCR, a detector, a remote judge.

Inside the step such a function is called back on the host, with the images as NumPy. Prompts
travel as UTF-8 bytes among the reward's inputs, so that the seam itself remembers nothing.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from pec_jax.config import ConfigError
from pec_jax.data.prompts import Prompt
from pec_jax.distributed.mesh import on_shards
from pec_jax.perception.preprocessing import to_uint8_levels
from pec_jax.rewards.base import Reward
from pec_jax.types import PyTree

Array = jax.Array

# (images [N, H, W, 3] uint8, N prompts) -> N numbers
HostFunction = Callable[[np.ndarray, list[Prompt]], np.ndarray]
COPIED_INLINE = 100 * 2**10  # bytes; XLA's CPU client hands larger copies to its threads


def encode_prompts(prompts: Sequence[Prompt]) -> np.ndarray:
    """Prompts as rows of bytes [N, B] uint8: JSON in UTF-8, padded with zeros to the longest."""
    rows = [json.dumps([p.text, p.metadata], ensure_ascii=False).encode() for p in prompts]
    width = max((len(row) for row in rows), default=0)
    padded = b"".join(row.ljust(width, b"\0") for row in rows)
    return np.frombuffer(padded, np.uint8).reshape(len(rows), width)


def decode_prompts(rows: np.ndarray) -> list[Prompt]:
    """The inverse of `encode_prompts`; JSON holds no zero bytes, so padding is unmistakable."""
    texts = (row.tobytes().rstrip(b"\0") for row in np.asarray(rows, np.uint8))
    return [Prompt(*json.loads(text)) for text in texts]


def host_reward(name: str, function: HostFunction) -> Reward:
    """Wraps a function that runs on the host as a reward.

    Where the groups of an iteration are split over devices, the function is called once for each
    device's own groups, in the process that holds the device: with several processes every one of
    them must be able to answer. Devices that only split layers ask the same question again.

    Args:
        name: under which the reward is logged.
        function: (images [N, H, W, 3] uint8, list of N prompts) -> [N] numbers, nan for an image
            that could not be judged; called once for every batch of groups, and expected to give
            the same answer to the same question.

    Returns:
        A Reward whose `score` may be jitted. If the function raises, or returns something that is
        not N numbers, the step fails with that message. It raises ConfigError when traced for a
        mesh of CPU devices that has no thread to spare for the callbacks.
    """

    def call(images: np.ndarray, rows: np.ndarray) -> np.ndarray:
        # JAX arrays, on which NumPy would run JAX's functions; those may wait for this very step.
        images, rows = np.asarray(images), np.asarray(rows)
        groups, size = images.shape[:2]
        flat = images.reshape(-1, *images.shape[2:])
        scores = np.asarray(function(flat, decode_prompts(np.repeat(rows, size, axis=0))))
        if scores.shape != flat.shape[:1] or scores.dtype.kind not in "biuf":
            raise ValueError(
                f"The reward {name!r} must return one number for each of the {len(flat)} "
                f"images; it returned an array of shape {scores.shape} and type {scores.dtype}."
            )
        return scores.astype(np.float32).reshape(groups, size)

    def ask(levels: Array, rows: Array) -> Array:
        _check_threads(name, levels.size)
        result = jax.ShapeDtypeStruct(levels.shape[:2], jnp.float32)
        return jax.pure_callback(call, result, levels, rows, vmap_method="sequential")

    def score(variables: PyTree, images: Array, rows: Array) -> Array:
        levels = jnp.round(to_uint8_levels(images) * 255.0).astype(jnp.uint8)
        scores = on_shards(ask, ("batch",), levels, rows)
        # As 8-bit numbers, what is not finite would be black.
        whole = jnp.all(jnp.isfinite(images), axis=(-3, -2, -1))
        return jnp.where(whole, scores, jnp.nan)

    return Reward(name, score, prepare=lambda variables, prompts: encode_prompts(prompts))


def _check_threads(name: str, size: int) -> None:
    """Refuses what would wait for itself: callbacks on CPU devices that hold all threads there are.

    JAX copies a callback's inputs in the thread pool of the CPU client, where each CPU device
    that is in a callback occupies one thread (jax-ml/jax issue 24255). Accelerators do not.
    """
    mesh = jax.sharding.get_abstract_mesh()
    devices = 1 if mesh.empty else mesh.size // jax.process_count()
    if jax.default_backend() != "cpu" or size <= COPIED_INLINE:
        return
    # As the client sizes its pool.
    reserved = int(os.environ.get("NPROC") or 0)
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    threads = max(max(4, reserved) if reserved > 0 else cores, jax.local_device_count())
    if threads <= devices:
        raise ConfigError(
            f"The reward {name!r} runs on the host, and {devices} CPU device(s) of one process "
            f"would occupy all {threads} thread(s) that hand it images: set the environment "
            f"variable NPROC={devices + 1}, or use fewer devices (config.mesh)."
        )
