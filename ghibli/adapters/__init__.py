"""LoRA adapters: create, read, write, apply and describe them."""
