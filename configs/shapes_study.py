"""What all runs of the study on the embedded shapes model have in common: Flow-GRPO, plain.

Paper: arXiv 2605.12112, Table 1, at the scale of a laptop. `launch/study.py` turns one on.
Two updates per iteration, as Flow-GRPO has it: at the first one all ratios are 1, so that clipping
and every method built on it act on the second alone.
Clip range: a log-ratio is a mean over the D latent dimensions, so that one and the same change of
the policy per dimension moves it by an amount proportional to 1/sqrt(D). Flow-GRPO's 1e-4 at
512 px (D = 65536) is 8e-4 here (D = 1024).
Unit: weights of `pec`, `pec_target` and `pcvae` are in reward stds per nat.
Window: the first three of the six steps are noisy and trained, as in Flow-GRPO-Fast; they decide
what is drawn and where. An iteration costs 0.73x of one with five trained steps, and Flow-GRPO
collapses in two thirds as many.
Length: 40 iterations of two updates. After them, on a seed that is not reported, Flow-GRPO kept a
sixth of the variance in DINO's space.
Cost: about 80 seconds per run on one core.
Command: python launch/study.py --runs=runs/study --out=docs/results/study
"""

from ml_collections import ConfigDict

from pec_jax.configs import shapes_grpo


def get_config() -> ConfigDict:
    """Returns the config: shapes_grpo with a window, two updates an iteration, and shorter."""
    config = shapes_grpo.get_config()
    config.num_iterations = 40
    config.sampler.window = (0, 3)
    config.updates.minibatches = 2
    config.objective.grpo.update({"clip_low": 8e-4, "clip_high": 8e-4})
    for name in ("pec", "pec_target", "pcvae"):
        config.constraints[name].unit = "reward_std"
    config.eval.update({"num_prompts": 48, "groups": 8})
    config.schedule.update({"sample_every": 0, "checkpoint_every": 0})
    return config
