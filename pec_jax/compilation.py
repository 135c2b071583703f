"""Compiled programs are kept on disk, so that the second start of a command need not compile."""

from __future__ import annotations

import jax

from pec_jax import io

MAX_BYTES = 4 * 2**30  # of all programs together; those unused the longest go first


def keep_programs() -> None:
    """Turns on JAX's persistent cache, in the user's cache directory, before any program runs.

    JAX tells programs apart by their code, the versions of JAX and its compiler, the devices and
    the compiler's flags. A directory that the user has chosen (JAX_COMPILATION_CACHE_DIR) stays,
    and so does JAX_ENABLE_COMPILATION_CACHE=false.
    """
    if jax.config.values["jax_compilation_cache_dir"] is None:
        directory = io.cache_directory() / "compiled"
        jax.config.update("jax_compilation_cache_dir", str(directory))
        jax.config.update("jax_compilation_cache_max_size", MAX_BYTES)
