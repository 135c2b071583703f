"""Networks in Flax linen; with `pec_jax.distributed.mesh` the only users of it."""
