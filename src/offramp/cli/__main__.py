"""`python -m offramp.cli` is `offramp`."""

from offramp.cli import main

main()
