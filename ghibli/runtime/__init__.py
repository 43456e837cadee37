"""Errors, terminal, files, cache, random numbers, machine: what everything else stands on."""
