"""The settings of an adapter, and whether they describe a LoRA as we apply it.

Diffusers keeps them as JSON in the file's header, PEFT in adapter_config.json beside the file. What
PEFT can do besides W + (alpha / r) B A is refused by name: a file that is applied as what it is not
gives images that nobody has trained.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pec_jax.io import read_json
from pec_jax.weights.tensors import WeightsError, read_metadata

METADATA_KEY = "lora_adapter_metadata"  # of the header, as diffusers calls it
PREFIX = "transformer."  # of tensors and settings, in a file for a whole pipeline
PEFT_FILE, PEFT_SETTINGS = "adapter_model.safetensors", "adapter_config.json"

# `init_lora_weights` beside True and False. These leave the network's weights alone, so that
# nothing is left of them once the file's tensors are in their place.
_PLAIN_STARTS = ("gaussian", "eva", "orthogonal", "mica")
# With these, PEFT subtracts from the network's weights what the adapter starts as; it does so
# again when it loads the first two, cannot load the next two, and forgets it with the last.
_MERGEABLE = ("pissa", "olora")
_ALTERING = (*_MERGEABLE, "corda", "loftq", "lora_ga")
# Settings that, where they are set, make more of an adapter than a LoRA of linear layers.
_EXTENSIONS = (
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "layer_replication",
    "megatron_config",
    "modules_to_save",
    "monteclora_config",
    "target_parameters",
    "trainable_token_indices",
    "use_bdlora",
    "use_qalora",
    "velora_config",
)
_SHOWN = 60  # characters of a setting that a message shows


@dataclasses.dataclass(frozen=True)
class Settings:
    """The settings of an adapter.

    Attributes:
        source: the file that they stand in.
        values: by PEFT's names, such as {"r": 4, "lora_alpha": 8}.
    """

    source: Path
    values: Mapping[str, Any]

    def targets(self, module: str) -> bool:
        """Whether a module is adapted, or its tensors left lying as PEFT leaves them.

        PEFT asks its own settings; diffusers takes whatever the file holds. A regular expression is
        not asked: by it PEFT has written the tensors.
        """
        names = self.values.get("target_modules")
        if self.source.name != PEFT_SETTINGS or not isinstance(names, list):
            return True
        return any(module == name or module.endswith(f".{name}") for name in names)


def adapter_settings(file: Path, *, required: bool) -> Settings | None:
    """The settings of the adapter in a file.

    Args:
        file: a safetensors file. What lies beside it counts if it has PEFT's own name.
        required: whether they must lie beside it if they are not in it.

    Returns:
        None if the file has none.

    Raises:
        WeightsError: they cannot be read, or are those of an adapter that is not supported.
    """
    text = read_metadata(file).get(METADATA_KEY)
    if text is None:
        beside = file.parent / PEFT_SETTINGS
        if not required and not (file.name == PEFT_FILE and beside.is_file()):
            return None
        settings = read_json(beside)
        _check(beside, settings)
        return Settings(beside, settings)
    try:
        settings = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"{file}: {METADATA_KEY} is not valid JSON ({error})") from error
    if not isinstance(settings, dict):
        raise WeightsError(f"{file}: {METADATA_KEY} must hold a JSON object")
    settings = {key.removeprefix(PREFIX): value for key, value in settings.items()}
    _check(file, settings)
    return Settings(file, settings)


def _check(file: Path, settings: Mapping[str, Any]) -> None:
    """Raises WeightsError for an adapter of another kind than ours."""
    kind = settings.get("peft_type", "LORA")
    if kind != "LORA":
        raise WeightsError(f"{file}: peft_type {_short(kind)} is not supported, only 'LORA'")
    bias = settings.get("bias", "none")
    if bias not in (None, "none"):
        raise WeightsError(
            f"{file}: bias {_short(bias)} means that the network's own biases were trained too, "
            "which is not supported; only 'none'"
        )
    for key in _EXTENSIONS:
        if settings.get(key):
            raise WeightsError(
                f"{file}: {key} is set ({_short(settings[key])}), which makes it more than a LoRA "
                "of linear layers; that is not supported"
            )
    _check_start(file, settings.get("init_lora_weights", True))


def _check_start(file: Path, start: Any) -> None:
    if start is None or isinstance(start, bool):
        return
    name = str(start).lower()
    if name in _PLAIN_STARTS:
        return
    if not name.startswith(_ALTERING):
        known = ", ".join((*_PLAIN_STARTS, *_ALTERING))
        raise WeightsError(f"{file}: init_lora_weights {_short(start)} is none of {known}")
    raise WeightsError(
        f"{file}: init_lora_weights {_short(start)} means that PEFT has changed the network's own "
        "weights, to which the LoRA belongs; that is not supported"
        + _merging(file)
        * name.startswith(_MERGEABLE)
    )


def _merging(file: Path) -> str:
    """How to make a whole transformer of it; tests/weights/test_lora_settings.py does so."""
    if file.name == PEFT_SETTINGS:
        steps = (
            f"peft.PeftModel.from_pretrained(transformer, {str(file.parent)!r}).merge_and_unload()"
            ".save_pretrained(DIRECTORY)"
        )
    else:
        steps = (
            f"pipe.load_lora_weights({str(file)!r}, low_cpu_mem_usage=False); pipe.fuse_lora(); "
            "pipe.unload_lora_weights(); pipe.transformer.save_pretrained(DIRECTORY)"
        )
    return f". Merge it, and take the result for the pipeline's transformer: {steps}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
