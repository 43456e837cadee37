"""Before a run: download, caption, check data, settings and memory."""
