"""Flow-GRPO of FLUX.1-dev with a perceptual entropy constraint.

Paper: arXiv 2605.12112, Table 1, row "PEC", space PickScore, weight 0.05: PickScore .226 -> .240,
    diversity (normalised) .753 -> .626, overall .734, against .047 and .366 of Flow-GRPO.
Estimator: the paper's Gaussian around the group's mean; the weight is `raw`, for features that are
    unit vectors times sqrt(d).
Bandwidth: 0.104, which the paper's own numbers imply. Its policy entropy of -0.84 nats per
    dimension is that of a std s = exp(-0.84 - ln(2 pi e) / 2) = exp(-0.84 - 1.4189) = 0.104. With
    that s, its H_perc of -0.70 at the start is a feature variance of 0.014 per dimension, since
    H_perc = -0.84 + (variance / s^2 - 1) / 2. At the schedule's own noise scale (`bandwidth` 0),
    .709 here, the bonus would be 2% of the reward's spread.
    `constraint/pec/share` in the metrics says what it is in a run; training warns below 2%.
Memory: 12.08 of 102.8 GB per chip on v5p:2x2x4 (compiled, not run).
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
