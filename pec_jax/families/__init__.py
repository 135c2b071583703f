"""All that a family of pipelines is, and loading one from its directory."""
