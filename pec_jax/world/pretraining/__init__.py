"""Training of the embedded default: every stage that `python -m pec_jax.pretrain` runs."""
