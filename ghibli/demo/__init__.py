"""The embedded default: drawn scenes and a tiny base of Stable Diffusion 1.5's classes."""
