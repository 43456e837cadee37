"""`python -m ghibli.demo.pretrain`: train the demo base from scratch."""

from ghibli.demo.pretrain.run import main

main()
