"""What draws other versions of a batch while a network is taught, from torch's own generator: one family per file."""
