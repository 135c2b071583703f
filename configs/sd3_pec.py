"""Flow-GRPO of Stable Diffusion 3.5 Medium with a perceptual entropy constraint: the cure.

Paper: arXiv 2605.12112, Table 1, row "PEC", space PickScore, weight 0.05 (there of FLUX.1-dev).
Expected: the paper has, on FLUX.1-dev, an overall score of 0.734 against Flow-GRPO's 0.366; of
    SD3.5 it publishes no such row.
Estimator: the paper's Gaussian around the group's mean with the policy's own noise scale; the
    weight is `raw`, for features that are unit vectors times sqrt(d).
Chips and cost: those of sd3_grpo.py; the encoder adds about 1%.
Models, prompts, embeddings: see sd3_grpo.py.
Command: python -m pec_jax.main --config=configs/sd3_pec.py --workdir=runs/sd3_pec \\
    --config.prompts.embeddings=embeddings/sd3
"""

from ml_collections import ConfigDict

from pec_jax.configs import sd3_grpo


def get_config() -> ConfigDict:
    """Returns the config: sd3_grpo plus the constraint."""
    config = sd3_grpo.get_config()
    config.constraints.pec.weight = 0.05
    config.perception.bandwidth = 0.104
    return config
