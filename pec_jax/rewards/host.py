"""The one seam to rewards that cannot be traced: OCR, a detector, a remote judge.

Such a function is called on the host, with the images as NumPy; prompts travel as UTF-8 bytes among
the reward's inputs. `Reward.score` waits for the answer. A train step hands the images in, draws
and decodes more, and fetches the answers in the end (`Reward.job`).
"""

from __future__ import annotations

import json
import os
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import io_callback

from pec_jax.config import ConfigError
from pec_jax.data.prompts import Prompt
from pec_jax.distributed.mesh import on_shards, platform
from pec_jax.perception.preprocessing import to_uint8_levels
from pec_jax.rewards.asking import TIMEOUT_SECONDS, ask
from pec_jax.rewards.base import Job, Reward
from pec_jax.types import PyTree

Array = jax.Array

# (images [N, H, W, 3] uint8, N prompts) -> N numbers
HostFunction = Callable[[np.ndarray, list[Prompt]], np.ndarray]
MAX_TICKET = 2**30
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


def host_reward(
    name: str, function: HostFunction, *, timeout: float | None = TIMEOUT_SECONDS
) -> Reward:
    """Wraps a function that runs on the host as a reward.

    Where the groups of an iteration are split over devices, the function is called once for each
    device's own groups, in the process that holds the device: with several processes every one of
    them must be able to answer. Devices that only split layers ask the same question again.

    Args:
        name: under which the reward is logged.
        function: (images [N, H, W, 3] uint8, list of N prompts) -> [N] numbers, nan for an image
            that could not be judged; called once for every batch of groups, and expected to give
            the same answer to the same question.
        timeout: seconds that one call may take; None is without end, for a function that keeps a
            time itself.

    Returns:
        A Reward whose `score` may be jitted. If the function raises, takes too long, or returns
        something that is not N numbers, the step fails: inside `asking.told_by_name` with a
        JudgeError, elsewhere with JAX's error around its text. It raises ConfigError when traced
        for a mesh of CPU devices that has no thread to spare for the callbacks.
    """

    def judge(images: np.ndarray, rows: np.ndarray) -> np.ndarray:
        groups, size = images.shape[:2]
        flat = images.reshape(-1, *images.shape[2:])
        prompts = decode_prompts(np.repeat(rows, size, axis=0))
        scores = ask(name, function, (flat, prompts), timeout)
        return scores.astype(np.float32).reshape(groups, size)

    def call(images: Array, rows: Array) -> np.ndarray:
        # JAX arrays, on which NumPy would run JAX's functions; those may wait for this very step.
        return judge(np.asarray(images), np.asarray(rows))

    def called(levels: Array, rows: Array) -> Array:
        _check_threads(name, levels.size)
        result = jax.ShapeDtypeStruct(levels.shape[:2], jnp.float32)
        return jax.pure_callback(call, result, levels, rows, vmap_method="sequential")

    def score(variables: PyTree, images: Array, rows: Array) -> Array:
        scores = on_shards(called, ("batch",), _levels(images), rows)
        return jnp.where(_is_whole(images), scores, jnp.nan)

    return Reward(
        name,
        score,
        prepare=lambda variables, prompts: encode_prompts(prompts),
        job=_job(name, Desk(judge)),
    )


class Desk:
    """Where images are handed in to be judged one after the other, and their scores fetched.

    Tickets are numbers, one per image, so that they may travel through the graph as an array does.
    """

    def __init__(self, judge: Callable[[np.ndarray, np.ndarray], np.ndarray]):
        """`judge`: (images [P, K, H, W, 3] uint8, rows [P, B]) -> scores [P, K]."""
        self._judge = judge
        self._lock = threading.Lock()
        self._waiting: deque[tuple[Future[np.ndarray], np.ndarray, np.ndarray]] = deque()
        self._busy = False
        self._next = 0
        self._open: dict[int, tuple[Future[np.ndarray], int]] = {}  # ticket -> answer, position

    def hand_in(self, images: Array, rows: Array) -> np.ndarray:
        """Tickets [P, K] int32 of images that will be judged."""
        pictures, texts = np.asarray(images), np.asarray(rows)
        count = pictures.shape[0] * pictures.shape[1]
        with self._lock:
            answer: Future[np.ndarray] = Future()
            self._waiting.append((answer, pictures, texts))
            if not self._busy:  # a daemon: the end of the program does not wait for a judge
                self._busy = True
                threading.Thread(target=self._work, name="desk", daemon=True).start()
            if self._next + count > MAX_TICKET:
                self._next = 0
            tickets = np.arange(self._next, self._next + count, dtype=np.int32)
            self._next += count
            self._open |= {int(ticket): (answer, i) for i, ticket in enumerate(tickets)}
        return tickets.reshape(pictures.shape[:2])

    def fetch(self, tickets: Array) -> np.ndarray:
        """Their scores [P, K], once they are there; nan for those whose images were not whole."""
        numbers = np.asarray(tickets)
        known = np.where(numbers < 0, ~numbers, numbers)
        with self._lock:
            found = [self._open.pop(int(ticket)) for ticket in known.ravel()]
        try:
            scores = [answer.result().ravel()[i] for answer, i in found]
        except Exception as error:
            self._give_up(error)
            raise
        judged = np.asarray(scores, np.float32).reshape(numbers.shape)
        return np.where(numbers < 0, np.float32(np.nan), judged)

    def _give_up(self, error: Exception) -> None:
        """The program that asked has failed: what waits for it need not be judged any more."""
        with self._lock:
            while self._waiting:
                self._waiting.popleft()[0].set_exception(error)

    def _work(self) -> None:
        """Judges what waits, in order, until nothing does."""
        while True:
            with self._lock:
                if not self._waiting:
                    self._busy = False
                    return
                answer, pictures, texts = self._waiting.popleft()
            try:
                answer.set_result(self._judge(pictures, texts))
            except BaseException as error:
                answer.set_exception(error)


def _job(name: str, desk: Desk) -> Job:
    def handed_in(levels: Array, rows: Array) -> Array:
        _check_threads(name, levels.size)
        result = jax.ShapeDtypeStruct(levels.shape[:2], jnp.int32)
        return io_callback(desk.hand_in, result, levels, rows)

    def start(images: Array, rows: Array) -> Array:
        tickets = on_shards(handed_in, ("batch",), _levels(images), rows)
        return jnp.where(_is_whole(images), tickets, ~tickets)

    def wait(tickets: Array) -> Array:
        return io_callback(desk.fetch, jax.ShapeDtypeStruct(tickets.shape, jnp.float32), tickets)

    return Job(start, lambda tickets: on_shards(wait, ("batch",), tickets))


def _levels(images: Array) -> Array:
    return jnp.round(to_uint8_levels(images) * 255.0).astype(jnp.uint8)


def _is_whole(images: Array) -> Array:
    """Which images [P, K] are finite; as 8-bit numbers, what is not would be black."""
    return jnp.all(jnp.isfinite(images), axis=(-3, -2, -1))


def _check_threads(name: str, size: int) -> None:
    """Refuses what would wait for itself: callbacks on CPU devices that hold all threads there are.

    JAX copies a callback's inputs in the thread pool of the CPU client, where each CPU device
    that is in a callback occupies one thread (jax-ml/jax issue 24255). Accelerators do not.
    """
    mesh = jax.sharding.get_abstract_mesh()
    devices = 1 if mesh.empty else mesh.size // jax.process_count()
    if platform() != "cpu" or size <= COPIED_INLINE:
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
