from __future__ import annotations

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class Prompt:
    text: str
    metadata: dict[str, Any] = dataclasses.field(default_factory=dict)
