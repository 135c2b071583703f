"""Flow-GRPO of Stable Diffusion 3.5 Medium on GenEval: `geneval_sd3` of its code.

Paper: Flow-GRPO (arXiv 2505.05470), Table 1: GenEval .63 -> .95.
Prompts: a directory with train_metadata.jsonl and test_metadata.jsonl, such as dataset/geneval of
    Flow-GRPO's repository.
Reward: the rules of GenEval on what a detector finds; give the detector's server with
    --config.rewards.geneval.url, or take the one in process (`pip install 'pec_jax[geneval]'`,
    --config.rewards.geneval.detector=in_process).
Memory: 14.26 of 17.2 GB per chip on v5e:4x4 (compiled, not run).
Chips, cost, models: see sd3_grpo.py; embed the prompts as there.
Command: python -m pec_jax.main --config=configs/sd3_grpo_geneval.py \\
    --workdir=runs/sd3_grpo_geneval --config.prompts.embeddings=embeddings/sd3_geneval \\
    --config.rewards.geneval.url=http://localhost:8000
"""

from ml_collections import ConfigDict

from pec_jax.configs import sd3_grpo


def get_config() -> ConfigDict:
    """Returns the config: sd3_grpo with another reward, its prompts and its weight of the KL."""
    config = sd3_grpo.get_config()
    config.prompts.update({"train": "prompts/geneval", "heldout": "prompts/geneval"})
    config.rewards.pickscore.update({"weight": 0.0, "evaluate": True})
    config.rewards.geneval.update({"weight": 1.0, "score": "flow_grpo"})
    config.constraints.kl.weight = 0.04
    return config
