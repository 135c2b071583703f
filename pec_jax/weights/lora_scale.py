"""By which factor a LoRA file is applied: alpha / r of each layer, wherever the file keeps alpha.

Diffusers keeps the settings of an adapter as JSON in the file's header, PEFT in
adapter_config.json beside the file; older files have a scalar tensor MODULE.alpha, or nothing,
which means alpha = r.
"""

from __future__ import annotations

import collections
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pec_jax.io import read_json
from pec_jax.weights.tensors import WeightsError, read_metadata

METADATA_KEY = "lora_adapter_metadata"  # of the header, as diffusers calls it
PREFIX = "transformer."  # of tensors and settings, in a file for a whole pipeline
MAX_ALPHA = 1e6
# PEFT's patterns are regular expressions. A file from elsewhere shall not make us run one that
# never ends, so only the kind that diffusers writes is taken: a module's name or the end of one.
PATTERN = re.compile(r"\^?[\w.-]+")


def adapter_settings(file: Path, *, peft: bool) -> dict[str, Any] | None:
    """The settings of the adapter in a file, with PEFT's names.

    Args:
        file: a safetensors file.
        peft: whether they lie beside the file if they are not in it.

    Returns:
        Such as {"r": 4, "lora_alpha": 8}; None if the file has none.

    Raises:
        WeightsError: they cannot be read.
    """
    text = read_metadata(file).get(METADATA_KEY)
    if text is None:
        return read_json(file.parent / "adapter_config.json") if peft else None
    try:
        settings = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"{file}: {METADATA_KEY} is not valid JSON ({error})") from error
    if not isinstance(settings, dict):
        raise WeightsError(f"{file}: {METADATA_KEY} must hold a JSON object")
    return {key.removeprefix(PREFIX): value for key, value in settings.items()}


def scales(
    file: Path,
    ranks: Mapping[str, int],
    settings: Mapping[str, Any] | None,
    alphas: Mapping[str, float],
) -> dict[str, float]:
    """The factor that each layer's product B A is multiplied with.

    alpha / r, or alpha / sqrt(r) where the settings ask for it (rsLoRA). A layer without an alpha
    of its own takes the settings' alpha, or that which most layers have; 1 if there is none.

    Args:
        file: named in messages.
        ranks: module -> r.
        settings: from `adapter_settings`.
        alphas: module -> its tensor MODULE.alpha, where there is one.

    Returns:
        Module -> factor.

    Raises:
        WeightsError: settings and tensors both give an alpha, an alpha that is no number, or
            settings of another rank.

    Source: diffusers 0.42, utils/peft_utils.py, get_peft_kwargs; PEFT, tuners/lora/layer.py;
    Kalajdzievski 2023, arXiv 2312.03732 (rsLoRA).
    """
    if settings is not None and alphas:
        raise WeightsError(f"{file}: gives alpha twice, as tensors and as settings; drop one")
    if settings is not None:
        return _from_settings(file, ranks, settings)
    own = {module: _number(file, f"{module}.alpha", value) for module, value in alphas.items()}
    if not own:
        return dict.fromkeys(ranks, 1.0)
    usual = collections.Counter(own.values()).most_common(1)[0][0]
    return {module: own.get(module, usual) / rank for module, rank in ranks.items()}


def _from_settings(
    file: Path, ranks: Mapping[str, int], settings: Mapping[str, Any]
) -> dict[str, float]:
    usual = _number(file, "lora_alpha", settings.get("lora_alpha"))
    patterns = _table(file, settings, "alpha_pattern")
    for pattern in patterns:
        if not PATTERN.fullmatch(pattern):
            raise WeightsError(
                f"{file}: alpha_pattern {pattern!r} is not supported; give it module names, such "
                "as 'transformer_blocks.0.attn.to_q'"
            )
    stated = [settings.get("r"), *_table(file, settings, "rank_pattern").values()]
    result = {}
    for module, rank in ranks.items():
        if rank not in stated:
            raise WeightsError(
                f"{file}: {module!r} has rank {rank}, but the adapter's settings say "
                f"{stated[0]!r}; they belong to different files"
            )
        alpha = next((value for key, value in patterns.items() if _matches(key, module)), usual)
        result[module] = alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)
    return result


def _table(file: Path, settings: Mapping[str, Any], key: str) -> dict[str, float]:
    value = settings.get(key) or {}
    if not isinstance(value, dict):
        raise WeightsError(f"{file}: {key} {value!r} must be an object")
    return {pattern: _number(file, key, item) for pattern, item in value.items()}


def _matches(pattern: str, module: str) -> bool:
    name = pattern.removeprefix("^")
    return module == name or (name == pattern and module.endswith(f".{name}"))


def _number(file: Path, name: str, value: Any) -> float:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not abs(value) <= MAX_ALPHA:  # also refuses NaN
        raise WeightsError(f"{file}: {name} {value!r} must be a number up to {MAX_ALPHA:g}")
    return float(value)
