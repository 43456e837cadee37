"""The `ghibli` command line."""
