"""The embedded demo: drawn scenes as data, and a tiny base made of Stable Diffusion 1.5's classes."""
