"""Using what a run has learned: drawing images, exporting for diffusers."""
