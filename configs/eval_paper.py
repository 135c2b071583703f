"""The paper's evaluation of FLUX.1-dev: every column of its Table 1, of the base model.

Paper: arXiv 2605.12112, Table 1, row "Flux Dev". Other models and trained runs are measured alike
    by `pec_jax.sample --prompts=F --num_images=32` and `pec_jax.score`; docs/rewards.md has the
    commands, and what each column is.
Open: the paper does not say which prompts, how many images per prompt, which CLIP, which question
    it asks UnifiedReward, and how its diversity is normalised. Prompts here are HPDv2's test set,
    the images 32 per prompt (its Vendi score reaches 30.41, which takes as many), CLIP is DFN5B's
    H/14. Its Vendi score of PickScore is below 1, which no Vendi score can be.
Columns: quality/pickscore (cosine), quality/aesthetic_v2_5, quality/imagereward, quality/clip,
    quality/hpsv2 (v2.1, cosine), quality/unified_reward (1 to 5); diversity/pairwise_l2_dino and
    _clip, diversity/vendi_clip, _dino, _imagereward and _pickscore.
Models: see docs/rewards.md; UnifiedReward must be served at --config.rewards.unified_reward.url, or
    left out with --config.rewards.unified_reward.evaluate=False.
Chips, cost: those of flux_grpo.py; 3200 prompts x 32 images of 28 steps take as many images as 90
    iterations of training. --config.eval.num_prompts=200 takes 200 prompts.
Command: python -m pec_jax.main --config=configs/eval_paper.py --workdir=runs/eval_paper
"""

from ml_collections import ConfigDict

from pec_jax.configs import flux_grpo


def get_config() -> ConfigDict:
    """Returns the config: flux_grpo without training, and with all judges."""
    config = flux_grpo.get_config()
    config.num_iterations = 0
    config.prompts.update({"train": "prompts/hpdv2_test.txt", "heldout": "prompts/hpdv2_test.txt"})
    models = {
        "pickscore": "models/PickScore_v1",
        "clip": "models/DFN5B-CLIP-ViT-H-14-378",
        "hpsv2": "models/HPS_v2.1_compressed.pt",
        "imagereward": "models/ImageReward.pt",
        "aesthetic_v2_5": "models/siglip-so400m-patch14-384",
    }
    for name, model in models.items():
        config.rewards[name].update({"model": model, "evaluate": True})
    config.rewards.pickscore.scale = "cosine"
    config.rewards.imagereward.tokenizer = "models/bert-base-uncased"
    config.rewards.aesthetic_v2_5.head = "models/aesthetic_predictor_v2_5.pth"
    config.rewards.unified_reward.update(
        {"evaluate": True, "judge": "score", "url": "http://localhost:8080"}
    )
    for name in ("clip", "imagereward"):
        config.encoders[name].update({"model": models[name], "evaluate": True})
    config.eval.update({"num_prompts": 0, "images_per_prompt": 32, "groups": 4})
    config.eval.update({"sample_rows": 4, "sample_columns": 8, "entropy_probes": 0})
    return config
