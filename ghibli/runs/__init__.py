"""One run: its folder, settings, identity and processes."""
