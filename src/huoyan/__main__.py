"""`python -m huoyan`: the same as the command `huoyan`."""

from huoyan.cli.main import main

main()
