"""Networks in Flax linen; with `pec_jax.sharding` the only users of it."""
