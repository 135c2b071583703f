"""Flow-GRPO with a perceptual entropy constraint on the embedded shapes model.

Paper: arXiv 2605.12112, Table 1, rows "PEC", at the scale of a laptop.
Memory: 0.20 of 17.2 GB per chip on v5e:1x1 (compiled, not run).
Command: python -m pec_jax.main --config=configs/shapes_pec.py --workdir=runs/shapes_pec
"""

from ml_collections import ConfigDict

from pec_jax.configs import shapes_grpo


def get_config() -> ConfigDict:
    """Returns the config: shapes_grpo plus the constraint."""
    config = shapes_grpo.get_config()
    config.constraints.pec.update({"weight": 6.0, "unit": "reward_std"})
    return config
