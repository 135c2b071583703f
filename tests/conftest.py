"""Fixtures that several tests share: a small config on the embedded model, and what it builds."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from beartype import BeartypeConf, beartype
from jaxtyping import install_import_hook

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # for `tests`, `launch` and `benchmarks`


# The packages of pure functions, whose annotations say shapes.
CHECKED = [
    "pec_jax.flow",
    "pec_jax.perception.entropy",
    "pec_jax.perception.preprocessing",
    "pec_jax.perception.spaces",
    "pec_jax.rewards.clip",
    "pec_jax.rl",
    "pec_jax.shapes.crowd",
    "pec_jax.shapes.finish",
    "pec_jax.shapes.judge",
    "pec_jax.shapes.objects",
    "pec_jax.shapes.render",
    "pec_jax.shapes.scenes",
]


def _check_annotations():
    """Array shapes and types in annotations are checked while tests run.

    jaxtyping takes the checker by the name of a module; pytest imports ours under names of its own.
    """
    module = types.ModuleType("pec_jax_typechecking")
    # An int is a float, as PEP 484 has it.
    module.checked = beartype(conf=BeartypeConf(is_pep484_tower=True))
    sys.modules[module.__name__] = module
    install_import_hook(CHECKED, f"{module.__name__}.checked")


_check_annotations()  # before pec_jax is imported

# With EXHAUSTIVE=1 nothing is left out for the sake of time: every recording, mesh and number of
# processes.
EXHAUSTIVE = bool(os.environ.get("EXHAUSTIVE"))

# Of the slow ones those that take minutes a file: they start first, or one of them would run on
# alone at the end.
LONGEST = (
    "tests/distributed/",
    "tests/test_notebooks.py",
    "tests/goldens/",
    "tests/training/",
    "tests/rl/",
)

# Directories, files or tests that take long: whole runs, fresh processes, large compilations.
SLOW = (
    "tests/benchmarks/",
    "tests/distributed/test_mesh.py",
    "tests/distributed/test_processes.py",
    "tests/families/test_pipeline.py",
    "tests/families/test_runs.py",
    "tests/goldens/",
    "tests/launch/",
    "tests/models/test_published_sizes.py",
    "tests/rl/test_composition.py",
    "tests/rl/test_constraint_steps.py",
    "tests/rl/test_train_step.py",
    "tests/shapes/pretraining/",
    "tests/test_aot.py",
    "tests/test_embed.py",
    "tests/test_export.py",
    "tests/test_main.py",
    "tests/test_notebooks.py",
    "tests/host/test_ocr.py",
    "tests/rewards/test_ocr.py",
    "tests/test_sample.py",
    "tests/test_score.py",
    "tests/test_tiny.py",
    "tests/test_wheel.py",
    "tests/training/",
)
_ORACLE = re.compile(r"^\s*(?:import|from) (?:torch|diffusers|peft)\b", re.MULTILINE)


@functools.cache
def _has_oracle(path: Path) -> bool:
    return bool(_ORACLE.search(path.read_text(encoding="utf-8")))


def pytest_collection_modifyitems(items):
    """Marks `parity` the files that import an oracle in torch, `slow` these and what SLOW names."""
    for item in items:
        parity = _has_oracle(item.path)
        if parity:
            item.add_marker(pytest.mark.parity)
        if parity or item.nodeid.startswith(SLOW):
            item.add_marker(pytest.mark.slow)
    items.sort(key=lambda item: not item.nodeid.startswith(LONGEST))


def _take_a_share_of_the_cores():
    """One worker of pytest-xdist, one share: threads of several wait for each other otherwise."""
    worker, count = (
        os.environ.get("PYTEST_XDIST_WORKER"),
        os.environ.get("PYTEST_XDIST_WORKER_COUNT"),
    )
    if worker and count and hasattr(os, "sched_setaffinity"):
        share = sorted(os.sched_getaffinity(0))[int(worker.removeprefix("gw")) :: int(count)]
        if share:
            os.sched_setaffinity(0, share)
            # A callback needs a thread beside its device's own, see rewards/host.py.
            os.environ.setdefault("NPROC", "2")


_take_a_share_of_the_cores()  # before jax counts them


def on_eight_devices(function: Callable[[], Any]) -> Any:
    """What a function of a test module returns, as JSON, in a process that has 8 CPU devices."""
    path = Path(function.__code__.co_filename).relative_to(ROOT).with_suffix("")
    module = ".".join(path.parts)
    code = f"import json, {module} as m; print(json.dumps(m.{function.__name__}()))"
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """Prompt sets and compiled programs are cached outside of the user's home.

    What a test compiles the next one finds, in this process and in those that it starts.
    """
    from pec_jax import compilation

    directory = tmp_path_factory.mktemp("cache")
    os.environ["PEC_JAX_CACHE"] = str(directory)
    compilation.keep_programs()
    return directory


def small_config_dict():
    """2 groups of 4 images, 3 steps: what a step needs to be a step."""
    from configs import shapes_grpo

    config = shapes_grpo.get_config()
    config.num_iterations = 4
    config.trainable.rank = 4
    config.sampler.update({"num_steps": 3, "window": ()})
    config.updates.minibatches = 1
    config.batch.update({"groups": 2, "group_size": 4})
    config.eval.update(
        {
            "num_prompts": 3,
            "groups": 2,
            "images_per_prompt": 4,
            "num_steps": 3,
            "sample_rows": 2,
            "sample_columns": 3,
        }
    )
    config.schedule.update({"sample_every": 2, "checkpoint_every": 2, "eval_every": 2})
    return config


def tree_hash(directory):
    """Every path below a directory, with the SHA-256 of each file."""
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        if path.is_file()
        else "directory"
        for path in sorted(directory.rglob("*"))
    }


@pytest.fixture
def small_config():
    """A fresh small ConfigDict."""
    return small_config_dict()


@pytest.fixture(scope="session")
def experiment():
    """The embedded model under the small config, built once."""
    from pec_jax.config import from_config_dict
    from pec_jax.training.build import build

    return build(from_config_dict(small_config_dict()))
