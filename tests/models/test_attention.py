"""Attention against torch, and the fused TPU kernel, interpreted, against the written-out one."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from pec_jax.models.attention import attention, on_gpu, on_tpu, reference_attention


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_equals_torch():
    q, k, v = normal(1, 2, 5, 3, 8), normal(2, 2, 7, 3, 8), normal(3, 2, 7, 3, 8)
    theirs = torch.nn.functional.scaled_dot_product_attention(
        *(torch.from_numpy(a).transpose(1, 2) for a in (q, k, v))
    ).transpose(1, 2)
    np.testing.assert_allclose(attention(q, k, v), theirs, atol=1e-6)


def test_bias_and_scale_equal_jax():
    q, k, v = (normal(i, 2, 6, 3, 8) for i in range(3))
    causal = jnp.where(jnp.tril(jnp.ones((6, 6), bool)), 0.0, -jnp.inf)[None, None]
    bias = causal + normal(4, 1, 3, 6, 6)
    ours = attention(q, k, v, bias=bias, scale=0.3)
    theirs = jax.nn.dot_product_attention(q, k, v, bias=bias, scale=0.3)
    np.testing.assert_allclose(ours, theirs, atol=1e-6)


def test_gradient_equals_that_of_a_plain_softmax():
    q, k, v = (normal(i, 1, 4, 2, 4) for i in range(3))

    def plain(q, k, v):
        weights = jax.nn.softmax(jnp.einsum("nqhd,nkhd->nhqk", q, k) / 2.0, axis=-1)
        return jnp.einsum("nhqk,nkhd->nqhd", weights, v)

    def loss(f):
        return jax.grad(lambda *a: jnp.sum(jnp.sin(f(*a))), argnums=(0, 1, 2))(q, k, v)

    for ours, theirs in zip(loss(attention), loss(plain)):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_masked_keys_have_no_influence_and_no_gradient():
    q, k, v = (normal(i, 1, 4, 2, 4) for i in range(3))
    bias = jnp.array([0.0, 0.0, -jnp.inf, -jnp.inf])
    grads = jax.grad(lambda k, v: attention(q, k, v, bias=bias).sum(), (0, 1))(k, v)
    for g in grads:
        assert np.isfinite(g).all()
        assert (np.asarray(g)[:, 2:] == 0).all()
        assert np.abs(np.asarray(g)[:, :2]).max() > 0


def test_large_logits_stay_finite():
    q = 1e3 * normal(0, 1, 3, 1, 4)
    assert np.isfinite(attention(q, q, q)).all()


def test_bf16_keeps_its_dtype():
    q, k, v = (normal(i, 2, 6, 3, 8) for i in range(3))
    low = attention(*(jnp.asarray(a, jnp.bfloat16) for a in (q, k, v)))
    assert low.dtype == jnp.bfloat16
    np.testing.assert_allclose(low.astype(jnp.float32), attention(q, k, v), atol=0.05, rtol=0.05)


# Lengths that need padding in queries, in keys, in both; the published lengths are 1024 and 1229.
# Heads of 64 lie with the positions in the lanes, those of 128 with the features.
@pytest.mark.parametrize(
    ("queries", "keys", "dim"),
    [(256, 256, 64), (200, 300, 64), (512, 700, 64), (200, 300, 128)],
)
def test_the_tpu_kernel_and_its_gradient(queries, keys, dim):
    q, k, v = (normal(i, 2, n, 2, dim) for i, n in enumerate((queries, keys, keys)))

    def loss(f, **options):
        return lambda *a: jnp.sum(jnp.sin(f(*a, scale=0.2, **options)))

    np.testing.assert_allclose(
        on_tpu(q, k, v, scale=0.2, interpret=True),
        reference_attention(q, k, v, bias=None, scale=0.2),
        atol=5e-6,  # fp32 rounding of another order of sums
    )
    ours = jax.grad(loss(on_tpu, interpret=True), (0, 1, 2))(q, k, v)
    theirs = jax.grad(loss(reference_attention, bias=None), (0, 1, 2))(q, k, v)
    for a, b in zip(ours, theirs):
        np.testing.assert_allclose(a, b, atol=2e-5)


# Odd lengths are padded, in queries, in keys, in both.
@pytest.mark.parametrize(("queries", "keys"), [(6, 6), (5, 6), (6, 7), (5, 7)])
def test_the_gpu_kernel_is_given_even_lengths_and_gives_the_same(queries, keys, monkeypatch):
    kernel, given = jax.nn.dot_product_attention, set()

    def watched(*arrays, **options):
        given.update(a.shape[1] for a in arrays)
        return kernel(*arrays, **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", watched)
    q, k, v = (normal(i, 2, n, 2, 8) for i, n in enumerate((queries, keys, keys)))

    def loss(f, **options):
        return lambda *a: jnp.sum(jnp.sin(f(*a, scale=0.2, **options)))

    ours = jax.value_and_grad(loss(on_gpu, implementation="xla"), (0, 1, 2))(q, k, v)
    theirs = jax.value_and_grad(loss(reference_attention, bias=None), (0, 1, 2))(q, k, v)
    assert given == {queries + queries % 2, keys + keys % 2}
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), ours, theirs)


def test_where_no_kernel_fits_the_program_holds_none():
    """On this platform, in fp32 or below the length, it is written out."""

    def program(length, dtype):
        x = jax.ShapeDtypeStruct((1, length, 2, 64), dtype)
        return str(jax.make_jaxpr(attention)(x, x, x))

    assert "pallas_call" in program(512, jnp.bfloat16)
    assert "pallas_call" not in program(511, jnp.bfloat16)
    assert "pallas_call" not in program(512, jnp.float32)


def test_the_program_of_a_cpu_has_no_kernel():
    x = jnp.asarray(normal(0, 1, 512, 2, 8), jnp.bfloat16)
    out = jax.jit(attention)(x, x, x)
    assert out.dtype == jnp.bfloat16 and np.isfinite(np.asarray(out, np.float32)).all()
