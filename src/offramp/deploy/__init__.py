"""A network under a plan, taken elsewhere: a folder that needs neither offramp nor torch."""
