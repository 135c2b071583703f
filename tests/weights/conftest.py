"""A tiny SD3 pipeline, its transformer's numbers and a LoRA of two of its layers."""

from __future__ import annotations

import pytest


def _oracles():
    """Imported by those who ask, for it imports torch."""
    from tests.weights import lora_oracles

    return lora_oracles


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return _oracles().write(tmp_path_factory.mktemp("sd3"), "sd3")


@pytest.fixture(scope="module")
def base(directory):
    oracles = _oracles()
    return oracles.numbers(oracles.model(directory, "sd3"))


@pytest.fixture(scope="module")
def tensors(base):
    oracles = _oracles()
    width = base[f"{oracles.LAYERS[0]}.weight"].shape[0]
    found = {}
    for module, (a, b) in oracles.factors(dict.fromkeys(oracles.LAYERS, (width, width))).items():
        found |= {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}
    return found
