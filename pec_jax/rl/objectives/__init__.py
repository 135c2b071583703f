"""The objectives, one per file: how a rollout becomes a loss."""
