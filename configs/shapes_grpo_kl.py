"""Flow-GRPO with a KL loss to the base model, on the embedded shapes model.

Paper: arXiv 2605.12112, Table 1, row "Flow-GRPO w/ KL", at the scale of a laptop.
Memory: 0.24 of 17.2 GB per chip on v5e:1x1 (compiled, not run).
Command: python -m pec_jax.main --config=configs/shapes_grpo_kl.py --workdir=runs/shapes_grpo_kl
"""

from ml_collections import ConfigDict

from pec_jax.configs import shapes_grpo


def get_config() -> ConfigDict:
    """Returns the config: shapes_grpo plus the KL loss."""
    config = shapes_grpo.get_config()
    config.constraints.kl.weight = 0.1
    return config
