"""The constraints, one per file: what is added to an objective to keep the images diverse."""
