"""Compiled programs are kept, where the user has not said otherwise."""

from __future__ import annotations

import os
import subprocess
import sys

from tests.conftest import ROOT

# Prints how many programs were found on disk; those that compile within a second are kept too.
CODE = """
import jax, jax.numpy as jnp
from pec_jax import compilation
hits = []
jax.monitoring.register_event_listener(
    lambda event, **about: hits.append(event) if event.endswith("/cache_hits") else None
)
compilation.keep_programs()
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.jit(lambda x: jnp.sin(x) @ x)(jnp.ones((3, 3))).block_until_ready()
print(len(hits))
"""


def start(**environment):
    """How many programs a process of its own finds compiled."""
    ours = {k: v for k, v in os.environ.items() if not k.startswith("JAX_")}
    done = subprocess.run(
        [sys.executable, "-c", CODE],
        env=ours | {"JAX_PLATFORMS": "cpu"} | environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return int(done.stdout)


def test_a_second_start_finds_what_the_first_compiled(tmp_path):
    assert start(PEC_JAX_CACHE=str(tmp_path)) == 0
    assert list((tmp_path / "compiled").iterdir())
    assert start(PEC_JAX_CACHE=str(tmp_path)) > 0


def test_the_users_own_directory_stays(tmp_path):
    start(PEC_JAX_CACHE=str(tmp_path / "ours"), JAX_COMPILATION_CACHE_DIR=str(tmp_path / "mine"))
    assert list((tmp_path / "mine").iterdir()) and not (tmp_path / "ours").exists()


def test_it_can_be_turned_off(tmp_path):
    start(PEC_JAX_CACHE=str(tmp_path), JAX_ENABLE_COMPILATION_CACHE="false")
    assert not (tmp_path / "compiled").exists()
