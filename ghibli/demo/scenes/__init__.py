"""Captioned scenes, drawn to look like photos or like hand-painted animation."""
