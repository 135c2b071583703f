"""Checkpoints: what is saved comes back, and what is damaged is noticed."""

from __future__ import annotations

import errno
import logging
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from etils import epath

from pec_jax.config.registry import CONSTRAINTS, OBJECTIVES
from pec_jax.errors import RunError, SaveError
from pec_jax.rl.composition import Constraints
from pec_jax.rl.train_step import initial_state
from pec_jax.training.checkpoint import (
    Checkpointer,
    CheckpointError,
    OtherModelError,
    told_when_unwritable,
)
from tests.conftest import ROOT, tree_hash


def make_state(step: int):
    """A state with dotted and colon names, as the models have them, and numbers from `step`."""
    params = {
        "blocks.0:2": {"to_out.0": {"a": jnp.full((2, 300, 7), step, jnp.float32)}},
        "half": jnp.full((5,), step, jnp.bfloat16),
    }
    return state_of(params).replace(step=jnp.asarray(step, jnp.int32))


def state_of(params):
    """A first state, with an old policy and a constraint's weight."""
    objective = OBJECTIVES["nft"].make(OBJECTIVES["nft"].options())
    kl = CONSTRAINTS["kl"].options(weight=0.25)
    constraints = Constraints.from_config({"kl": kl}, set(objective.provides))
    return initial_state(params, optax.adamw(1e-3), objective, constraints)


def assert_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


@pytest.fixture
def saved(tmp_path):
    """A directory with checkpoints of steps 1, 2 and 3, of which two are kept."""
    checkpointer = Checkpointer(tmp_path, keep=2)
    for step in (1, 2, 3):
        checkpointer.save(make_state(step))
    checkpointer.wait()
    checkpointer.close()
    return tmp_path


def restore(directory):
    checkpointer = Checkpointer(directory, keep=2)
    try:
        return checkpointer.restore(make_state(0))
    finally:
        checkpointer.close()


def array_files(directory):
    """The files that hold numbers, largest first."""
    files = [p for p in directory.rglob("*") if p.is_file() and "/d/" in str(p)]
    assert files
    return sorted(files, key=lambda p: -p.stat().st_size)


def test_nothing_there_is_no_error(tmp_path):
    assert restore(tmp_path) is None


def test_the_newest_comes_back_bit_for_bit(saved):
    assert_equal(restore(saved), make_state(3))
    assert sorted(p.name for p in saved.iterdir() if p.is_dir()) == ["2", "3"]


def test_a_truncated_newest_checkpoint_is_reported_and_passed_over(saved, caplog):
    for file in array_files(saved / "3"):
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    before = tree_hash(saved)
    checkpointer = Checkpointer(saved, keep=2)
    with caplog.at_level(logging.WARNING):
        assert_equal(checkpointer.restore(make_state(0)), make_state(2))
    assert "Checkpoint 3 is damaged" in caplog.text
    assert tree_hash(saved) == before
    # Only a save makes room: the resumed run writes step 3 again.
    checkpointer.save(make_state(3))
    checkpointer.wait()
    checkpointer.close()
    assert_equal(restore(saved), make_state(3))


def test_missing_files_are_noticed(saved):
    for file in array_files(saved / "3"):
        file.unlink()
    assert_equal(restore(saved), make_state(2))


def test_a_checksum_that_does_not_match_is_noticed(saved):
    """A change that the storage library itself would read without complaint."""
    metadata = next((saved / "3" / "checksums").glob("*"))
    text = metadata.read_text()
    first = text.split(": ")[1].split(",")[0].rstrip("}")
    metadata.write_text(text.replace(first, "1", 1))
    assert_equal(restore(saved), make_state(2))


def test_if_all_are_damaged_the_run_stops_with_a_sentence(saved):
    for step in ("2", "3"):
        for file in array_files(saved / step):
            file.write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"no checkpoint .* can be read .*step 3.*step 2"):
        restore(saved)


def other_states():
    """Name -> a state that the stored one does not fit, and what the message says of it."""
    state = make_state(0)
    wider = {**state.params, "blocks.0:2": {"to_out.0": {"a": jnp.zeros((2, 300, 8))}}}
    return {
        "shape": (wider, r"a \[2, 300, 7\] there, \[2, 300, 8\] now"),
        "tree": ({"other": jnp.zeros(3)}, r"only stored: .*; not stored: ema/other"),
    }


