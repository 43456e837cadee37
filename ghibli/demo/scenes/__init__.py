"""Draws captioned scenes, photograph-like or in the Ghibli-like look."""
