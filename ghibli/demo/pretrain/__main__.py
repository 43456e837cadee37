"""`python -m ghibli.demo.pretrain`: trains the demo base from nothing."""

from ghibli.demo.pretrain.run import main

main()
