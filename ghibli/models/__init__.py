"""Stable Diffusion 1.5's parts: load, verify, hash, make fast."""
