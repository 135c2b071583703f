"""By which factor a LoRA file is applied: alpha / r of each layer, wherever the file keeps alpha.

The settings of an adapter may give other ranks and alphas to some of its modules. Older files have
a scalar tensor MODULE.alpha, or nothing, which means alpha = r.
"""

from __future__ import annotations

import collections
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pec_jax.weights.lora_settings import Settings
from pec_jax.weights.tensors import WeightsError

MAX_ALPHA = 1e6
DEFAULT = 8  # PEFT's own r and lora_alpha
# PEFT's patterns are regular expressions. A file from elsewhere shall not make us run one that
# never ends: nothing but these signs, and no group repeated.
_TOKEN = re.compile(
    r"(?P<unbounded>(?<!\))(?:[*+]|\{\d{1,2},?\d{0,2}\})\??)"
    r"|(?P<choice>\?|\|)"
    r"|[\w\- ^$)]|\\[.\-dDwW]|\.|\[\^?(?:\\[.\-dDwW]|[\w.\-])+\]|\((?:\?:)?"
)
# An upper bound of how often a pattern goes back on a name of 64 characters, as a power of two.
_BITS = {"unbounded": 6, "choice": 1}
_MAX_STEPS = 2**25  # of all patterns of a file
_MAX_PATTERNS, _MAX_LENGTH = 10_000, 500


def scales(
    file: Path,
    ranks: Mapping[str, int],
    settings: Settings | None,
    alphas: Mapping[str, float],
) -> dict[str, float]:
    """The factor that each module's product B A is multiplied with.

    alpha / r, or alpha / sqrt(r) where the settings ask for it (rsLoRA). A module without an alpha
    of its own takes the settings' alpha, or that which most modules have; 1 if there is none.

    Args:
        file: named in messages.
        ranks: module -> r.
        settings: from `adapter_settings`.
        alphas: module -> its tensor MODULE.alpha, where there is one.

    Returns:
        Module -> factor.

    Raises:
        WeightsError: settings and tensors both give an alpha, an alpha that is no number, a
            pattern that may not end, or settings of another rank.

    Source: diffusers 0.42, utils/peft_utils.py, get_peft_kwargs; PEFT, tuners/lora/layer.py;
    Kalajdzievski 2023, arXiv 2312.03732 (rsLoRA).
    """
    if settings is not None and alphas:
        raise WeightsError(f"{file}: gives alpha twice, as tensors and as settings; drop one")
    if settings is not None:
        return _from_settings(settings.source, ranks, settings.values)
    own = {module: _number(file, f"{module}.alpha", value) for module, value in alphas.items()}
    if not own:
        return dict.fromkeys(ranks, 1.0)
    usual = collections.Counter(own.values()).most_common(1)[0][0]
    return {module: own.get(module, usual) / rank for module, rank in ranks.items()}


def _from_settings(
    file: Path, ranks: Mapping[str, int], settings: Mapping[str, Any]
) -> dict[str, float]:
    usual_rank = _number(file, "r", settings.get("r", DEFAULT))
    usual_alpha = _number(file, "lora_alpha", settings.get("lora_alpha", DEFAULT))
    rank_pattern = _patterns(file, settings, "rank_pattern")
    alpha_pattern = _patterns(file, settings, "alpha_pattern")
    result = {}
    for module, rank in ranks.items():
        stated = _matching(rank_pattern, module, usual_rank)
        if rank != stated:
            raise WeightsError(
                f"{file}: {module!r} has rank {rank}, but the adapter's settings say "
                f"{stated:g}; they belong to different files"
            )
        alpha = _matching(alpha_pattern, module, usual_alpha)
        result[module] = alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)
    return result


def _patterns(
    file: Path, settings: Mapping[str, Any], key: str
) -> list[tuple[re.Pattern[str], float]]:
    """Each pattern of a setting, as PEFT matches it, with its number."""
    table = settings.get(key) or {}
    if not isinstance(table, dict):
        raise WeightsError(f"{file}: {key} {table!r} must be an object")
    steps = sum(_steps(file, key, pattern) for pattern in table)
    if len(table) > _MAX_PATTERNS or steps > _MAX_STEPS:
        raise WeightsError(f"{file}: {key} could take for ever; name the modules instead")
    return [
        (_compile(file, key, pattern), _number(file, key, value))
        for pattern, value in table.items()
    ]


def _steps(file: Path, key: str, pattern: str) -> int:
    """About how many steps a pattern may take on a name, at most."""
    bits, end = 0, 0
    for token in _TOKEN.finditer(pattern):
        if token.start() != end:
            break
        end = token.end()
        bits += _BITS.get(token.lastgroup or "", 0)
    if end != len(pattern) or end > _MAX_LENGTH or 2**bits > _MAX_STEPS:
        raise WeightsError(
            f"{file}: {key} {pattern[:_MAX_LENGTH]!r} is not supported, for it could take for "
            "ever; name the modules, such as 'transformer_blocks.0.attn.to_q' or '.*\\.to_(q|k)'"
        )
    return 2**bits


def _compile(file: Path, key: str, pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(rf"(.*\.)?({pattern})$")
    except re.error as error:
        raise WeightsError(
            f"{file}: {key} {pattern!r} is no regular expression: {error}"
        ) from error


def _matching(
    patterns: Sequence[tuple[re.Pattern[str], float]], module: str, usual: float
) -> float:
    """The number of the first pattern that a module's name, or the end of it, matches."""
    return next((number for pattern, number in patterns if pattern.match(module)), usual)


def _number(file: Path, name: str, value: Any) -> float:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not abs(value) <= MAX_ALPHA:  # also refuses NaN
        raise WeightsError(f"{file}: {name} {value!r} must be a number up to {MAX_ALPHA:g}")
    return float(value)
