"""Flow-GRPO of Stable Diffusion 3.5 Medium with a perceptual entropy constraint.

Paper: arXiv 2605.12112, Table 1, row "PEC", space PickScore, weight 0.05 (there of FLUX.1-dev).
Expected: the paper has, on FLUX.1-dev, an overall score of 0.734 against Flow-GRPO's 0.366; of
    SD3.5 it publishes no such row.
Estimator: the paper's Gaussian around the group's mean; the weight is `raw`, for features that are
    unit vectors times sqrt(d).
Bandwidth: 0.104, which the paper's own numbers imply. Its policy entropy of -0.84 nats per
    dimension is that of a std s = exp(-0.84 - ln(2 pi e) / 2) = exp(-0.84 - 1.4189) = 0.104. With
    that s, its H_perc of -0.70 at the start is a feature variance of 0.014 per dimension, since
    H_perc = -0.84 + (variance / s^2 - 1) / 2. At the schedule's own noise scale (`bandwidth` 0),
    .476 here and .709 on FLUX.1 at a = .9, the bonus would be a few percent of the reward's spread.
    `constraint/pec/share` in the metrics says what it is in a run; training warns below 2%.
Chips and cost: those of sd3_grpo.py; the encoder adds about 1%.
Memory: 14.25 of 17.2 GB per chip on v5e:4x4 (compiled, not run).
Models, prompts, embeddings: see sd3_grpo.py.
Command: python -m pec_jax.main --config=configs/sd3_pec.py --workdir=runs/sd3_pec \\
    --config.prompts.embeddings=embeddings/sd3
"""

from ml_collections import ConfigDict

from pec_jax.configs import sd3_grpo


def get_config() -> ConfigDict:
    """Returns the config: sd3_grpo plus the constraint."""
    config = sd3_grpo.get_config()
    config.constraints.kl.weight = 0.0  # PEC takes its place
    config.constraints.pec.weight = 0.05
    config.perception.bandwidth = 0.104
    return config
