"""From an ml_collections.ConfigDict to frozen, validated dataclasses."""
