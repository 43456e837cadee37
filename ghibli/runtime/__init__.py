"""Errors, terminal output, files, cache, random numbers, resources: the bottom layer."""
