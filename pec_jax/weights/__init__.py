"""Model directories in the diffusers and Hugging Face layouts <-> pytrees; no jit, no torch."""
