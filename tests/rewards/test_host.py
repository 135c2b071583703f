import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pec_jax.data.prompts import Prompt
from pec_jax.rewards.host import decode_prompts, encode_prompts, host_reward

PROMPTS = [Prompt("a cat"), Prompt("ünïcödé \0 “sign”", {"include": [{"count": 2}]}), Prompt("")]


def test_prompts_travel_unharmed():
    rows = encode_prompts(PROMPTS)
    assert rows.dtype == np.uint8 and rows.shape[0] == 3
    assert decode_prompts(rows) == PROMPTS
    assert decode_prompts(rows[[2, 0]]) == [PROMPTS[2], PROMPTS[0]]


def test_sees_png_levels_and_its_own_prompt():
    seen = []

    def function(images, prompts):
        seen.append((images.dtype, images.shape))
        return images[:, 0, 0, 0] + np.array([1000 * len(p.text) for p in prompts])

    reward = host_reward("ocr", function)
    levels = np.array([[0, 255, 128], [17, 18, 19], [1, 2, 3]])
    images = jnp.broadcast_to((levels / 255.0)[..., None, None, None], (3, 3, 4, 5, 3))
    scores = jax.jit(reward.score)(reward.params, images + 1e-3, reward.prepare(PROMPTS))
    lengths = np.array([[len(p.text)] for p in PROMPTS])
    np.testing.assert_array_equal(scores, levels + 1000 * lengths)
    assert scores.dtype == jnp.float32
    assert seen[-1] == (np.uint8, (9, 4, 5, 3))
    assert reward.name == "ocr"


@pytest.mark.parametrize("answer", [np.zeros((4, 1)), np.zeros(3), np.array(["a"] * 4), [None] * 4])
def test_wrong_answers_fail_with_the_name(answer):
    reward = host_reward("judge", lambda images, prompts: answer)
    rows = reward.prepare(PROMPTS[:2])
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
