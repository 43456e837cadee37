"""LoRA adapters: train, read, write, apply, describe."""
