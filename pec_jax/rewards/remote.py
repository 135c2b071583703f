"""Rewards whose judge answers over HTTP: a server of one's own, UnifiedReward, or any VLM.

`remote` speaks the protocol of pec_jax/host/protocol.py; `unified_reward` and `vlm_judge` ask
models behind OpenAI's chat completions, see pec_jax/host/judges.py. An image that could not be
judged is NaN, and a warning says why. docs/remote_rewards.md is the guide.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import io
from collections.abc import Callable, Sequence

import jax
import numpy as np
from absl import logging

from pec_jax.config import ConfigError
from pec_jax.config.fields import field
from pec_jax.data.prompts import Prompt
from pec_jax.host import client, judges, protocol
from pec_jax.host.client import Failure
from pec_jax.perception.networks import Networks
from pec_jax.rewards.base import Reward, RewardOptions, register
from pec_jax.rewards.host import encode_prompts, host_reward
from pec_jax.types import PyTree

# (server, images [N, H, W, 3] uint8, N prompts) -> N numbers or failures
Ask = Callable[[client.Options, np.ndarray, list[Prompt]], list[float | Failure]]


@dataclasses.dataclass(frozen=True)
class ServerOptions(RewardOptions):
    """Of a reward that asks a server."""

    url: str = field("Address of the server: http://HOST:PORT or https://HOST.", "")
    key_variable: str = field("Environment variable that holds the API key; '' sends none.", "")
    timeout: float = field("Seconds for one try, until the whole answer is there.", 60.0, low=0.1)
    tries: int = field("How often a question is asked before it fails.", 3, low=1, high=20)
    concurrency: int = field("Requests in flight at once, per process.", 8, low=1, high=512)


@dataclasses.dataclass(frozen=True)
class RemoteOptions(ServerOptions):
    """Of `remote`."""

    batch: int = field("Images per request, at most.", 8, low=1, high=1024)


@dataclasses.dataclass(frozen=True)
class UnifiedRewardOptions(ServerOptions):
    """Of `unified_reward`."""

    judge: str = field("Question and scale.", "axes", choices=judges.UNIFIED_REWARD)
    model: str = field("Name under which the server has the model.", "UnifiedReward")
    image_format: str = field(
        "How images are sent; JPEG has quality 95.", "png", choices=tuple(judges.MIME_TYPES)
    )


@dataclasses.dataclass(frozen=True)
class VlmJudgeOptions(ServerOptions):
    """Of `vlm_judge`."""

    judge: str = field("Question and scale.", "yes_no", choices=judges.GENERAL)
    model: str = field("Name under which the server has the model.", "")
    question: str = field(
        "Asked instead of the judge's own; {prompt} stands for the prompt. '' is its own.", ""
    )
    image_format: str = field(
        "How images are sent; JPEG has quality 95.", "png", choices=tuple(judges.MIME_TYPES)
    )


@register("remote", RemoteOptions)
def remote(options: RemoteOptions, networks: Networks) -> Reward:
    """The scores of a server of one's own."""

    def ask(
        server: client.Options, images: np.ndarray, prompts: list[Prompt]
    ) -> list[float | Failure]:
        parts = [slice(i, i + options.batch) for i in range(0, len(images), options.batch)]
        payloads = (
            protocol.request(
                [encode(image, "png") for image in images[part]],
                [prompt.text for prompt in prompts[part]],
                [prompt.metadata for prompt in prompts[part]],
            )
            for part in parts
        )
        answers = client.post(server, protocol.SCORE, payloads)
        counts = [len(prompts[part]) for part in parts]
        return [
            score
            for answer, count in zip(answers, counts)
            for score in protocol.read_scores(answer, count)
        ]

    def check(server: client.Options) -> str | Failure:
        return protocol.read_health(client.get(server, protocol.HEALTH))

    return _server_reward("remote", options, ask, check)


@register("unified_reward", UnifiedRewardOptions)
def unified_reward(options: UnifiedRewardOptions, networks: Networks) -> Reward:
    """UnifiedReward (Wang et al. 2025, arXiv 2503.05236), served by vLLM or SGLang."""
    return _chat_reward("unified_reward", options, judges.JUDGES[options.judge])


