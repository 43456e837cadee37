"""`python -m ghibli` is the same as `ghibli`."""

from ghibli.cli.main import main

main()
