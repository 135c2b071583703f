"""Flow-GRPO of FLUX.1-dev on PickScore: the baseline that collapses.

Paper: arXiv 2605.12112, Table 1, row "Flow-GRPO": PickScore .226 -> .243, diversity (normalised)
    .753 -> .047, overall .366.
Recipe: Flow-GRPO's own (arXiv 2505.05470; `pickscore_flux` of its code): 512 px, 6 steps, noise of
    level 0.9 at all of them and five trained, the guidance scale 3.5 as an input, T5 of 128 tokens,
    LoRA of rank 64, bf16, no KL. docs/flow_grpo.md lists what differs.
Chips: 16 of TPU v5p, or as many of v6e as hold 24 GB of weights between them.
Cost: about 6 times an image of sd3_grpo.py.
Memory: 12.08 of 102.8 GB per chip on v5p:2x2x4 (compiled, not run).

Models, once (accept the licence on the model's page first):
    hf download black-forest-labs/FLUX.1-dev --local-dir models/flux.1-dev
    hf download yuvalkirstain/PickScore_v1 --local-dir models/PickScore_v1
    hf download facebook/dino-vitb16 --local-dir models/dino-vitb16
Embeddings: as in sd3_grpo.py, with --model=models/flux.1-dev, --t5_length=128, embeddings/flux.
Command: python -m pec_jax.main --config=configs/flux_grpo.py --workdir=runs/flux_grpo \\
    --config.prompts.embeddings=embeddings/flux
"""

from ml_collections import ConfigDict

from pec_jax.configs import sd3_grpo


def get_config() -> ConfigDict:
    """Returns the config: sd3_grpo with FLUX.1-dev, its sampler and its LoRA."""
    config = sd3_grpo.get_config()
    config.model.update({"path": "models/flux.1-dev", "t5_length": 128})
    config.sampler.update({"num_steps": 6, "guidance": 3.5, "noise_level": 0.9})
    config.eval.update({"num_steps": 28, "guidance": 3.5})
    config.constraints.kl.weight = 0.0
    config.updates.drop_zero_advantages = False
    config.optimizer.ema_repeats = 6
    config.trainable.update(
        {
            "rank": 64,
            "alpha": 128.0,
            "targets": (
                r"\.attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)$",
                r"\.ff(_context)?\.net\.(0\.proj|2)$",
            ),
        }
    )
    config.mesh.update({"data": -1, "fsdp": 4})  # 6 GB of weights per chip
    config.batch.rollout_images = 4  # each piece gathers them anew
    return config
