"""flux_pec in fewer FLOPs: noise and training at the first two of six steps.

Recipe: flux_pec, of whose six steps the first two are noisy and trained, sigma from 1 to 0.79; the
    others follow the ODE.
Why: see sd3_pec_fast.py.
Cost: 0.57 of flux_pec's FLOPs per iteration; on 16 v5p 74 s in place of 130 by the compiler's
    schedule (compiled, not run).
Memory: 12.08 of 102.8 GB per chip on v5p:2x2x4 (compiled, not run).
Paper: see flux_pec.py; chips, models, prompts, embeddings: see flux_grpo.py.
Command: python -m pec_jax.main --config=configs/flux_pec_fast.py --workdir=runs/flux_pec_fast \\
    --config.prompts.embeddings=embeddings/flux
"""

from ml_collections import ConfigDict

from pec_jax.configs import flux_pec


def get_config() -> ConfigDict:
    """Returns the config: flux_pec with a window."""
    config = flux_pec.get_config()
    config.sampler.update({"window": (0, 2), "noise": "trained"})
    return config
