"""Stable Diffusion 3.5 Medium on GenEval, with a perceptual entropy constraint for the KL.

Paper: none has such a row; the constraint is that of arXiv 2605.12112.
Prompts: a directory with train_metadata.jsonl and test_metadata.jsonl, such as dataset/geneval of
    Flow-GRPO's repository.
Reward: the rules of GenEval on what a detector finds; give the detector's server with
    --config.rewards.geneval.url, or take the one in process (`pip install 'pec_jax[geneval]'`,
    --config.rewards.geneval.detector=in_process).
Weight: 2.4 standard deviations of the rewards per nat, the balance that .05 has on PickScore, whose
    standard deviation within a group is about .021.
Chips, cost, models: see sd3_grpo.py; embed the prompts as there.
Memory: 14.26 of 17.2 GB per chip on v5e:4x4 (compiled, not run).
Command: python -m pec_jax.main --config=configs/sd3_pec_geneval.py \\
    --workdir=runs/sd3_pec_geneval --config.prompts.embeddings=embeddings/sd3_geneval \\
    --config.rewards.geneval.url=http://localhost:8000
"""

from ml_collections import ConfigDict

from pec_jax.configs import sd3_grpo_geneval


def get_config() -> ConfigDict:
    """Returns the config: sd3_grpo_geneval with PEC in the place of the KL."""
    config = sd3_grpo_geneval.get_config()
    config.constraints.kl.weight = 0.0
    config.constraints.pec.update({"weight": 2.4, "unit": "reward_std"})
    config.perception.bandwidth = 0.104
    return config
