"""`python -m offramp` is `offramp`."""

from offramp.cli import main

main()
