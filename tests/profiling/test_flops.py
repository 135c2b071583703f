"""FLOPs counted from jaxprs: products, convolutions, loops, branches, recomputation."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pec_jax.profiling import flops

A, B = jnp.ones((3, 4)), jnp.ones((4, 5))
PRODUCT = 2 * 3 * 4 * 5


def test_a_product_is_two_operations_a_multiply_add():
    assert flops.count(jnp.dot, A, B) == PRODUCT
    batched = jnp.ones((7, 3, 4)), jnp.ones((7, 4, 5))
    assert flops.count(lambda a, b: jnp.einsum("nij,njk->nik", a, b), *batched) == 7 * PRODUCT
    shapes = jax.ShapeDtypeStruct((3, 4), jnp.bfloat16), jax.ShapeDtypeStruct((4, 5), jnp.bfloat16)
    assert flops.count(jnp.dot, *shapes) == PRODUCT


def test_a_convolution():
    x, kernel = jnp.ones((2, 8, 8, 3)), jnp.ones((3, 3, 3, 16))

    def convolve(x, kernel):
        numbers = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=numbers)

    assert flops.count(convolve, x, kernel) == 2 * (2 * 8 * 8 * 16) * (3 * 3 * 3)


def test_loops_count_as_often_as_they_run():
    def looped(a):
        return jax.lax.scan(lambda c, _: (jnp.dot(c, jnp.ones((4, 4))), None), a, None, length=6)[0]

    assert flops.count(jax.jit(looped), A) == 6 * 2 * 3 * 4 * 4


def test_of_a_branch_the_longest_counts():
    def branch(a, b):
        return jax.lax.cond(a[0, 0] > 0, lambda: jnp.dot(a, b), lambda: jnp.zeros((3, 5)))

    assert flops.count(branch, A, B) == PRODUCT


def test_what_is_computed_again_counts_again():
    def loss(a, remat):
        def layer(a):
            return jnp.sin(jnp.dot(a, B))

        return jnp.sum((jax.checkpoint(layer) if remat else layer)(a))

    plain = flops.count(lambda a: jax.grad(loss)(a, False), A)
    again = flops.count(lambda a: jax.grad(loss)(a, True), A)
    assert plain == 2 * PRODUCT  # forward, and backward to a
    assert again == 3 * PRODUCT
