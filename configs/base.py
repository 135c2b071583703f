"""Every field with its default; the other configs are small deltas to this one.

The values are Flow-GRPO's for Stable Diffusion 3 (arXiv 2505.05470) where it has them, and
PEC's (arXiv 2605.12112) for the perceptual entropy. Paths and sizes are the embedded model's.

Command: not meant to be run by itself; see shapes_pec.py.
"""

from ml_collections import ConfigDict

from pec_jax.config.registry import CONSTRAINTS, ENCODERS, OBJECTIVES, REWARDS


def get_config() -> ConfigDict:
    """Returns the defaults, locked: a misspelt override is an error."""
    config = ConfigDict()
    config.seed = 0  # governs everything random
    config.num_iterations = 100
    _model_and_data(config)
    _method(config)
    _optimizer_and_run(config)
    config.lock()
    return config


def _model_and_data(config: ConfigDict) -> None:
    """What is fine-tuned, how it draws, and on which prompts."""
    config.model = ConfigDict(
        {
            "path": "shapes",
            "variant": "",
            "dtype": "float32",
            "param_dtype": "float32",
            "vae_dtype": "float32",
            "encoder_dtype": "float32",
            "encoder_resize": "pil",
            "t5_length": 0,
            "height": 0,
            "width": 0,
            "remat": "none",
            "transformer": "",
        }
    )
    config.trainable = ConfigDict(
        {
            "mode": "lora",
            "rank": 32,
            "alpha": 64.0,
            "targets": (r"\.attn2?\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)$",),
            "init": "",
        }
    )
    config.sampler = ConfigDict(
        {
            "num_steps": 10,
            "kernel": "flow_sde",
            "noise_level": 0.7,
            "guidance": 4.5,
            "window": (),
            "train_fraction": 0.99,  # Flow-GRPO never trains the last step
            "window_moves": "never",
            "window_iterations": 1,
            "noise": "trained",
            "log_density": "gaussian",
            "storage_dtype": "float32",
        }
    )
    config.prompts = ConfigDict(
        {
            "train": "shapes/train_open",
            "heldout": "shapes/heldout_open",
            "embeddings": "",
            "samples": (),
        }
    )
    config.batch = ConfigDict(
        {
            "groups": 48,
            "group_size": 24,
            "rollout_images": 0,
            "decode_images": 0,
            "update_images": 0,
        }
    )


def _method(config: ConfigDict) -> None:
    """What is rewarded, perceived and constrained, and what the loss is.

    Each reward, encoder, objective and constraint brings its own section, with its defaults: see
    `python -m pec_jax.main --config=base --help`, or the file that defines it.
    """
    # Everything that can be named is there, and off: --config.rewards.clip.weight=0.5 is enough.
    config.rewards = ConfigDict(REWARDS.default_sections())
    config.rewards.pickscore.weight = 1.0
    config.encoders = ConfigDict(ENCODERS.default_sections())
    for name in ("pickscore", "dino", "clip"):
        config.encoders[name].evaluate = True
    config.perception = ConfigDict(
        {
            "encoder": "pickscore",
            "estimator": "gaussian",  # the paper's
            "scale": "unit_sqrt_d",
            "bandwidth": 0.0,  # the policy's own noise scale
            "eps": 1e-4,
            "k": 3,
            "at": "final",
        }
    )
    config.objective = ConfigDict({"name": "grpo", **OBJECTIVES.default_sections()})
    config.constraints = ConfigDict(CONSTRAINTS.default_sections())
    config.updates = ConfigDict(
        {
            "minibatches": 2,
            "epochs": 1,
            "advantage_std": "global",
            "advantage_clip": 5.0,
            "drop_zero_advantages": False,
        }
    )


def _optimizer_and_run(config: ConfigDict) -> None:
    """How parameters move, and what the host does besides."""
    config.optimizer = ConfigDict(
        {
            "learning_rate": 3e-4,
            "warmup_steps": 0,
            "weight_decay": 1e-4,
            "b1": 0.9,
            "b2": 0.999,
            "eps": 1e-8,
            "grad_clip": 1.0,
            "ema_decay": 0.9,
            "ema_every": 1,
            "ema_repeats": 1,
            "ema_warmup": False,
            "max_skipped": 5,
        }
    )
    config.eval = ConfigDict(
        {
            "num_prompts": 0,
            "images_per_prompt": 16,
            "groups": 8,
            "num_steps": 40,
            "guidance": 4.5,
            "use_ema": True,
            "entropy_probes": 1,
            "sample_rows": 4,
            "sample_columns": 12,
        }
    )
    config.schedule = ConfigDict(
        {
            "log_every": 1,
            "sample_every": 25,
            "eval_every": 0,
            "checkpoint_every": 25,
            "keep_checkpoints": 2,
        }
    )
    config.mesh = ConfigDict(
        {
            "data": -1,
            "fsdp": 1,
            "tensor": 1,
            "rules": {
                "batch": ("data", "fsdp"),
                "embed": ("fsdp",),
                "rank": ("fsdp",),  # of a LoRA, where the other axis is not split
                "conv_out": ("fsdp",),
                "mlp": ("tensor",),
                "heads": ("tensor",),
                "vocab": ("tensor",),
            },
        }
    )
