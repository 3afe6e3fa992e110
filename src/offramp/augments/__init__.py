"""What draws other versions of a batch while a network is trained, from torch's own generator: one
family per file.
"""
