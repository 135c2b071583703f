"""The readers of what comes from outside: for each, files that are right, and how they are read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import flax.linen as nn
import jax
import numpy as np
from etils import epath
from PIL import Image

from pec_jax.data.embedding_store import EmbeddingStore, write_store
from pec_jax.data.prompts import read_prompts
from pec_jax.evaluation import comparison, run_table, steps, table
from pec_jax.evaluation.image_sets import read_image_set, read_images
from pec_jax.families.locate import SHAPES_DIRECTORY
from pec_jax.families.pipeline import load_pipeline, text_lengths
from pec_jax.families.registry import read_family
from pec_jax.families.tokenizers import load_tokenizer
from pec_jax.inference.draw import Request, initial_latents
from pec_jax.models import lora
from pec_jax.training import base_evaluation, learned
from pec_jax.types import Conditioning
from pec_jax.weights.lora_files import write_lora
from pec_jax.weights.lora_reader import read_lora
from pec_jax.weights.model_files import open_model
from pec_jax.weights.tensors import read_tensors, write_tensors
from tests.test_compare import make_run

CORPUS = Path(__file__).with_name("corpus")


class Reader(NamedTuple):
    """Of one kind of data.

    Attributes:
      write: makes files that are right in an empty directory.
      read: reads them, all of what a command would.
    """

    write: Callable[[Path], object]
    read: Callable[[Path], object]


def _tensors(place: Path) -> None:
    rng = np.random.default_rng(0)
    arrays = {f"layer.{i}.weight": rng.normal(size=(2, 3)).astype(np.float32) for i in range(3)}
    write_tensors(place, arrays, "model", {"format": "pt"})


def _read_tensors(place: Path) -> object:
    return dict(read_tensors(place, "model"))


def _shards(place: Path) -> None:
    names = {}
    for i in range(2):
        write_tensors(place, {f"w{i}": np.ones((2, 2), np.float32)}, f"model-0000{i}-of-00002")
        names[f"w{i}"] = f"model-0000{i}-of-00002.safetensors"
    index = {"metadata": {"total_size": 32}, "weight_map": names}
    (place / "model.safetensors.index.json").write_text(json.dumps(index))


def _torch_file(place: Path) -> None:
    shutil.copy(CORPUS / "model.pt", place / "model.pt")


def _read_torch_file(place: Path) -> object:
    return dict(open_model(place / "model.pt"))


def _pipeline(place: Path) -> None:
    for file in SHAPES_DIRECTORY.glob("*/config.json"):
        (place / file.parent.name).mkdir(exist_ok=True)
        shutil.copy(file, place / file.parent.name)
    shutil.copy(SHAPES_DIRECTORY / "model_index.json", place)
    shutil.copytree(SHAPES_DIRECTORY / "scheduler", place / "scheduler")
    for name in ("tokenizer", "tokenizer_2", "tokenizer_3"):
        (place / name).mkdir()
        for file in ("tokenizer_config.json",):
            shutil.copy(SHAPES_DIRECTORY / name / file, place / name)


def _read_pipeline(place: Path) -> object:
    family = read_family(place)
    return load_pipeline(place, text=False, weights=False), text_lengths(place, family)


def _tokenizer(name: str) -> Callable[[Path], object]:
    def write(place: Path) -> None:
        shutil.copytree(SHAPES_DIRECTORY / name, place, dirs_exist_ok=True)

    return write


def _read_tokenizer(place: Path) -> object:
    return load_tokenizer(place)(["a small red cat"], max_length=16, truncation=True)


_SHAPES: list[object] = []


def _transformer() -> object:
    if not _SHAPES:
        _SHAPES.append(
            load_pipeline(SHAPES_DIRECTORY, text=False, weights=False).transformer_variables[
                "params"
            ]
        )
    return _SHAPES[0]


def _lora(place: Path) -> None:
    adapter = lora.init(_transformer(), (r".*\.attn\.to_q",), 2, jax.random.key(0))
    write_lora(place, nn.unbox(adapter), 2.0)


def _peft(place: Path) -> None:
    rng = np.random.default_rng(0)
    module = "base_model.model.transformer_blocks.0.attn.to_q"
    arrays = {
        f"{module}.lora_A.weight": rng.normal(size=(2, 64)).astype(np.float32),
        f"{module}.lora_B.weight": rng.normal(size=(64, 2)).astype(np.float32),
    }
    write_tensors(place, arrays, "adapter_model")
    settings = {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 4,
        "target_modules": ["attn.to_q"],
        "rank_pattern": {"to_q": 2},
        "alpha_pattern": {"to_q": 4},
        "bias": "none",
    }
    (place / "adapter_config.json").write_text(json.dumps(settings))


def _read_lora(place: Path) -> object:
    return read_lora(place, _transformer())


def _latents(place: Path) -> None:
    np.save(place / "start.npy", np.zeros((2, 4, 4, 4), np.float32))


def _read_latents(place: Path) -> object:
    request = Request(model="shapes", init_latents=str(place / "start.npy"))
    return initial_latents(request, 2, (4, 4, 4))


def _text_prompts(place: Path) -> None:
    (place / "prompts.txt").write_text("a red cat\n# a remark\n\na blue \N{SNOWMAN}\n")


def _json_prompts(place: Path) -> None:
    wanted = [{"class": "cat", "count": 1}]
    lines = [{"prompt": "a cat"}, {"prompt": "b", "negative_prompt": "c", "include": wanted}]
    (place / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def _read_prompts(place: Path) -> object:
    return [list(read_prompts(path)) for path in sorted(place.iterdir())]


def _embeddings(place: Path) -> None:
    def encode(prompts: object) -> Conditioning:
        count = len(list(prompts))
        tokens = np.zeros((count, 3, 4), np.float32)
        return Conditioning(tokens, np.zeros((count, 5), np.float32), np.ones((count, 3), bool))

    write_store(place, ["a", "b", "c"], "0" * 64, encode)


def _read_embeddings(place: Path) -> object:
    store = EmbeddingStore(place)
    return store.gather(np.arange(min(3, len(store))))


def _csv(place: Path) -> None:
    text = "method,perceptual_space,weight,quality/a,diversity/b\nx,dino,0.1,1,2\ny,,,2,1\n"
    (place / "table.csv").write_text(text)


def _read_csv(place: Path) -> object:
    rows = comparison.rows_of_csv(epath.Path(place / "table.csv"))
    return table.write_markdown(rows, {}), table.write_csv(rows)


def _run(place: Path) -> None:
    directory = make_run(place / "run")
    (directory / "eval_base.json").write_text('{"quality/a": 1.0}')
    arrays = {"dino/mean": np.zeros(2, np.float32), "dino/covariance": np.eye(2, dtype=np.float32)}
    write_tensors(directory, arrays, "eval_base")
    for path in (directory / "samples").iterdir():
        path.unlink()


def _read_run(place: Path) -> object:
    directory = epath.Path(place / "run")
    base_evaluation.read_intact(directory)
    rows = run_table.rows_of_runs(run_table.find_runs([directory]))
    return rows, steps.read_steps(directory / "metrics.jsonl")


def _config(place: Path) -> None:
    from configs import shapes_pec

    values = shapes_pec.get_config().to_dict()
    (place / "config.json").write_text(json.dumps(values, default=list))


def _read_config(place: Path) -> object:
    return learned.run_config(epath.Path(place))


def _images(place: Path) -> None:
    lines = []
    for i in range(2):
        Image.new("RGB", (8, 8), (i, 0, 0)).save(place / f"{i}.png")
        lines.append(json.dumps({"file": f"{i}.png", "prompt": "a"}) + "\n")
    (place / "images.jsonl").write_text("".join(lines))


def _read_images(place: Path) -> object:
    found = read_image_set(place, None)
    return read_images(found, range(len(found)))


READERS = {
    "safetensors": Reader(_tensors, _read_tensors),
    "shards": Reader(_shards, _read_tensors),
    "torch": Reader(_torch_file, _read_torch_file),
    "pipeline": Reader(_pipeline, _read_pipeline),
    "clip_tokenizer": Reader(_tokenizer("tokenizer"), _read_tokenizer),
    "t5_tokenizer": Reader(_tokenizer("tokenizer_3"), _read_tokenizer),
    "lora": Reader(_lora, _read_lora),
    "peft_lora": Reader(_peft, _read_lora),
    "latents": Reader(_latents, _read_latents),
    "text_prompts": Reader(_text_prompts, _read_prompts),
    "json_prompts": Reader(_json_prompts, _read_prompts),
    "embeddings": Reader(_embeddings, _read_embeddings),
    "csv": Reader(_csv, _read_csv),
    "run": Reader(_run, _read_run),
    "config": Reader(_config, _read_config),
    "images": Reader(_images, _read_images),
}
