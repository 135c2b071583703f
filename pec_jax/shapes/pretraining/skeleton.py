"""The empty pipeline: every config.json of the shapes directory, and its tokenizers.

The directory is a Stable Diffusion 3 pipeline as diffusers lays it out, with three encoders in
Hugging Face layout beside it. Everything about sizes stands here, and nowhere else.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pec_jax.shapes import scenes as shapes
from pec_jax.shapes.pretraining import tokenizers
from pec_jax.shapes.pretraining.loop import Session

JOINT_DIM = 128  # width of the text tokens: both CLIP towers side by side, or the T5
PROJECTION_DIM = 64  # of each CLIP tower; the pooled text embedding has twice as many

CLIP_TEXT = {
    "hidden_size": 64,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": tokenizers.MAX_LENGTH,
    "projection_dim": PROJECTION_DIM,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
    "attention_dropout": 0.0,
    "initializer_factor": 1.0,
    "initializer_range": 0.02,
    "model_type": "clip_text_model",
}
CLIP_VISION = {
    "hidden_size": 64,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_channels": 3,
    "image_size": shapes.IMAGE_SIZE,
    "patch_size": 8,
    "projection_dim": PROJECTION_DIM,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
    "attention_dropout": 0.0,
    "initializer_factor": 1.0,
    "initializer_range": 0.02,
    "model_type": "clip_vision_model",
}
# The preference model that only evaluates is another network: coarser patches, wider layers.
HPS_VISION = CLIP_VISION | {
    "hidden_size": 96,
    "intermediate_size": 384,
    "num_hidden_layers": 3,
    "patch_size": 16,
}
T5 = {
    "architectures": ["T5EncoderModel"],
    "model_type": "t5",
    "d_model": JOINT_DIM,
    "d_ff": 256,
    "d_kv": 32,
    "num_heads": 4,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "feed_forward_proj": "gated-gelu",
    "dense_act_fn": "gelu_new",
    "is_gated_act": True,
    "dropout_rate": 0.0,
    "layer_norm_epsilon": 1e-6,
    "initializer_factor": 1.0,
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "decoder_start_token_id": 0,
    "is_encoder_decoder": True,
    "use_cache": False,
    "tie_word_embeddings": False,
    "dtype": "float32",
}
VAE = {
    "_class_name": "AutoencoderKL",
    "act_fn": "silu",
    "block_out_channels": [16, 16, 48],
    "down_block_types": ["DownEncoderBlock2D"] * 3,
    "up_block_types": ["UpDecoderBlock2D"] * 3,
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 4,
    "layers_per_block": 1,
    "norm_num_groups": 2,
    "mid_block_add_attention": True,
    "sample_size": shapes.IMAGE_SIZE,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
    "force_upcast": False,
    "scaling_factor": 1.0,
    "shift_factor": 0.0,
    "latents_mean": None,
    "latents_std": None,
}
TRANSFORMER = {
    "_class_name": "SD3Transformer2DModel",
    "sample_size": shapes.IMAGE_SIZE // 4,
    "patch_size": 4,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 5,
    "num_attention_heads": 4,
    "attention_head_dim": 32,
    "joint_attention_dim": JOINT_DIM,
    "caption_projection_dim": 128,
    "pooled_projection_dim": 2 * PROJECTION_DIM,
    "pos_embed_max_size": 8,
    "dual_attention_layers": [0, 1],
    "qk_norm": "rms_norm",
}
SCHEDULER = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "num_train_timesteps": 1000,
    "shift": 3.0,
    "use_dynamic_shifting": False,
}
VIT: dict[str, Any] = {
    "architectures": ["ViTModel"],
    "model_type": "vit",
    "hidden_size": 64,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_channels": 3,
    "image_size": shapes.IMAGE_SIZE,
    "patch_size": 8,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-6,
    "qkv_bias": True,
    "attention_probs_dropout_prob": 0.0,
    "hidden_dropout_prob": 0.0,
    "initializer_range": 0.02,
    "dtype": "float32",
}
PIPELINE = {
    "_class_name": "StableDiffusion3Pipeline",
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "CLIPTextModelWithProjection"],
    "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
    "text_encoder_3": ["transformers", "T5EncoderModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "tokenizer_2": ["transformers", "CLIPTokenizer"],
    "tokenizer_3": ["transformers", "T5TokenizerFast"],
    "transformer": ["diffusers", "SD3Transformer2DModel"],
    "vae": ["diffusers", "AutoencoderKL"],
    "feature_extractor": [None, None],
    "image_encoder": [None, None],
}


VISIONS = {  # of each contrastive encoder
    "clip": CLIP_VISION,
    "pickscore": CLIP_VISION,
    "pickscore_taste": CLIP_VISION,
    "hps": HPS_VISION,
}


def preprocessor(kind: str) -> dict[str, Any]:
    """An image processor's config: resize, rescale to [-1, 1]."""
    size: Any = {"shortest_edge": shapes.IMAGE_SIZE}
    if kind == "ViTImageProcessor":
        size = {"height": shapes.IMAGE_SIZE, "width": shapes.IMAGE_SIZE}
    crop = {"height": shapes.IMAGE_SIZE, "width": shapes.IMAGE_SIZE}
    config = {
        "image_processor_type": kind,
        "do_resize": True,
        "size": size,
        "resample": 3,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
    }
    if kind == "CLIPImageProcessor":
        config |= {"do_center_crop": True, "crop_size": crop, "do_convert_rgb": True}
    return config


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def write_lines(path: Path, lines: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def text_config(vocabulary: int, pad: int, activation: str) -> dict[str, Any]:
    """A CLIP text tower's config for a vocabulary that ends with the begin and end tokens."""
    return CLIP_TEXT | {
        "vocab_size": vocabulary,
        "bos_token_id": vocabulary - 2,
        "eos_token_id": vocabulary - 1,
        "pad_token_id": pad,
        "hidden_act": activation,
    }


def build(out: Path) -> dict[str, Any]:
    """Writes the directory without weights: configs, tokenizers, scheduler, preprocessors, prompts.

    Args:
        out: the pipeline's directory; what is there already is written anew.

    Returns:
        Vocabulary sizes, for the report.
    """
    captions = shapes.all_captions()
    tokenizers.write_clip_tokenizer(out / "tokenizer", captions, tokenizers.END)
    tokenizers.write_clip_tokenizer(out / "tokenizer_2", captions, "!")
    tokenizers.write_t5_tokenizer(out / "tokenizer_3", captions)
    vocabulary = len(read_json(out / "tokenizer" / "vocab.json"))
    towers = {
        "text_encoder": text_config(vocabulary, vocabulary - 1, "quick_gelu"),
        "text_encoder_2": text_config(vocabulary, 0, "gelu"),
    }
    for name, config in towers.items():
        head = {"architectures": ["CLIPTextModelWithProjection"], "dtype": "float32"}
        write_json(out / name / "config.json", config | head)
    t5_vocabulary = len(tokenizers.unigram_pieces(captions)) + 4  # <pad> </s> <unk> <extra_id_0>
    write_json(out / "text_encoder_3" / "config.json", T5 | {"vocab_size": t5_vocabulary})
    write_json(out / "vae" / "config.json", VAE)
    write_json(out / "transformer" / "config.json", TRANSFORMER)
    write_json(out / "scheduler" / "scheduler_config.json", SCHEDULER)
    write_json(out / "model_index.json", PIPELINE)
    for name, prompts in shapes.prompt_splits().items():
        write_lines(out / "prompts" / f"{name}.txt", prompts)
    _build_encoders(out, captions, towers["text_encoder"])
    return {"clip_vocabulary": vocabulary, "t5_vocabulary": t5_vocabulary}


def _build_encoders(out: Path, captions: list[str], text: dict[str, Any]) -> None:
    clip = {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": PROJECTION_DIM,
        "logit_scale_init_value": 2.6592,
        "initializer_factor": 1.0,
        "dtype": "float32",
        "text_config": text,
    }
    for name, vision in VISIONS.items():
        directory = out / "encoders" / name
        write_json(directory / "config.json", clip | {"vision_config": vision})
        config = preprocessor("CLIPImageProcessor") | {"processor_class": "CLIPProcessor"}
        write_json(directory / "preprocessor_config.json", config)
        tokenizers.write_clip_tokenizer(directory, captions, tokenizers.END)
    directory = out / "encoders" / "dino"
    write_json(directory / "config.json", VIT)
    write_json(
        directory / "preprocessor_config.json",
        preprocessor("ViTImageProcessor"),
    )


def run(session: Session) -> dict[str, Any]:
    """Stage `skeleton`: everything that is not trained by gradients."""
    return build(session.out)
