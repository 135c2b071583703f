"""Writing what a run has learned in the formats that diffusers loads."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from etils import epath

from pec_jax.config import unknown
from pec_jax.config.schema import TrainableConfig
from pec_jax.errors import RunError
from pec_jax.families.locate import pipeline_directory, transformer_path
from pec_jax.families.networks import STEM
from pec_jax.families.pipeline import load_pipeline
from pec_jax.inference import model_card
from pec_jax.io import read_json, write_bytes, write_json, write_text
from pec_jax.models import lora
from pec_jax.training.learned import learned_params, run_config
from pec_jax.types import PyTree
from pec_jax.weights import lora_files
from pec_jax.weights.convert import to_torch
from pec_jax.weights.tensors import read_metadata, write_tensors

_CARD = (model_card.CARD, *model_card.GRIDS)
# Kind -> the files of an export, that with the weights first.
FILES = {
    "lora": (f"{lora_files.STEM}.safetensors", *_CARD),
    "transformer": (f"{STEM}.safetensors", "config.json", *_CARD),
}
MARK = {"written_by": "pec_jax.export"}  # in the weights' header: this may be replaced


def run(
    workdir: epath.Path, kind: str, out: epath.Path, *, use_ema: bool = True, dtype: str = "float32"
) -> None:
    """Exports the newest checkpoint of a run.

    Args:
      workdir: the run directory.
      kind: `lora` writes pytorch_lora_weights.safetensors, for `pipe.load_lora_weights(out)`;
        `transformer` writes config.json and diffusion_pytorch_model.safetensors, for
        `from_pretrained(out)` of the transformer's class, with a LoRA merged into the weights. Both
        come with a card for the hub, README.md, and the run's sample grids.
      out: an empty or new directory, or one that holds an earlier export of this kind.
      use_ema: the averaged parameters instead of the last ones.
      dtype: of the tensors written, float32 or bfloat16.

    Raises:
      ValueError, RunError, OSError: sentences for a person.
    """
    if kind not in FILES:
        raise ValueError(unknown("kind", kind, FILES))
    config = run_config(workdir)
    if kind == "lora" and config.trainable.mode != "lora":
        raise RunError(
            f"{workdir} trained the whole transformer (config.trainable.mode is "
            f"{config.trainable.mode}), so there is no LoRA: use --kind=transformer."
        )
    prepare(out, kind)
    model = config.model
    root = pipeline_directory(model.path, model.variant, model.transformer)
    transformer = transformer_path(model.transformer)
    pipeline = load_pipeline(root, text=False, variant=model.variant, transformer=transformer)
    learned = learned_params(workdir, config, pipeline, use_ema=use_ema)
    classes = type(pipeline).class_name, type(pipeline).transformer_network.class_name
    card = model_card.model_card(workdir, config, kind, classes)
    if kind == "lora":
        lora_files.write_lora(out, cast(learned, dtype), config.trainable.alpha, MARK)
        _describe(workdir, out, card)
        logging.info("Load it in diffusers with pipe.load_lora_weights(%r).", str(out))
        return
    variables = merged(config.trainable, learned, pipeline.transformer_variables)
    own = transformer if transformer and transformer.is_dir() else root / "transformer"
    architecture = read_json(own / "config.json")
    # The config goes first and comes last, so that a directory that has one is whole.
    (out / "config.json").unlink(missing_ok=True)
    write_tensors(out, to_torch(cast(variables, dtype)), STEM, MARK)
    _describe(workdir, out, card)
    write_json(out / "config.json", architecture)
    name = architecture.get("_class_name")
    logging.info("Load it in diffusers with %s.from_pretrained(%r).", name, str(out))


def prepare(out: epath.Path, kind: str) -> None:
    """Makes the output directory, or checks that what it holds may be replaced.

    Raises:
      RunError: it holds anything but an earlier export of this kind.
      OSError: it cannot be made.
    """
    out.mkdir(parents=True, exist_ok=True)
    found = {path.name for path in out.iterdir()}
    weights = out / FILES[kind][0]
    ours = found <= set(FILES[kind]) and weights.is_file()
    if found and not (ours and MARK.items() <= read_metadata(weights).items()):
        raise RunError(
            f"{out} is not empty, and only an earlier export of kind {kind} "
            f"({', '.join(FILES[kind])}) is replaced: choose another --out."
        )


def _describe(workdir: epath.Path, out: epath.Path, card: str) -> None:
    """Writes the card and the pictures that it shows."""
    for name, grid in model_card.grids(workdir).items():
        write_bytes(out / name, grid.read_bytes())
    write_text(out / model_card.CARD, card)


def merged(trainable: TrainableConfig, learned: PyTree, transformer: PyTree) -> PyTree:
    """The transformer's variables {"params", "buffers"} with what was learned in the weights.

    Args:
      trainable: whether `learned` replaces the weights or is a LoRA beside them.
      learned: from `learned_params`.
      transformer: linen variables of the base model.
    """
    params = learned
    if trainable.mode == "lora":
        scaled = lora.scaled(learned, trainable.alpha, trainable.rank)
        params = lora.merge(transformer["params"], scaled)
    return {**transformer, "params": params}


def cast(tree: PyTree, dtype: str) -> PyTree:
    """Every array in host memory and in `dtype`."""
    return jax.tree.map(lambda a: np.asarray(a).astype(jnp.dtype(dtype)), tree)
