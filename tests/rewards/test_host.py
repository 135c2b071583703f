"""The host seam: what the function sees, what it may answer, and groups split over devices."""

from __future__ import annotations

import functools
import os
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import io_callback

from pec_jax.config import ConfigError, from_config_dict
from pec_jax.data.prompts import Prompt
from pec_jax.distributed import mesh as sharding
from pec_jax.rewards import host
from pec_jax.rewards.host import decode_prompts, encode_prompts, host_reward
from tests.conftest import on_eight_devices, small_config_dict

PROMPTS = [Prompt("a cat"), Prompt("ünïcödé \0 “sign”", {"include": [{"count": 2}]}), Prompt("")]


def test_prompts_travel_unharmed():
    rows = encode_prompts(PROMPTS)
    assert rows.dtype == np.uint8 and rows.shape[0] == 3
    assert decode_prompts(rows) == PROMPTS
    assert decode_prompts(rows[[2, 0]]) == [PROMPTS[2], PROMPTS[0]]


def first_pixel_and_length(images, prompts):
    """The level of one pixel, plus 1000 for each letter of the image's prompt."""
    return images[:, 0, 0, 0] + np.array([1000 * len(p.text) for p in prompts])


def test_sees_png_levels_and_its_own_prompt():
    seen = []

    def function(images, prompts):
        seen.append((images.dtype, images.shape))
        return first_pixel_and_length(images, prompts)

    reward = host_reward("ocr", function)
    levels = np.array([[0, 255, 128], [17, 18, 19], [1, 2, 3]])
    images = jnp.broadcast_to((levels / 255.0)[..., None, None, None], (3, 3, 4, 5, 3))
    scores = jax.jit(reward.score)({}, images + 1e-3, reward.prepare({}, PROMPTS))
    lengths = np.array([[len(p.text)] for p in PROMPTS])
    np.testing.assert_array_equal(scores, levels + 1000 * lengths)
    assert scores.dtype == jnp.float32
    assert seen[-1] == (np.uint8, (9, 4, 5, 3))
    assert (reward.name, reward.network) == ("ocr", "")


@pytest.mark.parametrize("answer", [np.zeros((4, 1)), np.zeros(3), np.array(["a"] * 4), [None] * 4])
def test_wrong_answers_fail_with_the_name(answer):
    reward = host_reward("judge", lambda images, prompts: answer)
    rows = reward.prepare({}, PROMPTS[:2])
    with pytest.raises(Exception, match="'judge' must return one number for each of the 4 images"):
        jax.block_until_ready(jax.jit(reward.score)({}, jnp.zeros((2, 2, 4, 4, 3)), rows))


def test_errors_of_the_function_surface():
    def function(images, prompts):
        raise TimeoutError("the judge does not answer")

    reward = host_reward("judge", function)
    with pytest.raises(Exception, match="the judge does not answer"):
        jax.block_until_ready(
            reward.score({}, jnp.zeros((1, 2, 4, 4, 3)), encode_prompts(PROMPTS[:1]))
        )


