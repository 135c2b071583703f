"""What all runs of the study on the embedded shapes model have in common: Flow-GRPO, plain.

Paper: arXiv 2605.12112, Table 1, at the scale of a laptop. `launch/study.py` turns one on.
Unit: weights of `pec`, `pec_target` and `pcvae` are in reward stds per nat.
Length: 80 iterations of two updates. After them, on a seed that is not reported, Flow-GRPO kept a
third of the variance in DINO's space, and its finish had passed a peak.
Memory: 0.20 of 17.2 GB per chip on v5e:1x1 (compiled, not run).
Cost: about 260 seconds per run on one core.
Command: python launch/study.py --runs=runs/study --out=docs/results/study
"""

from ml_collections import ConfigDict

from pec_jax.configs import shapes_grpo


def get_config() -> ConfigDict:
    """Returns the config: shapes_grpo, longer, that keeps nothing but its numbers."""
    config = shapes_grpo.get_config()
    config.num_iterations = 80
    for name in ("pec", "pec_target", "pcvae"):
        config.constraints[name].unit = "reward_std"
    config.schedule.update({"sample_every": 0, "checkpoint_every": 0})
    return config
