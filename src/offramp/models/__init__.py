"""Networks that offramp can build by name: one family per file."""
