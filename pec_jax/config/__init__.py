"""From an `ml_collections.ConfigDict` to frozen, validated dataclasses."""

from pec_jax.config.changes import differences
from pec_jax.config.errors import ConfigError, unknown
from pec_jax.config.schema import Config, from_config_dict, to_dict

__all__ = ["Config", "ConfigError", "differences", "from_config_dict", "to_dict", "unknown"]
