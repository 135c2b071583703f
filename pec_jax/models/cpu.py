"""What computes the same faster on a CPU alone; `layers` uses it where the program is for one.

That is decided by `distributed.mesh.platform`, and by nothing else.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.custom_derivatives import linear_call

Array = jax.Array

MAX_UNROLLED = 4  # layers


def unrolled(length: int) -> int:
    """Layers per loop iteration of a run of `length` equal layers.

    All of a short run: XLA then fuses across layers instead of copying in and out of a loop, which
    makes the gradient of the embedded default 15% faster and halves its compilation.
    """
    return length if length <= MAX_UNROLLED else 1


@jax.custom_jvp
def product(x: Array, kernel: Array) -> Array:
    """x W, differentiated as it is fast on a CPU.

    The gradient for W is x^T dy. JAX's own rule has (dy^T x)^T: XLA then transposes dy, and
    computes what dy comes from once more to do so. Here x is transposed, which is in memory.

    Args:
        x: [..., in].
        kernel: [in, out].

    Returns:
        [..., out].
    """
    return jnp.dot(x, kernel)


@product.defjvp
def _product_jvp(primals: tuple[Array, Array], tangents: tuple[Array, Array]):
    (x, kernel), (dx, dkernel) = primals, tangents

    def gradient(x: Array, dy: Array) -> Array:
        return jnp.dot(x.reshape(-1, x.shape[-1]).T, dy.reshape(-1, dy.shape[-1]))

    along_kernel = linear_call(jnp.dot, gradient, x, dkernel)
    return product(x, kernel), jnp.dot(dx, kernel) + along_kernel


def joins_adapter(kernel: Array, rank: int) -> bool:
    """Whether x (W + a b) is cheaper than x W + (x a) b.

    Beside a small W of the embedded model's size an adapter is not thin: its three passes (forward,
    and backward for x and for itself) cost a token as much as the one more that W + a b has, its
    gradient, in smaller pieces. That is for fp32 only; in bfloat16 the sum would round small a b
    away.

    Args:
        kernel: W [in, out].
        rank: r of a [in, r] and b [r, out].
    """
    fan_in, fan_out = kernel.shape
    thin = 3 * rank * (fan_in + fan_out) < fan_in * fan_out
    return not thin and kernel.dtype == jnp.float32
