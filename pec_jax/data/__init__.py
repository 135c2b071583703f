"""Prompt sets, the shapes world, and what the host hands to the train step."""
