"""The memory that each config's docstring promises, against what was and what is compiled."""

from __future__ import annotations

import importlib.util
import json
import re

import pytest

from benchmarks import config_memory
from tests.conftest import EXHAUSTIVE, ROOT

RESULTS = ROOT / "docs" / "results" / "config_memory"
LEFT_OUT = {"__init__", "base", "eval_paper"}  # no runs of their own; one that trains nothing
NAMES = sorted({path.stem for path in (ROOT / "configs").glob("*.py")} - LEFT_OUT)
# The published ones take minutes each.
COMPILED = NAMES if EXHAUSTIVE else ["shapes_pec"]


@pytest.mark.parametrize("name", NAMES)
def test_the_docstring_says_what_was_compiled(name):
    found = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    text = (ROOT / "configs" / f"{name}.py").read_text(encoding="utf-8")
    assert re.findall("^Memory: .* on [^ ]*", text, re.MULTILINE) == [config_memory.sentence(found)]
    assert found["fits"]


@pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="pip install 'pec_jax[tpu]'")
@pytest.mark.parametrize("name", COMPILED)
def test_it_is_what_the_config_takes_today(name, tmp_path):
    """Within a hundredth: other releases of the compiler lay buffers out in other ways."""
    found = config_memory.report(name, config_memory.topologies()[name], tmp_path)
    then = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    assert found["parameters"] == then["parameters"]
    peak = then["bytes_per_chip"]["peak"]
    assert found["bytes_per_chip"]["peak"] == pytest.approx(peak, rel=0.01)
