"""Ghibli LoRA Lab: fine-tune Stable Diffusion 1.5 with LoRA and see whether it learns."""

__version__ = "0.1.0"
