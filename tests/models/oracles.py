"""Networks of transformers with random weights, saved as they would be published."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch


def randomise(model: torch.nn.Module, spread: float = 0.1) -> torch.nn.Module:
    """Moves every parameter off its start, where many are 0 or 1 and hide mistakes."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p += spread * torch.randn(p.shape, generator=generator)
    return model.eval()


def save(model: torch.nn.Module, directory: Path) -> dict[str, Any]:
    """Writes the model's directory; returns its config.json."""
    model.save_pretrained(directory)
    return json.loads((directory / "config.json").read_text())


def pixels(*shape: int) -> np.ndarray:
    """Normalised pixels [N, H, W, 3]."""
    return np.random.default_rng(1).normal(size=shape).astype(np.float32)


def to_torch(images: np.ndarray) -> torch.Tensor:
    """[N, H, W, 3] -> [N, 3, H, W]."""
    return torch.tensor(images).permute(0, 3, 1, 2)


def relative_error(ours: Any, theirs: Any) -> float:
    """Largest difference over the largest number."""
    ours, theirs = np.asarray(ours, np.float32), np.asarray(theirs, np.float32)
    assert ours.shape == theirs.shape
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())
