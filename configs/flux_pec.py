"""Flow-GRPO of FLUX.1-dev with a perceptual entropy constraint: the cure.

Paper: arXiv 2605.12112, Table 1, row "PEC", space PickScore, weight 0.05: PickScore .226 -> .240,
    diversity (normalised) .753 -> .626, overall .734, against .047 and .366 of Flow-GRPO.
Estimator: the paper's Gaussian around the group's mean with the policy's own noise scale; the
    weight is `raw`, for features that are unit vectors times sqrt(d).
Chips, cost, models, prompts, embeddings: see flux_grpo.py.
Command: python -m pec_jax.main --config=configs/flux_pec.py --workdir=runs/flux_pec \\
    --config.prompts.embeddings=embeddings/flux
"""

from ml_collections import ConfigDict

from pec_jax.configs import flux_grpo


def get_config() -> ConfigDict:
    """Returns the config: flux_grpo plus the constraint."""
    config = flux_grpo.get_config()
    config.constraints.pec.weight = 0.05
    config.perception.bandwidth = 0.104
    return config
