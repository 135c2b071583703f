"""Schedules, transition kernels and the sampler of a flow-matching policy; no rewards."""
