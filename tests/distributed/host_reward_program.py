"""Run by test_processes.py: `pec_jax.main` with a host reward of a user's own."""

from __future__ import annotations

import numpy as np

from pec_jax import main
from pec_jax.rewards import register
from pec_jax.rewards.host import host_reward


@register("redness")
def make(options, networks):
    """Depends on the image and on its prompt, as an OCR reward does."""

    def judge(images, prompts):
        red, rest = images[..., 0].mean((1, 2)), images[..., 1:].mean((1, 2, 3))
        wanted = np.array([1 if "red" in prompt.text else -1 for prompt in prompts])
        return wanted * (red - rest) / 255

    return host_reward("redness", judge)


if __name__ == "__main__":
    main.run()
