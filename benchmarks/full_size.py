"""One velocity of Stable Diffusion 3.5 Medium at full size, ours against diffusers'.

`python benchmarks/full_size.py --work=DIR`: random weights (the real ones need a licence),
512 px, 205 text tokens, fp32. diffusers and we run one after the other in processes of their own,
so that each one's peak memory is its own. Needs 10 GB of disk in DIR and 14 GB of memory, and
takes some minutes on two cores. Prints one JSON object.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from absl import app, flags

_WORK = flags.DEFINE_string("work", None, "Directory for the weights.", required=True)
_STAGE = flags.DEFINE_enum("stage", "all", ["all", "torch", "ours"], "Used by the script itself.")

CONFIG = {
    "sample_size": 128,
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 16,
    "num_layers": 24,
    "attention_head_dim": 64,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "caption_projection_dim": 1536,
    "pooled_projection_dim": 2048,
    "pos_embed_max_size": 384,
    "dual_attention_layers": list(range(13)),
    "qk_norm": "rms_norm",
}


def inputs() -> dict[str, np.ndarray]:
    """x_t [1, 64, 64, 16] of a 512 px image, timestep, 77 + 128 text tokens, pooled text."""
    rng = np.random.default_rng(0)
    return {
        "x_t": rng.standard_normal((1, 64, 64, 16), np.float32),
        "timestep": np.array([700.0], np.float32),
        "tokens": rng.standard_normal((1, 205, 4096), np.float32),
        "pooled": rng.standard_normal((1, 2048), np.float32),
    }


def run_torch(work: Path) -> dict[str, float]:
    """Makes the weights with diffusers, saves them, and computes its velocity."""
    import diffusers
    import torch

    torch.manual_seed(0)
    model = diffusers.SD3Transformer2DModel(**CONFIG).eval()
    with torch.no_grad():
        for p in model.parameters():  # away from the zeros and ones of a new network
            p.add_(0.02 * torch.randn_like(p))
    model.save_pretrained(work / "transformer", max_shard_size="20GB")
    arrays = {name: torch.from_numpy(a) for name, a in inputs().items()}
    start = time.perf_counter()
    with torch.no_grad():
        out = model(
            hidden_states=arrays["x_t"].permute(0, 3, 1, 2),
            timestep=arrays["timestep"],
            encoder_hidden_states=arrays["tokens"],
            pooled_projections=arrays["pooled"],
        ).sample
    seconds = time.perf_counter() - start
    np.save(work / "torch.npy", out.permute(0, 2, 3, 1).numpy())
    return {"seconds": seconds}


def run_ours(work: Path) -> dict[str, float]:
    """Loads the same weights and compares the velocity."""
    import jax

    from pec_jax.families.pipeline import load_transformer

    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    start = time.perf_counter()
    module, variables = load_transformer(work / "transformer", sharding=device)
    jax.block_until_ready(variables)
    loading = time.perf_counter() - start
    loaded = _peak()
    size = sum(a.nbytes for a in jax.tree.leaves(variables))
    apply = jax.jit(module.apply).lower(variables, *inputs().values()).compile()
    start = time.perf_counter()
    found = np.asarray(apply(variables, *inputs().values()))
    seconds = time.perf_counter() - start
    expected = np.load(work / "torch.npy")
    return {
        "seconds": seconds,
        "loading_seconds": loading,
        "parameter_bytes": size,
        "peak_bytes_after_loading": loaded,
        "max_difference_over_max": float(np.abs(found - expected).max() / np.abs(expected).max()),
        "rms_difference_over_std": float(
            np.sqrt(np.mean((found - expected) ** 2)) / expected.std()
        ),
    }


def _peak() -> int:
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # Linux counts kilobytes


def main(argv: list[str]) -> None:
    """Runs both stages, or the one that was asked for."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
    work = Path(_WORK.value)
    if _STAGE.value != "all":
        numbers = {"torch": run_torch, "ours": run_ours}[_STAGE.value](work)
        print(json.dumps(numbers | {"peak_bytes": _peak()}))
        return
    work.mkdir(parents=True, exist_ok=True)
    result = {}
    for stage in ("torch", "ours"):
        command = [sys.executable, __file__, f"--work={work}", f"--stage={stage}"]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        result[stage] = json.loads(done.stdout.splitlines()[-1])
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    app.run(main)
