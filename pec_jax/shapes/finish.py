"""Finish: how well a picture is made, whatever it shows. No caption names it.

Five defects, each in [0, 1] where 0 is the best: out of focus, grainy, flat (little contrast),
badly exposed, crooked (the camera was not level). They are drawn per picture and go together, as a
careless photographer's do, and most pictures are mediocre, as on the web: a common level z ~
Beta(3, 2), and each defect clip(z + N(0, 0.2^2)).
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float

from pec_jax.shapes.scenes import IMAGE_SIZE

DEFECTS = ("focus", "noise", "contrast", "exposure", "framing")
LEVEL = (3.0, 2.0)  # Beta's parameters
SPREAD = 0.2

BEST_BLUR, WORST_BLUR = 0.3, 1.0  # px, standard deviation
WORST_GRAIN = 0.05  # standard deviation of the grain's nodes
GRAIN_CELL = 4  # px
WORST_CONTRAST = 0.55  # factor around middle grey; 1 is the best
WORST_EXPOSURE = 0.18  # added, of either sign
WORST_TILT = math.radians(5.0)  # of either sign


@struct.dataclass
class Finish:
    """What was done to N pictures."""

    blur: Array  # [N] px
    grain: Array  # [N]
    contrast: Array  # [N]
    exposure: Array  # [N] signed
    tilt: Array  # [N] signed, radians


def draw_defects(key: Array, n: int) -> Float[Array, "n 5"]:
    """Defects of n pictures in the order of `DEFECTS`, each in [0, 1]."""
    level_key, spread_key = jax.random.split(key)
    level = jax.random.beta(level_key, *LEVEL, (n, 1))
    drawn = level + SPREAD * jax.random.normal(spread_key, (n, len(DEFECTS)))
    return jnp.clip(drawn, 0.0, 1.0)


def from_defects(key: Array, defects: Float[Array, "n 5"]) -> Finish:
    """A finish with these defects; signs are drawn."""
    focus, noise, contrast, exposure, framing = jnp.moveaxis(defects, -1, 0)
    signs = jax.random.rademacher(key, (2, len(defects)), jnp.float32)
    return Finish(
        blur=BEST_BLUR + (WORST_BLUR - BEST_BLUR) * focus,
        grain=WORST_GRAIN * noise,
        contrast=1.0 - (1.0 - WORST_CONTRAST) * contrast,
        exposure=WORST_EXPOSURE * exposure * signs[0],
        tilt=WORST_TILT * framing * signs[1],
    )


def to_defects(finish: Finish) -> Float[Array, "n 5"]:
    """The inverse of `from_defects`, clipped to [0, 1]."""
    defects = [
        (finish.blur - BEST_BLUR) / (WORST_BLUR - BEST_BLUR),
        finish.grain / WORST_GRAIN,
        (1.0 - finish.contrast) / (1.0 - WORST_CONTRAST),
        jnp.abs(finish.exposure) / WORST_EXPOSURE,
        jnp.abs(finish.tilt) / WORST_TILT,
    ]
    return jnp.clip(jnp.stack(defects, axis=-1), 0.0, 1.0)


def score(defects: Float[Array, "n 5"]) -> Float[Array, " n"]:
    """Finish of pictures: 1 - the mean defect, in [0, 1]."""
    return 1.0 - jnp.mean(defects, axis=-1)


def develop(key: Array, images: Float[Array, "n s s 3"], finish: Finish) -> Float[Array, "n s s 3"]:
    """Sharp pictures, already tilted, as such a camera would have taken them.

    Blur, contrast around middle grey, exposure, grain, in this order; clipped to [0, 1].

    Args:
      key: of the grain.
      images: in [0, 1].
      finish: of each.
    """
    n = images.shape[0]
    images = blur(images, finish.blur)
    images = finish.contrast[:, None, None, None] * (images - 0.5) + 0.5
    images += finish.exposure[:, None, None, None]
    nodes = IMAGE_SIZE // GRAIN_CELL
    grain = jax.random.normal(key, (n, nodes, nodes, 1))
    grain = jax.image.resize(grain, (n, IMAGE_SIZE, IMAGE_SIZE, 1), "linear")
    return jnp.clip(images + finish.grain[:, None, None, None] * grain, 0.0, 1.0)


def blur(images: Float[Array, "n s s 3"], std: Float[Array, " n"]) -> Float[Array, "n s s 3"]:
    """Gaussian blur by `std` px; its weights sum to 1 at the border too, which stays as bright."""
    offsets = jnp.arange(IMAGE_SIZE)[:, None] - jnp.arange(IMAGE_SIZE)
    weights = jnp.exp(-0.5 * (offsets / std[:, None, None]) ** 2)
    weights /= jnp.sum(weights, axis=-1, keepdims=True)
    return jnp.einsum("nij,nhjc->nhic", weights, jnp.einsum("nij,njwc->niwc", weights, images))
