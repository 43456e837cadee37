"""`python -m ghibli` is the same as `ghibli`."""

from ghibli.cli import main

main()
