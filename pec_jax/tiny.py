"""Writes a small random pipeline: `python -m pec_jax.tiny --family=flux --out=DIR`.

A genuine Stable Diffusion 3 or FLUX.1 directory with a random transformer, so that every command
can be tried in seconds before the real weights are fetched. Its tokenizers, text encoders,
autoencoder and the encoders of rewards and perception are those of the embedded default.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from absl import app, flags

from pec_jax.errors import exit_with_sentence, quiet_libraries

FAMILIES = ("sd3", "flux")

_FAMILY = flags.DEFINE_enum("family", "sd3", FAMILIES, "Kind of pipeline.")
_OUT = flags.DEFINE_string("out", None, "Directory to write; it must not exist.")
_CONFIG = flags.DEFINE_string(
    "transformer", "{}", 'JSON object of transformer config entries, such as {"num_layers": 3}.'
)
_SEED = flags.DEFINE_integer("seed", 0, "Of the random weights.")

# Family -> the class of the pipeline and of its transformer, and the transformer's default size.
_INDEX = {
    "sd3": ("StableDiffusion3Pipeline", "SD3Transformer2DModel"),
    "flux": ("FluxPipeline", "FluxTransformer2DModel"),
}
_TRANSFORMER: dict[str, dict[str, Any]] = {
    "sd3": {
        "sample_size": 8,
        "patch_size": 2,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 3,
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "joint_attention_dim": 128,
        "caption_projection_dim": 32,
        "pooled_projection_dim": 128,
        "pos_embed_max_size": 16,
        "dual_attention_layers": [0],
        "qk_norm": "rms_norm",
    },
    "flux": {
        "patch_size": 1,
        "in_channels": 16,
        "num_layers": 2,
        "num_single_layers": 2,
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "joint_attention_dim": 128,
        "pooled_projection_dim": 64,
        "guidance_embeds": True,
        "axes_dims_rope": [4, 6, 6],
    },
}
_FLUX_SCHEDULER = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "num_train_timesteps": 1000,
    "shift": 3.0,
    "use_dynamic_shifting": True,
    "base_shift": 0.5,
    "max_shift": 1.15,
    "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
}


def write_pipeline(
    out: str | Path, family: str, transformer: Mapping[str, Any] | None = None, *, seed: int = 0
) -> Path:
    """Writes a small random pipeline.

    Args:
        out: directory to write; it must not exist.
        family: "sd3" or "flux".
        transformer: entries of the transformer's config that differ from the small default.
        seed: of the random weights.

    Returns:
        The directory.

    Raises:
        FileExistsError: `out` exists.
        WeightsError, ValueError: a config that cannot be computed.
    """
    from pec_jax.families.locate import SHAPES_DIRECTORY

    out = Path(out)
    if out.exists():
        raise FileExistsError(f"{out} exists; choose a directory that does not.")
    temporary = out.with_name(f".{out.name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        skip = shutil.ignore_patterns("transformer", "prompts", "README.md")
        shutil.copytree(SHAPES_DIRECTORY, temporary, ignore=skip)
        class_name = _INDEX[family][1]
        if family == "flux":
            _make_flux_parts(temporary)
        config = {"_class_name": class_name} | _TRANSFORMER[family] | dict(transformer or {})
        write_transformer(temporary / "transformer", config, seed)
        temporary.rename(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return out


def write_transformer(
    directory: Path, config: dict[str, Any], seed: int = 0, dtype: Any = "float32"
) -> None:
    """Writes a transformer with random weights: config.json and its safetensors file.

    Args:
        directory: created if absent.
        config: the whole config.json.
        seed: of the weights, which keep the scale of activations.
        dtype: in which they are stored.

    Raises:
        WeightsError: a config that cannot be computed.
    """
    import jax
    import numpy as np

    from pec_jax.families import pipeline
    from pec_jax.io import write_json

    write_json(directory / "config.json", config)
    module = pipeline.load_transformer_config(directory)
    shapes = pipeline.transformer_shapes(module)
    rng = np.random.default_rng(seed)

    def draw(path: Any, leaf: Any) -> np.ndarray:
        noise = rng.standard_normal(leaf.shape, np.float32)
        kind = path[-1].key
        if kind == "kernel":
            noise /= np.sqrt(leaf.shape[-2])
        else:
            noise = 1.0 + 0.1 * noise if kind == "scale" else 0.1 * noise
        return noise.astype(dtype)

    variables = {"params": jax.tree_util.tree_map_with_path(draw, shapes["params"])}
    if "buffers" in shapes:
        variables["buffers"] = pipeline.transformer_buffers(module)
    pipeline.save_component(directory, config, variables)


def _make_flux_parts(root: Path) -> None:
    """One CLIP tower without its projection, T5 as the second encoder, FLUX's schedule."""
    from pec_jax.weights.tensors import read_json, read_tensors, write_json, write_tensors

    for name in ("text_encoder_2", "tokenizer_2"):
        shutil.rmtree(root / name)
        (root / name.replace("2", "3")).rename(root / name)
    tensors = dict(read_tensors(root / "text_encoder", "model"))
    del tensors["text_projection.weight"]
    write_tensors(root / "text_encoder", tensors, "model")
    clip = read_json(root / "text_encoder" / "config.json")
    write_json(root / "text_encoder" / "config.json", clip | {"architectures": ["CLIPTextModel"]})
    write_json(root / "scheduler" / "scheduler_config.json", _FLUX_SCHEDULER)
    index = read_json(root / "model_index.json")
    index |= {
        "_class_name": _INDEX["flux"][0],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "text_encoder_2": index["text_encoder_3"],
        "tokenizer_2": index["tokenizer_3"],
        "transformer": ["diffusers", _INDEX["flux"][1]],
    }
    for name in ("text_encoder_3", "tokenizer_3"):
        del index[name]
    write_json(root / "model_index.json", index)


def main(argv: list[str]) -> None:
    """Parses, writes; a mistake of the user becomes one sentence and exit status 2."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}.")
    if not _OUT.value:
        raise app.UsageError("--out is missing; see --help.")
    try:
        config = json.loads(_CONFIG.value)
    except json.JSONDecodeError as error:
        raise app.UsageError(f"--transformer is not JSON: {error}") from None
    with exit_with_sentence():
        out = write_pipeline(Path(_OUT.value).expanduser(), _FAMILY.value, config, seed=_SEED.value)
        print(f"{out} is written; its images are 32 pixels wide: --height=32 --width=32.")


if __name__ == "__main__":
    quiet_libraries()
    app.run(main)
