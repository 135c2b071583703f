"""What a function on the host does wrong is said in a sentence with its reward's name."""

from __future__ import annotations

import logging
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pec_jax.data.prompts import Prompt
from pec_jax.rewards.asking import JudgeError, ask, told_by_name
from pec_jax.rewards.host import host_reward

IMAGES = np.zeros((4, 2, 2, 3), np.uint8)
PROMPTS = [Prompt("a cat")] * 4


def fail(error):
    raise error


WRONG = [
    (lambda images, prompts: np.zeros((4, 1)), r"one number for each of the 4 .* shape \(4, 1\)"),
    (lambda images, prompts: np.zeros(3), r"an array of shape \(3,\)"),
    (lambda images, prompts: "good", "type <U4"),
    (lambda images, prompts: [None] * 4, "type object"),
    (lambda images, prompts: [1j] * 4, "type complex128"),
    (lambda images, prompts: [[1], [1, 2], [3], [4]], "failed on 4 images: ValueError"),
    (lambda images: None, "failed on 4 images: TypeError: .*positional argument"),
    (
        lambda images, prompts: fail(TimeoutError("the judge\n does not answer")),
        r"failed on 4 images: TimeoutError: the judge does not answer \(.*test_asking.py, line 2\d",
    ),
    (lambda images, prompts: fail(KeyError()), "KeyError: without a message"),
    (lambda images, prompts: fail(SystemExit(3)), "SystemExit: 3"),
    (lambda images, prompts: time.sleep(60), r"within 0\.5 s, the `timeout` of its host_reward"),
]


@pytest.mark.parametrize(("function", "message"), WRONG)
def test_a_sentence_with_the_name(function, message):
    with pytest.raises(JudgeError, match=f"the reward 'judge' .*{message}"):
        ask("judge", function, (IMAGES, PROMPTS), timeout=0.5)


@pytest.mark.parametrize("timeout", [None, 60.0])
def test_the_answer(timeout):
    scores = ask("judge", lambda images, prompts: [1, 2, 3, 4], (IMAGES, PROMPTS), timeout)
    np.testing.assert_array_equal(scores, [1, 2, 3, 4])


def test_without_a_timeout_it_runs_in_the_thread_that_asks():
    def where(images, prompts):
        return [float(threading.current_thread() is here)] * 4

    here = threading.current_thread()
    assert ask("judge", where, (IMAGES, PROMPTS), None)[0] == 1.0


def scored(reward):
    """By `score`, in the middle of a program."""
    rows = reward.prepare({}, PROMPTS[:1])
    return jax.jit(reward.score)({}, jnp.zeros((1, 4, 2, 2, 3)), rows)


def fetched(reward):
    """In two parts, as by a train step, of which the first fails already."""
    rows = reward.prepare({}, PROMPTS[:1])

    @jax.jit
    def run(images):
        tickets = [reward.job.start(images, rows) for _ in range(3)]
        return jnp.stack([reward.job.finish(t) for t in tickets])

    return run(jnp.zeros((1, 4, 2, 2, 3)))


@pytest.mark.parametrize("how", [scored, fetched])
@pytest.mark.parametrize(("function", "message"), [WRONG[0], WRONG[7], WRONG[-1]])
def test_it_comes_out_of_a_program_as_it_is(how, function, message, caplog):
    begun = time.monotonic()
    with pytest.raises(JudgeError, match=f"the reward 'judge' .*{message}"), told_by_name():
        jax.block_until_ready(how(host_reward("judge", function, timeout=0.5)))
    assert time.monotonic() - begun < 30


def test_errors_of_others_stay():
    def broken(x):
        raise OSError("mine")

    with told_by_name(), pytest.raises(jax.errors.JaxRuntimeError, match="mine"):
        shape = jax.ShapeDtypeStruct((), jnp.float32)
        jax.block_until_ready(jax.pure_callback(broken, shape, jnp.zeros(())))


def test_after_an_error_nothing_more_is_judged():
    calls = []

    def function(images, prompts):
        calls.append(len(images))
        time.sleep(0.3)
        raise LookupError

    with pytest.raises(JudgeError), told_by_name():
        jax.block_until_ready(fetched(host_reward("judge", function)))
    time.sleep(1.0)
    assert len(calls) < 3


def test_an_error_of_before_is_not_told_again():
    with pytest.raises(JudgeError):
        ask("judge", WRONG[0][0], (IMAGES, PROMPTS), None)
    with told_by_name(), pytest.raises(jax.errors.JaxRuntimeError):
        raise jax.errors.JaxRuntimeError("another")


def test_jax_does_not_log_it_beside_the_sentence(monkeypatch):
    """Its loggers print the whole traceback of an error in a callback."""
    from absl import logging as absl_logging

    from pec_jax.errors import quiet_libraries

    handler = absl_logging.get_absl_handler()
    monkeypatch.setattr(handler, "filters", [])
    monkeypatch.setattr(handler.python_handler, "formatter", handler.python_handler.formatter)
    before, level = absl_logging.get_verbosity(), absl_logging.get_absl_logger().level
    quiet_libraries()

    def shown(error):
        info = (type(error), error, None)
        record = logging.LogRecord("jax", logging.ERROR, "jax.py", 1, "failed", (), info)
        return bool(handler.filter(record))

    assert not shown(JudgeError("a sentence")) and shown(ValueError("a bug"))
    absl_logging.set_verbosity(absl_logging.DEBUG)
    assert shown(JudgeError("a sentence"))
    absl_logging.set_verbosity(before)
    absl_logging.get_absl_logger().setLevel(level)  # which was not set