@pytest.mark.parametrize("kind", other_states())
def test_another_model_is_told_from_a_damaged_checkpoint(saved, kind, caplog):
    params, words = other_states()[kind]
    expected = state_of(params)
    before = tree_hash(saved)
    with pytest.raises(OtherModelError, match=words) as error:
        Checkpointer(saved, keep=2).restore(expected)
    assert "checkpoint 3 in" in str(error.value) and "needs a new run" in str(error.value)
    assert "damaged" not in str(error.value) + caplog.text
    assert tree_hash(saved) == before


def test_a_checkpoint_that_was_not_finished_is_skipped_and_left_alone(saved):
    """What a process leaves that is killed while it saves; the next save removes it."""
    rest = saved / "4.orbax-checkpoint-tmp-1"
    rest.mkdir()
    (rest / "part").write_text("x")
    checkpointer = Checkpointer(saved, keep=2)
    assert_equal(checkpointer.restore(make_state(0)), make_state(3))
    assert rest.exists()
    checkpointer.save(make_state(4))
    checkpointer.close()
    assert not rest.exists()
    assert_equal(restore(saved), make_state(4))


def test_a_directory_that_is_not_there_is_not_made_by_reading(tmp_path):
    assert restore(tmp_path / "checkpoints") is None
    assert not (tmp_path / "checkpoints").exists()


FULL = """
import resource, signal, sys
from pathlib import Path
from absl import logging
from etils import epath
from pec_jax.errors import exit_on_user_error, quiet_libraries
from pec_jax.training.checkpoint import Checkpointer, told_when_unwritable
from tests.training.test_checkpoint import make_state

run, limit_before_step = epath.Path(sys.argv[1]), int(sys.argv[2])
logging.use_absl_handler()  # as app.run does
quiet_libraries()
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
checkpointer = Checkpointer(run / "checkpoints", keep=5)
with exit_on_user_error(), told_when_unwritable(run, run / "checkpoints"):
    for step in (1, 2, 3):
        if step == limit_before_step:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
        checkpointer.save(make_state(step))
        if step < limit_before_step:
            checkpointer.wait()
    checkpointer.wait()
"""


@pytest.mark.parametrize(
    ("step", "safe"), [(1, "No checkpoint was written yet"), (3, "Checkpoint 2 is safe")]
)
def test_a_full_disk_is_one_sentence_and_what_was_saved_is_safe(tmp_path, step, safe):
    """A limit on the size of files stands in for the end of the disk."""
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(tmp_path), str(step)],
        cwd=ROOT, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.stderr == (
        f"Error: the disk of {tmp_path} is full. {safe}: free space, and the same command goes "
        "on.\n"
    )
    assert done.returncode == 2
    restored = restore(tmp_path / "checkpoints")
    assert (restored is None) if step == 1 else (int(restored.step) == 2)


def test_other_errors_are_not_of_a_full_disk(tmp_path):
    with pytest.raises(OSError, match="denied"), told_when_unwritable(tmp_path, tmp_path / "none"):
        raise PermissionError(errno.EACCES, "denied")
    with (
        pytest.raises(RunError, match="No checkpoint"),
        told_when_unwritable(tmp_path, tmp_path / "no"),
    ):
        try:
            raise OSError(errno.EDQUOT, "quota")
        except OSError as error:
            raise RuntimeError("of a library") from error


def test_a_place_that_cannot_be_written_says_what_is_safe(tmp_path):
    checkpoints = epath.Path(tmp_path / "checkpoints")
    for name in ("2", "4", "6.orbax-checkpoint-tmp"):
        (checkpoints / name).mkdir(parents=True)
    error = OSError(errno.EROFS, "Read-only file system", str(checkpoints / "6.x" / "state"))
    sentence = r"checkpoints cannot be written \(Read-only file system\)\. Checkpoint 4 is safe"
    with pytest.raises(SaveError, match=sentence), told_when_unwritable(tmp_path, checkpoints):
        raise error
    elsewhere = OSError(errno.EROFS, "Read-only file system", str(tmp_path / "metrics.jsonl"))
    with pytest.raises(OSError, match="metrics"), told_when_unwritable(tmp_path, checkpoints):
        raise elsewhere
