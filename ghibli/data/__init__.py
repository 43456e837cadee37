"""From an image folder to latents, training examples and validation items."""
