"""The evaluation of the model before training: kept in the run directory, for training loses it.

Its numbers are in `eval_base.json`. `eval_base.safetensors` holds the mean and covariance of its
images' features, from which later evaluations take their distance.
"""

from __future__ import annotations

import safetensors.numpy
from absl import logging
from etils import epath

from pec_jax import io
from pec_jax.errors import FileError
from pec_jax.evaluation.metrics import Moments
from pec_jax.training.evaluator import Evaluation

_NUMBERS, _MOMENTS = "eval_base.json", "eval_base.safetensors"


def read_intact(directory: epath.Path) -> Evaluation | None:
    """What `write` has written; None, and a warning, if it is damaged, for it can be made anew."""
    if not exists(directory):
        return None
    try:
        return read(directory)
    except FileError as error:
        logging.warning("%s. The base model is evaluated anew.", error)
        return None


def exists(directory: epath.Path) -> bool:
    """Whether both files are there."""
    return (directory / _NUMBERS).exists() and (directory / _MOMENTS).exists()


def remove(directory: epath.Path) -> None:
    """Leaves none, so that it will be made anew."""
    for name in (_NUMBERS, _MOMENTS):
        (directory / name).unlink(missing_ok=True)


def write(directory: epath.Path, evaluation: Evaluation) -> None:
    """Writes both files, the one that a person reads last."""
    tensors = {
        f"{name}/{part}": value
        for name, moments in evaluation.moments.items()
        for part, value in moments._asdict().items()
    }
    io.write_bytes(directory / _MOMENTS, safetensors.numpy.save(tensors))
    io.write_json(directory / _NUMBERS, evaluation.numbers)


def read(directory: epath.Path) -> Evaluation:
    """What `write` has written.

    Raises:
        FileError: a file that cannot be read, or holds something else.
    """
    path = directory / _MOMENTS
    try:
        tensors = safetensors.numpy.load(path.read_bytes())
        names = {name.rpartition("/")[0] for name in tensors}
        moments = {
            name: Moments(tensors[f"{name}/mean"], tensors[f"{name}/covariance"]) for name in names
        }
    except Exception as error:  # what is wrong in a file decides what is raised
        raise FileError(f"{path}: cannot be read ({error})") from None
    numbers = io.read_json(directory / _NUMBERS)
    if not numbers or not all(isinstance(value, int | float) for value in numbers.values()):
        raise FileError(f"{directory / _NUMBERS}: does not hold numbers by name")
    return Evaluation(numbers, moments)
