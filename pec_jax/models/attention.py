"""Softmax attention: written out, or by a fused kernel where one is known to be better.

At 1024 px the logits of one image in one layer of Stable Diffusion 3.5 would be 24 x 4301 x 4301
numbers. A fused kernel never has them in memory: on TPU Pallas' splash attention, on GPU cuDNN's.
"""

from __future__ import annotations

import functools
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as splash_mask

from pec_jax.distributed.mesh import on_shards, platform

Array = jax.Array

FUSED_FROM = 512  # keys: below, the logits are small and a kernel's padding is not
FUSED_HEAD_DIM = 128  # the largest that cuDNN's takes
KEPT = "attention"  # names what recomputation may keep of it, see `layers.REMAT`
LANES = 128  # of a TPU's vector register
SPLASH_BLOCKS = (640, 512, 384, 256)  # queries and keys that are worked on at once


def attention(
    q: Array, k: Array, v: Array, *, bias: Array | None = None, scale: float | None = None
) -> Array:
    """Softmax attention, softmax(scale * q k^T + bias) v.

    In bfloat16, without a bias and from FUSED_FROM keys on, the platform that the program is
    compiled for decides which kernel computes it; else it is written out.

    Args:
        q: queries [N, Lq, H, D].
        k: keys [N, Lk, H, D].
        v: values [N, Lk, H, D].
        bias: added to the scaled logits, broadcastable to [N, H, Lq, Lk]; -inf masks a key out
            (at least one key a query must stay).
        scale: factor of the logits, 1/sqrt(D) by default.

    Returns:
        [N, Lq, H, D] in q's dtype; logits and softmax are fp32.

    Source: Vaswani et al. 2017, equation 1.
    """
    scale = 1.0 / math.sqrt(q.shape[-1]) if scale is None else scale
    plain = functools.partial(reference_attention, bias=bias, scale=scale)
    long = k.shape[1] >= FUSED_FROM and q.shape[-1] <= FUSED_HEAD_DIM
    if bias is not None or q.dtype != jnp.bfloat16 or not long:
        return plain(q, k, v)
    fused = {"tpu": functools.partial(on_tpu, scale=scale)}
    if platform() == "gpu" and q.shape[-1] % 8 == 0:  # cuDNN looks for its library when traced
        fused["cuda"] = functools.partial(on_gpu, scale=scale)
    return jax.lax.platform_dependent(q, k, v, default=plain, **fused)


def reference_attention(q: Array, k: Array, v: Array, *, bias: Array | None, scale: float) -> Array:
    """`attention` by two matrix products, heads before positions.

    The division by the softmax's sum comes after the product with v: that touches Lq*D numbers a
    head instead of Lq*Lk. At 44 tokens in 4 heads of 24, batch 96, on two CPU cores this takes
    1.1 ms where `jax.nn.dot_product_attention` takes 1.7 ms.
    """
    q, k, v = (x.swapaxes(1, 2) for x in (q * scale, k, v))
    logits = jnp.einsum("nhqd,nhkd->nhqk", q, k, preferred_element_type=jnp.float32)
    if bias is not None:
        logits = logits + bias
    # The maximum cancels in the quotient, so its gradient is zero and need not be computed.
    weights = jnp.exp(logits - jax.lax.stop_gradient(logits.max(axis=-1, keepdims=True)))
    total = weights.sum(axis=-1, keepdims=True)  # [N, H, Lq, 1]
    out = jnp.einsum("nhqk,nhkd->nhqd", weights.astype(v.dtype), v)
    return (out / total).astype(q.dtype).swapaxes(1, 2)


def on_tpu(q: Array, k: Array, v: Array, *, scale: float, interpret: bool = False) -> Array:
    """`attention` by Pallas' splash attention, on each chip for its own images and heads.

    Args:
        q: queries [N, Lq, H, D].
        k: keys [N, Lk, H, D].
        v: values [N, Lk, H, D].
        scale: factor of the logits.
        interpret: computes the kernel step by step on any platform, for tests.
    """
    length, num_keys = q.shape[1], k.shape[1]
    block_q, block_k = _block(length), _block(num_keys)
    # Where a head does not fill the 128 lanes of a register, positions do: what lies around the
    # kernel then costs half, see docs/scaling.md.
    fills = q.shape[-1] % LANES == 0
    layout = splash.QKVLayout.HEAD_DIM_MINOR if fills else splash.QKVLayout.SEQ_MINOR
    q, k, v = _padded(q * scale, block_q), _padded(k, block_k), _padded(v, block_k)
    # Padded keys are a segment of their own, to which no query belongs.
    query_segments: Any = np.zeros(q.shape[1], np.int32)  # constants, though declared as jax's
    key_segments: Any = (np.arange(k.shape[1]) >= num_keys).astype(np.int32)
    segments = splash.SegmentIds(q=query_segments, kv=key_segments)

    def images(q, k, v):  # [n, L, h, D]: those of this chip
        kernel = splash.make_splash_mha_single_device(
            splash_mask.MultiHeadMask(
                [splash_mask.FullMask((q.shape[1], k.shape[1]))] * q.shape[2]
            ),
            block_sizes=splash.BlockSizes(
                block_q=block_q,
                block_kv=block_k,
                block_q_dkv=block_q,
                block_kv_dkv=block_k,
                block_q_dq=block_q,
                block_kv_dq=block_k,
                q_layout=layout,
                k_layout=layout,
                v_layout=layout,
            ),
            residual_checkpoint_name=KEPT,
            interpret=interpret,
        )
        heads_first = (a.swapaxes(1, 2) for a in (q, k, v))
        return jax.vmap(lambda q, k, v: kernel(q, k, v, segments))(*heads_first).swapaxes(1, 2)

    return on_shards(images, ("batch", None, "heads", None), q, k, v)[:, :length]


def on_gpu(
    q: Array, k: Array, v: Array, *, scale: float, implementation: Literal["cudnn", "xla"] = "cudnn"
) -> Array:
    """`attention` by cuDNN's flash attention.

    jax 0.11.2 refuses odd lengths in its backward pass; Stable Diffusion 3.5 at 512 px has 1229
    tokens. Odd ones are padded by one, which is masked out by the lengths.

    Args:
        q: queries [N, Lq, H, D].
        k: keys [N, Lk, H, D].
        v: values [N, Lk, H, D].
        scale: factor of the logits.
        implementation: "xla" writes the same out on any platform, for tests.
    """
    keys = jnp.full(k.shape[0], k.shape[1], jnp.int32) if k.shape[1] % 2 else None
    padded = (_padded(x, 2) for x in (q, k, v))
    out = jax.nn.dot_product_attention(
        *padded, key_value_seq_lengths=keys, scale=scale, implementation=implementation
    )
    return out[:, : q.shape[1]]


def _block(length: int) -> int:
    """The block that wastes least of a length; of equals the largest."""
    return min(SPLASH_BLOCKS, key=lambda block: (-length % block, -block))


def _padded(x: Array, block: int) -> Array:
    """[N, L, H, D] with L filled up with zeros to a multiple of `block`."""
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % block), (0, 0), (0, 0)))
