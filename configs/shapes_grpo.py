"""Flow-GRPO without a diversity constraint on the embedded shapes model: the collapse.

Two updates an iteration, as Flow-GRPO has it. Of the six steps the first three are noisy and
trained, as in Flow-GRPO-Fast: they decide what is drawn and where, and an iteration costs 0.7 times
as much. A log-ratio is a mean over the D latent dimensions, so that one and the same change of the
policy per dimension moves it by an amount proportional to 1/sqrt(D): Flow-GRPO's clip range of 1e-4
at 512 px (D = 65536) is 8e-4 here (D = 1024).
Paper: arXiv 2605.12112, Table 1, row "Flow-GRPO", at the scale of a laptop.
Memory: 0.20 of 17.2 GB per chip on v5e:1x1 (compiled, not run).
Command: python -m pec_jax.main --config=configs/shapes_grpo.py --workdir=runs/shapes_grpo
"""

from ml_collections import ConfigDict

from pec_jax.configs import base


def get_config() -> ConfigDict:
    """Returns the config: base, at the size of the embedded model."""
    config = base.get_config()
    config.num_iterations = 60
    config.trainable.update({"rank": 16, "alpha": 32.0})
    config.sampler.update({"num_steps": 6, "window": (0, 3), "guidance": 1.0, "noise_level": 0.7})
    config.batch.update({"groups": 6, "group_size": 16})
    config.updates.update({"minibatches": 2, "advantage_std": "group"})
    config.objective.grpo.update({"clip_low": 8e-4, "clip_high": 8e-4})
    config.optimizer.update({"learning_rate": 3e-3})
    for name in ("hps", "clip", "attributes"):
        config.rewards[name].evaluate = True
    config.perception.update({"encoder": "dino", "estimator": "knn", "k": 3})
    config.eval.update({"num_steps": 10, "guidance": 1.0, "num_prompts": 48, "groups": 8})
    return config
