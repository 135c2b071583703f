"""Asking somebody else's function: within a time, and what goes wrong is said in a sentence.

JAX hands on an error of a host function as text only, inside one of its own. So the error is kept
here, and `told_by_name` puts it in the place of JAX's.
"""

from __future__ import annotations

import collections
import contextlib
import queue
import threading
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from pec_jax.errors import RunError

TIMEOUT_SECONDS = 3600.0
_TOLD_CHARS = 500  # of somebody else's message
_GO_ON = "then run the same command again, which goes on from what is saved."
_TOLD_BY = 100  # characters of a sentence by which it is found in an error of JAX
_kept: collections.deque[JudgeError] = collections.deque(maxlen=100)


class JudgeError(RunError):
    """A reward's function on the host that failed; the message has its name."""


def ask(
    name: str, function: Callable[..., Any], arguments: tuple[Any, ...], timeout: float | None
) -> np.ndarray:
    """The answer of a reward's function.

    Args:
        name: of the reward.
        function: returns one number for each row of the first argument.
        arguments: arrays or lists of N.
        timeout: seconds until it is given up, for which it gets a thread of its own; None waits
            for ever.

    Returns:
        Scores [N], of the type in which the function returned them.

    Raises:
        JudgeError: it raised, did not answer in time, or did not return N numbers.
    """
    count = len(arguments[0])
    try:
        answer = function(*arguments) if timeout is None else _within(timeout, function, arguments)
        scores = np.asarray(answer)
    except _TooLateError:
        raise _keep(
            f"the reward {name!r} has not judged {count} images within {timeout:g} s, the `timeout`"
            f" of its host_reward. If it is only slow, raise that; {_GO_ON}"
        ) from None
    except (Exception, SystemExit) as error:  # whatever somebody else's code raises
        text = " ".join(str(error).split())[:_TOLD_CHARS] or "without a message"
        reason = f"{type(error).__name__}: {text}"
        raise _keep(
            f"the reward {name!r} failed on {count} images: {reason}{_place(error)}. Correct it; "
            f"{_GO_ON}"
        ) from error
    if scores.shape != (count,) or scores.dtype.kind not in "biuf":
        raise _keep(
            f"the reward {name!r} must return one number for each of the {count} images; it "
            f"returned an array of shape {scores.shape} and type {scores.dtype}. Correct it; "
            f"{_GO_ON}"
        )
    return scores


@contextlib.contextmanager
def told_by_name() -> Iterator[None]:
    """Raises a judge's own error where JAX raises one that has its text.

    Raises:
        JudgeError: a function that `ask` asked in this block has failed.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        for own in _kept:
            if str(own)[:_TOLD_BY] in str(error):
                raise own from own.__cause__
        raise


def _keep(sentence: str) -> JudgeError:
    error = JudgeError(sentence)
    _kept.append(error)
    return error


class _TooLateError(Exception):
    """No answer in time; not TimeoutError, which the function may raise itself."""


def _within(seconds: float, function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    """What a function returns or raises, called in a thread that is left behind if it hangs."""
    outcome: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()

    def run() -> None:
        try:
            outcome.put((function(*arguments), None))
        except BaseException as error:
            outcome.put((None, error))

    threading.Thread(target=run, name="judge", daemon=True).start()
    try:
        answer, error = outcome.get(timeout=seconds)
    except queue.Empty:
        raise _TooLateError from None
    if error is not None:
        raise error
    return answer


def _place(error: BaseException) -> str:
    """Where it was raised: in the innermost file that is neither this one nor installed."""
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if frame.filename != __file__ and "site-packages" not in frame.filename
    ]
    return f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ""
