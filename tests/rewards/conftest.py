"""What tests of rewards share."""

from __future__ import annotations

import pytest

from pec_jax.config.registry import REWARDS


@pytest.fixture
def registry(monkeypatch):
    """The rewards there are; what a test adds is gone after it."""
    monkeypatch.setattr(REWARDS, "_entries", {name: REWARDS[name] for name in REWARDS})
    return REWARDS
