"""FLUX.1-dev on reading rendered text, with a perceptual entropy constraint.

Paper: none has such a row; the constraint is that of arXiv 2605.12112.
Prompts: a directory with train.txt and test.txt, such as dataset/ocr of Flow-GRPO's repository;
    each prompt names its text in quotes.
Reward: RapidOCR in worker processes on the host (`pip install 'pec_jax[ocr]'`; docs/ocr.md has
    its speed: about 160 core-seconds for the 1152 images of an iteration).
Weight: 2.4 standard deviations of the rewards per nat, the balance that .05 has on PickScore, whose
    standard deviation within a group is about .021.
Memory: 12.08 of 102.8 GB per chip on v5p:2x2x4 (compiled, not run).
Chips, cost, models: see flux_grpo.py; embed the prompts as there.
Command: python -m pec_jax.main --config=configs/flux_pec_ocr.py --workdir=runs/flux_pec_ocr \\
    --config.prompts.embeddings=embeddings/flux_ocr
"""

from ml_collections import ConfigDict

from pec_jax.configs import flux_pec


def get_config() -> ConfigDict:
    """Returns the config: flux_pec with another reward and its prompts."""
    config = flux_pec.get_config()
    config.prompts.update({"train": "prompts/ocr", "heldout": "prompts/ocr"})
    config.rewards.pickscore.update({"weight": 0.0, "evaluate": True})
    config.rewards.ocr.weight = 1.0
    config.constraints.pec.update({"weight": 2.4, "unit": "reward_std"})
    return config