def in_chunks(reward, images, rows, chunks=2):
    """Scores [P, K] as a train step asks for them: some images at a time, answers in the end."""

    def start(images):
        return reward.job.start(images, rows)

    @jax.jit
    def run(images):
        groups, size = images.shape[:2]
        parts = images.reshape(groups, chunks, size // chunks, *images.shape[2:]).swapaxes(0, 1)
        tickets = jax.lax.map(start, parts).swapaxes(0, 1).reshape(groups, size)
        return reward.job.finish(tickets)

    return run(images)


def test_answers_that_are_fetched_later_are_the_same():
    reward = host_reward("judge", first_pixel_and_length)
    levels = np.arange(12).reshape(3, 4)
    images = jnp.broadcast_to((levels / 255.0)[..., None, None, None], (3, 4, 4, 5, 3))
    rows = reward.prepare({}, PROMPTS)
    expected = reward.score({}, images, rows)
    for chunks in (1, 2, 4):
        np.testing.assert_array_equal(in_chunks(reward, images, rows, chunks), expected)


def test_a_broken_image_and_an_image_without_an_answer_are_nan():
    def function(images, prompts):
        return np.where(images[:, 0, 0, 0] > 100, np.nan, 1.0)

    reward = host_reward("judge", function)
    images = np.zeros((1, 4, 4, 4, 3), np.float32)
    images[0, 1, 2, 2, 0] = np.nan
    images[0, 2] = 1.0
    rows = reward.prepare({}, PROMPTS[:1])
    for found in (reward.score({}, jnp.asarray(images), rows), in_chunks(reward, images, rows)):
        np.testing.assert_array_equal(found, [[1.0, np.nan, np.nan, 1.0]])


def test_an_error_of_a_judge_that_is_asked_early_surfaces():
    def function(images, prompts):
        raise TimeoutError("the judge does not answer")

    reward = host_reward("judge", function)
    with pytest.raises(Exception, match="the judge does not answer"):
        jax.block_until_ready(
            in_chunks(reward, jnp.zeros((1, 2, 4, 4, 3)), encode_prompts(PROMPTS[:1]))
        )


def test_the_device_goes_on_while_the_host_judges():
    """Work between the chunks takes no longer for a judge that takes as long as all of it."""
    started, finished = [], []

    def function(images, prompts):
        started.append(time.monotonic())
        time.sleep(0.3)
        return np.zeros(len(images))

    def work(x):
        finished.append(time.monotonic())
        return x

    reward = host_reward("judge", function)
    rows = reward.prepare({}, PROMPTS[:1])

    @jax.jit
    def run(images):
        def chunk(part):
            tickets = reward.job.start(part, rows)
            return tickets, io_callback(work, jax.ShapeDtypeStruct((), jnp.float32), part.mean())

        tickets, _ = jax.lax.map(chunk, images)
        return reward.job.finish(tickets.swapaxes(0, 1).reshape(1, -1))

    jax.block_until_ready(run(jnp.zeros((4, 1, 1, 4, 4, 3))))
    assert len(started) == len(finished) == 4
    assert max(finished) - started[0] < 0.3  # before the first image was judged


MESHES = {"groups": (4, 2, 1), "layers": (2, 2, 2), "one device": (1, 1, 1)}
GROUPS, SIZE = 8, 3


def sharded_scores(shape, function, side, early=False):
    """Scores of 8 groups on a mesh of that shape, in a loop as in the train step: [2, P, K]."""
    levels = np.arange(GROUPS * SIZE).reshape(GROUPS, SIZE)
    images = np.broadcast_to((levels / 255)[..., None, None, None], (GROUPS, SIZE, side, side, 3))
    config = small_config_dict()
    config.batch.groups = GROUPS
    config.mesh.update(dict(zip(sharding.AXES, shape)))
    config = from_config_dict(config)
    mesh = sharding.make_mesh(config)
    reward = host_reward("judge", function)
    rows = reward.prepare({}, [Prompt("a" * i) for i in range(GROUPS)])
    given = sharding.put_batch((images.astype(np.float32), rows), mesh, GROUPS)

    @jax.jit
    def score(images, rows):
        factors = jnp.asarray([1.0, 0.0])
        if not early:
            return jax.lax.map(lambda factor: reward.score({}, images * factor, rows), factors)
        tickets = jax.lax.map(lambda factor: reward.job.start(images * factor, rows), factors)
        return jnp.stack([reward.job.finish(tickets[i]) for i in range(2)])

    with sharding.active(mesh, config):
        return np.asarray(score(*given))


def scores_on_meshes():
    """Mesh -> (scores, groups of each call, number of calls)."""
    found = {}
    cases = [(early, name, shape) for early in (False, True) for name, shape in MESHES.items()]
    for early, name, shape in cases:
        calls = []

        def function(images, prompts, calls=calls):
            calls.append(len(images) // SIZE)
            return first_pixel_and_length(images, prompts)

        scores = sharded_scores(shape, function, 32, early)
        found[f"{name}, early" if early else name] = (
            scores.tolist(),
            sorted(set(calls)),
            len(calls),
        )
    return found


def test_each_device_asks_about_its_own_groups():
    found = on_eight_devices(scores_on_meshes)
    levels = np.arange(GROUPS * SIZE).reshape(GROUPS, SIZE)
    lengths = 1000 * np.arange(GROUPS)[:, None]
    for name, (scores, _, _) in found.items():
        np.testing.assert_array_equal(scores[0], levels + lengths, err_msg=name)
        np.testing.assert_array_equal(scores[1], 0 * levels + lengths, err_msg=name)
    # Groups of each call, and calls, of two iterations of the loop.
    assert found["groups"][1:] == found["groups, early"][1:] == [[1], 16]
    assert found["one device"][1:] == found["one device, early"][1:] == [[8], 2]
    assert found["layers"][1] == [2]  # of 2 x 2 parts; what splits layers only, asks as well


def large_images():
    """The sentence that refuses what would hang, and scores where there is a thread to spare."""
    os.environ["NPROC"] = "8"  # threads of the CPU client, made below
    try:
        sharded_scores((8, 1, 1), first_pixel_and_length, 256)
    except ConfigError as error:
        refused = str(error)
    return refused, sharded_scores((4, 1, 1), first_pixel_and_length, 256).tolist()


def test_a_mesh_of_cpu_devices_without_a_thread_to_spare_is_refused():
    refused, scores = on_eight_devices(large_images)
    assert "'judge' runs on the host, and 8 CPU device" in refused and "NPROC=9" in refused
    assert np.shape(scores) == (2, GROUPS, SIZE)


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_only_a_program_for_cpus_wants_a_thread_to_spare(monkeypatch, platform):
    """Whatever compiles it: `pec_jax.aot` does so on a CPU, for chips that are not there."""
    monkeypatch.setattr(host, "platform", lambda: platform)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0}, raising=False)
    monkeypatch.setattr(jax, "local_device_count", lambda: 1)
    monkeypatch.delenv("NPROC", raising=False)
    reward = host_reward("judge", first_pixel_and_length)
    images = jnp.zeros((1, 2, 256, 256, 3))
    rows = jnp.asarray(encode_prompts([Prompt("a cat")]))
    trace = functools.partial(jax.eval_shape, reward.score, {}, images, rows)
    if platform == "tpu":
        assert trace().shape == (1, 2)
    else:
        with pytest.raises(ConfigError, match="would occupy all 1 thread"):
            trace()