@register("vlm_judge", VlmJudgeOptions)
def vlm_judge(options: VlmJudgeOptions, networks: Networks) -> Reward:
    """Any vision-language model, by a yes/no question or by RationalRewards' rubric."""
    judge = judges.JUDGES[options.judge]
    if options.question:
        judge = dataclasses.replace(judge, question=options.question)
    return _chat_reward("vlm_judge", options, judge)


def encode(image: np.ndarray, image_format: str) -> bytes:
    """An image file.

    Args:
        image: [H, W, 3] uint8.
        image_format: "png", or "jpeg" with quality 95.
    """
    from PIL import Image

    buffer = io.BytesIO()
    options = {"compress_level": 1} if image_format == "png" else {"quality": 95}
    Image.fromarray(image).save(buffer, image_format, **options)
    return buffer.getvalue()


def to_array(name: str, scores: Sequence[float | Failure]) -> np.ndarray:
    """Scores as [N] fp64, failures as NaN; one warning says how many failed and why."""
    reasons = collections.Counter(s.reason for s in scores if isinstance(s, Failure))
    if reasons:
        reason, count = reasons.most_common(1)[0]
        logging.warning(
            "%s: %d of %d images could not be judged; %d because %s.",
            *(name, reasons.total(), len(scores), count, reason),
        )
    return np.array([np.nan if isinstance(s, Failure) else s for s in scores], np.float64)


def _chat_reward(
    name: str, options: UnifiedRewardOptions | VlmJudgeOptions, judge: judges.Judge
) -> Reward:
    """A reward of one request per image to /v1/chat/completions."""

    def ask(
        server: client.Options, images: np.ndarray, prompts: list[Prompt]
    ) -> list[float | Failure]:
        form = options.image_format
        payloads = (
            judges.request(judge, options.model, encode(image, form), prompt.text, form)
            for image, prompt in zip(images, prompts)
        )
        answers = client.post(server, judges.COMPLETIONS, payloads)
        return [judges.parse(judge, answer) for answer in answers]

    def check(server: client.Options) -> str | Failure:
        models = judges.read_models(client.get(server, judges.MODELS))
        if isinstance(models, Failure) or options.model in models:
            return models if isinstance(models, Failure) else options.model
        return Failure(f"it has no model {options.model!r} (but {', '.join(models)[:300]})")

    # Addresses of OpenAI-compatible servers are often given with the version.
    base = options.url.rstrip("/").removesuffix("/v1")
    return _server_reward(name, dataclasses.replace(options, url=base), ask, check)


def _server_reward(
    name: str, options: ServerOptions, ask: Ask, check: Callable[[client.Options], str | Failure]
) -> Reward:
    """A host reward that refuses to start without its server.

    Args:
        name: of the reward.
        options: its section.
        ask: judges images.
        check: server -> the name of its judge.
    """

    def judge(images: np.ndarray, prompts: list[Prompt]) -> np.ndarray:
        return to_array(name, ask(_options(name, options), images, prompts))

    @functools.cache  # prompt sets may be several, and the server is the same
    def check_once() -> None:
        found = check(_options(name, options))
        if isinstance(found, Failure):
            raise ConfigError(
                f"The server of config.rewards.{name} at {options.url} cannot be used: "
                f"{found.reason}. Start it, or correct the section's fields."
            )
        logging.info("%s asks %r at %s.", name, found, options.url)

    def prepare(variables: PyTree, prompts: Sequence[Prompt]) -> np.ndarray:
        check_once()
        return encode_prompts(prompts)

    def input_shapes(count: int) -> jax.ShapeDtypeStruct:
        # A step can be compiled without a server; the length of prompts is that of no real set.
        return jax.ShapeDtypeStruct(encode_prompts([Prompt("a cat")] * count).shape, np.uint8)

    reward = host_reward(name, judge, timeout=None)  # its requests have one each
    return dataclasses.replace(reward, prepare=prepare, input_shapes=input_shapes)


def _options(name: str, options: ServerOptions) -> client.Options:
    """Those of the client.

    Raises:
        ConfigError: no URL, or one that cannot be used.
    """
    if not options.url:
        raise ConfigError(f"config.rewards.{name}.url is not set: give the server's address.")
    return client.Options(
        url=options.url,
        timeout=options.timeout,
        tries=options.tries,
        concurrency=options.concurrency,
        key_variable=options.key_variable,
    )
