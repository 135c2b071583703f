"""Heads of linear layers against torch."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from pec_jax.perception.heads import affine_head
from pec_jax.weights.model_files import open_model
from pec_jax.weights.tensors import WeightsError


def stack(*widths: int) -> torch.nn.Sequential:
    """As both aesthetic predictors and ImageReward have it: dropout between, no activation."""
    torch.manual_seed(0)
    layers: list[torch.nn.Module] = []
    for fan_in, fan_out in itertools.pairwise(widths):
        layers += [torch.nn.Linear(fan_in, fan_out), torch.nn.Dropout(0.2)]
    return torch.nn.Sequential(*layers[:-1]).eval()


@pytest.mark.parametrize("prefix", ["layers", "scoring_head", "mlp.layers"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_product_of_the_layers_is_the_head(tmp_path, prefix, dtype):
    head = stack(48, 32, 16, 8, 4, 1).to(dtype)
    state = {f"{prefix}.{name}": p for name, p in head.state_dict().items()}
    state["blip.other"] = torch.zeros(3)
    torch.save(state, tmp_path / "head.pth")
    found = affine_head(open_model(tmp_path / "head.pth"))
    assert found["kernel"].dtype == found["bias"].dtype == np.float32
    features = torch.randn(5, 48, dtype=torch.float64)
    expected = head.double()(features)[:, 0].detach().numpy()
    ours = features.numpy() @ found["kernel"] + found["bias"]
    np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "state",
    [
        {"other.weight": torch.ones(1, 2)},
        {"layers.0.weight": torch.ones(1, 2)},  # no bias
        {"layers.0.weight": torch.ones(3, 2), "layers.0.bias": torch.ones(3)},  # three numbers
    ],
)
def test_what_is_no_head_is_named(tmp_path, state):
    torch.save(state, tmp_path / "head.pth")
    with pytest.raises(WeightsError, match="no head of linear layers"):
        affine_head(open_model(tmp_path / "head.pth"))
