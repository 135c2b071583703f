"""Compiles for TPUs you do not have: `python -m pec_jax.aot --config=F.py --topology=v5e:4x4`.

Compiles the train step of a config, as it would run, for a TPU topology, on any machine with
`pip install 'pec_jax[tpu]'`. One JSON object on standard output, per chip and step: parameters,
bytes against the chip's memory and whether they fit, FLOPs counted from the program and by XLA,
collectives by kind, the shortest time that chips of that kind could take (`roofline`), the time
that the compiler itself expects (`schedule`) and what it expects to take longest. Published models
need no files; their shapes are known.
"""

from __future__ import annotations

import json
import os

from absl import flags, logging

from pec_jax import command_line
from pec_jax.errors import exit_on_user_error

_CONFIG = command_line.define_config()
_TOPOLOGY = flags.DEFINE_string("topology", "v5e:4x4", "Kind and grid of the chips, as in v5e:4x4.")

# Most to gain first; what each costs is said beside the field in config/schema.py.
ADVICE = (
    "It does not fit. Lower config.batch.update_images, decode_images or rollout_images; set "
    "config.model.remat=full; raise config.mesh.fsdp; keep weights in bfloat16 "
    "(config.model.param_dtype, encoder_dtype, vae_dtype); or take more chips."
)


def main(argv: list[str]) -> None:
    """Parses, compiles, prints."""
    command_line.refuse_arguments(argv)
    # Before jax looks for the TPU that is not there, and asks it about itself.
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # no chip that two could fight over
    from pec_jax.config.schema import from_config_dict

    with exit_on_user_error():
        config = from_config_dict(_CONFIG.value)  # what it refuses need not wait for jax
        from pec_jax.profiling import aot as ahead

        found = ahead.report(config, _TOPOLOGY.value)
    print(json.dumps(found, indent=2))
    if not found["fits"]:
        logging.warning(ADVICE)


if __name__ == "__main__":
    command_line.run(main)
