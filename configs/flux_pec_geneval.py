"""FLUX.1-dev on GenEval, with a perceptual entropy constraint.

Paper: none has such a row; the constraint is that of arXiv 2605.12112.
Prompts: a directory with train_metadata.jsonl and test_metadata.jsonl, such as dataset/geneval of
    Flow-GRPO's repository.
Reward: the rules of GenEval on what a detector finds; give the detector's server with
    --config.rewards.geneval.url, or take the one in process (`pip install 'pec_jax[geneval]'`,
    --config.rewards.geneval.detector=in_process).
Weight: 2.4 standard deviations of the rewards per nat, the balance that .05 has on PickScore, whose
    standard deviation within a group is about .021.
Memory: 12.08 of 102.8 GB per chip on v5p:2x2x4 (compiled, not run).
Chips, cost, models: see flux_grpo.py; embed the prompts as there.
Command: python -m pec_jax.main --config=configs/flux_pec_geneval.py \\
    --workdir=runs/flux_pec_geneval --config.prompts.embeddings=embeddings/flux_geneval \\
    --config.rewards.geneval.url=http://localhost:8000
"""

from ml_collections import ConfigDict

from pec_jax.configs import flux_pec


def get_config() -> ConfigDict:
    """Returns the config: flux_pec with another reward and its prompts."""
    config = flux_pec.get_config()
    config.prompts.update({"train": "prompts/geneval", "heldout": "prompts/geneval"})
    config.rewards.pickscore.update({"weight": 0.0, "evaluate": True})
    config.rewards.geneval.update({"weight": 1.0, "score": "flow_grpo"})
    config.constraints.pec.update({"weight": 2.4, "unit": "reward_std"})
    return config
