"""Flow-GRPO of Stable Diffusion 3.5 Medium on PickScore: the baseline that collapses.

Paper: arXiv 2605.12112, Table 1, row "Flow-GRPO" (there of FLUX.1-dev).
Recipe: Flow-GRPO's own (arXiv 2505.05470; `pickscore_sd3` of its code): 512 px, 10 steps, guidance
    4.5 in rollout and loss, noise at all steps and nine of them trained, 48 prompts x 24 images per
    iteration, 2 updates, LoRA of rank 32 on `attn` (18,776,064 parameters), KL of weight .01,
    samples of advantage 0 dropped, PickScore in float32. docs/flow_grpo.md lists what differs.
Expected: PickScore rises by 0.015 to 0.02; the variance within a prompt falls several times.
Chips: 16 of TPU v5e or more.
Cost: 207 TFLOP per image, so 0.24 EFLOP per iteration: about 3 minutes on 16 v5e at 40% of their
    peak, computed and not measured.
Memory: 14.26 of 17.2 GB per chip on v5e:4x4 (compiled, not run).

Models, once (accept the licence on the model's page first):
    hf download stabilityai/stable-diffusion-3.5-medium --local-dir models/sd3.5-medium
    hf download yuvalkirstain/PickScore_v1 --local-dir models/PickScore_v1
    hf download facebook/dino-vitb16 --local-dir models/dino-vitb16
Prompts: prompts/train.txt and prompts/heldout.txt, one per line, such as Pick-a-Pic's. Embed them
once, so that T5-XXL need not live beside the policy:
    python -m pec_jax.embed --model=models/sd3.5-medium --dtype=bfloat16 --t5_length=128 \\
        --prompts=prompts/train.txt --prompts=prompts/heldout.txt --out=embeddings/sd3
Command: python -m pec_jax.main --config=configs/sd3_grpo.py --workdir=runs/sd3_grpo \\
    --config.prompts.embeddings=embeddings/sd3
"""

from ml_collections import ConfigDict

from pec_jax.configs import base


def get_config() -> ConfigDict:
    """Returns the config: base, with real models, prompts, precision and memory."""
    config = base.get_config()
    config.num_iterations = 800
    config.model.update(
        {
            "path": "models/sd3.5-medium",
            "dtype": "bfloat16",
            "param_dtype": "bfloat16",
            "t5_length": 128,
            "height": 512,
            "width": 512,
            "remat": "full",
        }
    )
    # Weight 1 from base; the others are one flag away, e.g. --config.rewards.clip.weight=0.5.
    config.rewards.pickscore.model = config.encoders.pickscore.model = "models/PickScore_v1"
    config.encoders.dino.model = "models/dino-vitb16"
    config.rewards.clip.model = config.encoders.clip.model = "models/clip-vit-large-patch14"
    config.encoders.clip.evaluate = False
    config.prompts.update({"train": "prompts/train.txt", "heldout": "prompts/heldout.txt"})
    # Not `attn2`, the second attention of some layers, which `base` adapts as well.
    config.trainable.targets = (r"\.attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)$",)
    config.sampler.update({"noise": "all", "storage_dtype": "bfloat16"})
    config.constraints.kl.update({"weight": 0.01, "form": "flow_grpo"})
    config.updates.drop_zero_advantages = True
    # Its average moves with each of the two micro-batches of an update, see rl/average.py.
    config.optimizer.update({"ema_every": 8, "ema_repeats": 2, "ema_warmup": True})
    config.batch.update({"groups": 48, "group_size": 24})
    # One image of each of a chip's three groups, twice for guidance: of larger pieces the TPU's
    # compiler fuses the MLP badly. Where weights are gathered (fsdp > 1), larger ones gather less.
    config.batch.update({"rollout_images": 1, "decode_images": 1, "update_images": 1})
    # Every chip holds the frozen weights whole, so that no layer waits for its own: with all else
    # 14.3 GB of a v5e's 17.2, as compiled by pec_jax.aot. With trainable.mode=full take fsdp=16.
    config.mesh.update({"data": -1, "fsdp": 1})
    config.eval.update({"num_prompts": 256, "images_per_prompt": 8, "groups": 16})
    config.eval.update({"sample_columns": 8})
    config.schedule.update({"sample_every": 20, "eval_every": 100, "checkpoint_every": 20})
    return config
