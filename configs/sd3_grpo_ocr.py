"""Flow-GRPO of Stable Diffusion 3.5 Medium on reading rendered text: `general_ocr_sd3` of its code.

Paper: Flow-GRPO (arXiv 2505.05470), Table 1: OCR accuracy .59 -> .92.
Prompts: a directory with train.txt and test.txt, such as dataset/ocr of Flow-GRPO's repository;
    each prompt names its text in quotes.
Reward: RapidOCR in worker processes on the host (`pip install 'pec_jax[ocr]'`; docs/ocr.md has
    its speed: about 160 core-seconds for the 1152 images of an iteration).
Memory: 14.26 of 17.2 GB per chip on v5e:4x4 (compiled, not run).
Chips, cost, models: see sd3_grpo.py; embed the prompts as there.
Command: python -m pec_jax.main --config=configs/sd3_grpo_ocr.py --workdir=runs/sd3_grpo_ocr \\
    --config.prompts.embeddings=embeddings/sd3_ocr
"""

from ml_collections import ConfigDict

from pec_jax.configs import sd3_grpo


def get_config() -> ConfigDict:
    """Returns the config: sd3_grpo with another reward, its prompts and its weight of the KL."""
    config = sd3_grpo.get_config()
    config.prompts.update({"train": "prompts/ocr", "heldout": "prompts/ocr"})
    config.rewards.pickscore.update({"weight": 0.0, "evaluate": True})
    config.rewards.ocr.weight = 1.0
    config.constraints.kl.weight = 0.04
    return config
