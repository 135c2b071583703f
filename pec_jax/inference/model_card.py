"""The card of an export: what it was made of, how, and what it does, as the hub shows it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from etils import epath
from huggingface_hub import ModelCardData

from pec_jax.config import Config, to_dict
from pec_jax.evaluation.labels import label_of, without_what_is_off
from pec_jax.io import read_json

CARD = "README.md"
# Name in the export -> the run's own sample grid, by its place in the order of iterations.
GRIDS = {"samples_base.png": 0, "samples.png": -1}

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w.-]+)?")
_LOADING = {
    "lora": """\
pipe = {pipeline}.from_pretrained({base}{revision})
pipe.load_lora_weights("PATH OR HUB ID OF THIS REPOSITORY")""",
    "transformer": """\
transformer = {transformer}.from_pretrained("PATH OR HUB ID OF THIS REPOSITORY")
pipe = {pipeline}.from_pretrained({base}{revision}, transformer=transformer)""",
    # Of a run whose transformer was not its pipeline's own.
    "lora of another": """\
transformer = {transformer}.{load_other}
pipe = {pipeline}.from_pretrained({base}{revision}, transformer=transformer)
pipe.load_lora_weights("PATH OR HUB ID OF THIS REPOSITORY")""",
}


def model_card(workdir: epath.Path, config: Config, kind: str, classes: tuple[str, str]) -> str:
    """The text of an export's README.md.

    Args:
        workdir: the run directory, whose eval.json is shown if the run has ended.
        config: the run's.
        kind: `lora` or `transformer`.
        classes: of the pipeline and the transformer, in diffusers.
    """
    values = without_what_is_off(to_dict(config))
    label = label_of(values)
    details = ", ".join([label.space, f"weight {label.weight}"][not label.space :])
    name = f"{label.method} ({details})" if label.weight else label.method
    rewards = [f"{s['weight']:g} x {n}" for n, s in values["rewards"].items() if s["weight"]]
    evaluation = workdir / "eval.json"
    numbers = read_json(evaluation) if evaluation.exists() else {}
    # What `trainable.init` names is there before training, too.
    init = config.trainable.init
    before = "before training" if init else "base model"
    made = f"{numbers['iterations']} iterations" if numbers else "a run that has not ended"
    return "\n".join(
        [
            f"---\n{_data(config, kind).to_yaml()}\n---",
            f"# {_title(config)}, fine-tuned with {name}\n",
            f"{_subject(config, kind)}, fine-tuned by reinforcement learning with pec_jax, which "
            f"implements [arXiv 2605.12112](https://arxiv.org/abs/2605.12112): {made} of "
            f"{config.batch.groups} prompts with {config.batch.group_size} images each, seed "
            f"{config.seed}.\n",
            f"- Reward: {' + '.join(rewards) or 'none'}",
            f"- Method: {name}",
            f"- Sampler in training: {config.sampler.num_steps} steps, guidance "
            f"{config.sampler.guidance:g}, noise {config.sampler.noise_level:g}",
            f"- Prompts: {config.prompts.train}",
            *_other_transformer(config),
            *([f"- Started from: {_shortened(init)}"] if init else []),
            "",
            _usage(config, kind, classes),
            *_results(numbers, before),
            *_pictures(workdir, before),
            "## Config\n",
            "<details><summary>All fields</summary>\n",
            f"```json\n{json.dumps(_without_places(values), indent=2)}\n```\n",
            "</details>\n",
        ]
    )


def grids(workdir: epath.Path) -> dict[str, epath.Path]:
    """Name in the export -> file of the run, for the sample grids that there are."""
    found = sorted((workdir / "samples").glob("step_*.png"))
    return {name: found[place] for name, place in GRIDS.items()} if len(found) > 1 else {}


def _data(config: Config, kind: str) -> ModelCardData:
    base = _hub_id(config)
    own = config.model.path == "shapes"
    return ModelCardData(
        base_model=base,
        base_model_relation=None if base is None else "adapter" if kind == "lora" else "finetune",
        library_name="diffusers",
        license="apache-2.0" if own else "other",
        license_name=None if own else "that-of-the-base-model",
        pipeline_tag="text-to-image",
        tags=["reinforcement-learning", "flow-matching", "flow-grpo", "pec_jax"]
        + ["lora"] * (kind == "lora"),
    )


def _hub_id(config: Config) -> str | None:
    """The base model's repository, if it has one; what names a directory is not published."""
    path = config.model.path
    known = _HUB_ID.fullmatch(path) and not epath.Path(path).exists()
    return path.partition("@")[0] if known else None


