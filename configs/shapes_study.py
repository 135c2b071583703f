"""What all runs of the study on the embedded shapes model have in common: Flow-GRPO, plain.

Paper: arXiv 2605.12112, Table 1, at the scale of a laptop. `launch/study.py` sets the constraint.
Two updates an iteration, as Flow-GRPO has it: at the first one all ratios are 1, so that clipping
and every method built on it act on the second alone.
Clip range: a log-ratio is a mean over the D latent dimensions, so that one and the same change of
the policy per dimension moves it by an amount proportional to 1/sqrt(D). Flow-GRPO's 1e-4 at
512 px (D = 65536) is 1.6e-3 here (D = 256).
Weights of rewards are in reward stds per nat.
Length: after 120 iterations Flow-GRPO has not only collapsed; its other rewards fall again.
Cost: about 2 minutes a run on one core.
Command: python launch/study.py --runs=runs/study --out=docs/results/study
"""

from ml_collections import ConfigDict

from configs import shapes_grpo


def get_config() -> ConfigDict:
    """Returns the config: shapes_grpo with two updates an iteration, and shorter."""
    config = shapes_grpo.get_config()
    config.num_iterations = 120
    config.grpo.update({"minibatches": 2, "clip_low": 1.6e-3, "clip_high": 1.6e-3})
    config.constraint.unit = "reward_std"
    config.eval.update({"num_prompts": 48})
    config.schedule.update({"sample_every": 0, "checkpoint_every": 60})
    return config
