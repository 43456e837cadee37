"""Before a run: download, caption, check settings, data and memory."""
