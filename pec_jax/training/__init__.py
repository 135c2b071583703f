"""A run on the host: building its parts, the loop, checkpoints, metric files."""