def _title(config: Config) -> str:
    return config.model.path.partition("@")[0].rstrip("/").rpartition("/")[2]


def _subject(config: Config, kind: str) -> str:
    what = "A LoRA for" if kind == "lora" else "The transformer of"
    revision = config.model.path.partition("@")[2]
    base = _hub_id(config)
    named = f"[{base}](https://huggingface.co/{base})" if base else f"`{_title(config)}`"
    return f"{what} {named}" + (f", revision `{revision}`" if base and revision else "")


def _usage(config: Config, kind: str, classes: tuple[str, str]) -> str:
    pipeline, transformer = classes
    revision = config.model.path.partition("@")[2]
    base = json.dumps(_hub_id(config) or f"PATH OF {_title(config)}")
    of_another = kind == "lora" and config.model.transformer
    code = _LOADING["lora of another" if of_another else kind].format(
        pipeline=pipeline,
        transformer=transformer,
        load_other=_load_other(config.model.transformer),
        base="SHAPES_DIRECTORY" if config.model.path == "shapes" else base,
        revision=f', revision="{revision}"' if _hub_id(config) and revision else "",
    )
    names = pipeline if kind == "lora" and not of_another else ", ".join(sorted(classes))
    imports = f"from diffusers import {names}\n"
    if config.model.path == "shapes":
        imports += "from pec_jax.families.locate import SHAPES_DIRECTORY\n"
    return (
        f"```python\n{imports}\n{code}\n"
        f'image = pipe("a prompt", num_inference_steps={config.eval.num_steps}, '
        f"guidance_scale={config.eval.guidance:g}).images[0]\n```\n"
    )


def _load_other(name: str) -> str:
    """The call in diffusers that loads what `config.model.transformer` names."""
    repo, _, revision = name.partition("@")
    if _HUB_ID.fullmatch(name) and not epath.Path(name).exists():
        return f'from_pretrained("{repo}", revision="{revision}")'
    path = json.dumps(f"PATH OF {name.rstrip('/').rpartition('/')[2]}")
    return f"from_{'single_file' if epath.Path(name).suffix else 'pretrained'}({path})"


def _other_transformer(config: Config) -> list[str]:
    if not (name := config.model.transformer):
        return []
    return [f"- Transformer before training: {name.rstrip('/').rpartition('/')[2]}"]


def _results(numbers: Mapping[str, Any], before: str) -> list[str]:
    """The held-out evaluation before and after, as a table."""
    if not numbers:
        return []
    lines = [
        "## Held-out evaluation\n",
        f"{numbers['count/images_per_prompt']:g} images of each of {numbers['count/prompts']:g} "
        "prompts. In brackets: the 95% bootstrap interval over prompts.\n",
        f"| | {before} | this model |",
        "|---|---:|---:|",
    ]
    for key in sorted(numbers):
        if key.startswith(("quality/", "diversity/")) and not key.endswith(("/low", "/high")):
            cells = [_cell(numbers, f"{side}{key}") for side in ("base/", "")]
            lines.append(f"| {key} | {' | '.join(cells)} |")
    return [*lines, ""]


def _cell(numbers: Mapping[str, Any], key: str) -> str:
    value, low, high = (numbers.get(f"{key}{end}") for end in ("", "/low", "/high"))
    if value is None:
        return "–"
    return f"{value:.4g}" + (f" ({low:.4g} to {high:.4g})" if low is not None else "")


def _pictures(workdir: epath.Path, before: str) -> list[str]:
    if not grids(workdir):
        return []
    return [
        "## Samples\n",
        "The same prompts and noise before and after.\n",
        f"| {before} | this model |\n|---|---|",
        f"| ![before]({next(iter(GRIDS))}) | ![after]({list(GRIDS)[-1]}) |\n",
    ]


def _without_places(values: Mapping[str, Any]) -> dict[str, Any]:
    """The config without directories of the machine that trained."""
    return {key: _shortened(value) for key, value in values.items()}


def _shortened(value: Any) -> Any:
    if isinstance(value, Mapping):
        return _without_places(value)
    is_place = isinstance(value, str) and value.startswith(("/", "~", "gs://"))
    return value.rstrip("/").rpartition("/")[2] if is_place else value
