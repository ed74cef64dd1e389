"""`python -m proard.cli` is the command `proard`."""

from proard.cli import main

main()
