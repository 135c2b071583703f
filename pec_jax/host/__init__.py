"""Judges that run on the host: NumPy and the standard library, no JAX."""
