"""Stable Diffusion 3.5 Medium on rendered text, with a perceptual entropy constraint for the KL.

Paper: none has such a row; the constraint is that of arXiv 2605.12112.
Prompts: a directory with train.txt and test.txt, such as dataset/ocr of Flow-GRPO's repository;
    each prompt names its text in quotes.
Reward: RapidOCR in worker processes on the host (`pip install 'pec_jax[ocr]'`; docs/ocr.md has
    its speed: about 160 core-seconds for the 1152 images of an iteration).
Weight: 2.4 standard deviations of the rewards per nat, the balance that .05 has on PickScore, whose
    standard deviation within a group is about .021.
Chips, cost, models: see sd3_grpo.py; embed the prompts as there.
Memory: 14.26 of 17.2 GB per chip on v5e:4x4 (compiled, not run).
Command: python -m pec_jax.main --config=configs/sd3_pec_ocr.py --workdir=runs/sd3_pec_ocr \\
    --config.prompts.embeddings=embeddings/sd3_ocr
"""

from ml_collections import ConfigDict

from pec_jax.configs import sd3_grpo_ocr


def get_config() -> ConfigDict:
    """Returns the config: sd3_grpo_ocr with PEC in the place of the KL."""
    config = sd3_grpo_ocr.get_config()
    config.constraints.kl.weight = 0.0
    config.constraints.pec.update({"weight": 2.4, "unit": "reward_std"})
    config.perception.bandwidth = 0.104
    return config
