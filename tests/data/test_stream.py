import jax.numpy as jnp
import numpy as np
import pytest

from pec_jax.data.stream import PromptStream, repeat_groups


def test_every_epoch_is_a_shuffle_without_replacement():
    stream = PromptStream(num_prompts=12, groups=4, seed=0)
    epochs = [np.concatenate([stream.ids(3 * e + i) for i in range(3)]) for e in range(3)]
    for epoch in epochs:
        np.testing.assert_array_equal(np.sort(epoch), np.arange(12))
    assert not np.array_equal(epochs[0], epochs[1])
    assert not np.array_equal(epochs[0], np.arange(12))


def test_epochs_that_do_not_divide_run_into_each_other():
    stream = PromptStream(num_prompts=5, groups=3, seed=1)
    ids = np.concatenate([stream.ids(i) for i in range(10)])
    for epoch in ids.reshape(6, 5):
        np.testing.assert_array_equal(np.sort(epoch), np.arange(5))


def test_an_iteration_may_be_larger_than_the_set():
    ids = PromptStream(num_prompts=2, groups=5, seed=0).ids(7)
    assert ids.shape == (5,) and set(ids.tolist()) == {0, 1}


def test_pure_in_seed_and_iteration():
    stream = PromptStream(num_prompts=100, groups=8, seed=3)
    late = stream.ids(1000)
    again = PromptStream(num_prompts=100, groups=8, seed=3)
    for i in range(5):
        again.ids(i)  # what was asked before must not matter
    np.testing.assert_array_equal(again.ids(1000), late)
    assert not np.array_equal(PromptStream(100, 8, seed=4).ids(1000), late)
    assert late.dtype == np.int32


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 4, 0), "at least one prompt"),
        ((4, 0, 0), "at least one group"),
        ((4, 4, -1), "negative"),
    ],
)
def test_impossible_streams_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        PromptStream(*arguments)


def test_iterations_count_from_zero():
    with pytest.raises(ValueError, match="from 0"):
        PromptStream(4, 2, 0).ids(-1)


def test_groups_stay_together():
    tree = {"a": np.arange(3), "b": np.arange(6).reshape(3, 2)}
    repeated = repeat_groups(tree, 2)
    np.testing.assert_array_equal(repeated["a"], [0, 0, 1, 1, 2, 2])
    np.testing.assert_array_equal(jnp.reshape(repeated["b"], (3, 2, 2))[:, 1], tree["b"])
