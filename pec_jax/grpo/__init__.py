"""Advantages, constraints and the policy loss: arrays in, arrays out."""
