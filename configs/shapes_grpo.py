"""Flow-GRPO without a diversity constraint on the embedded shapes model: the collapse.

Paper: arXiv 2605.12112, Table 1, row "Flow-GRPO", at the scale of a laptop.
Command: python -m pec_jax.main --config=configs/shapes_grpo.py --workdir=runs/shapes_grpo
"""

from ml_collections import ConfigDict

from pec_jax.configs import base


def get_config() -> ConfigDict:
    """Returns the config: base, at the size of the embedded model."""
    config = base.get_config()
    config.num_iterations = 100
    config.trainable.update({"rank": 16, "alpha": 32.0})
    config.sampler.update({"num_steps": 6, "guidance": 1.0, "noise_level": 0.7})
    config.batch.update({"groups": 6, "group_size": 16})
    config.updates.update({"minibatches": 1, "advantage_std": "group"})
    config.optimizer.update({"learning_rate": 2e-3})
    for name in ("hps", "clip", "attributes"):
        config.rewards[name].evaluate = True
    config.perception.update({"encoder": "dino", "estimator": "knn", "k": 3})
    config.eval.update({"num_steps": 10, "guidance": 1.0, "groups": 16})
    return config
