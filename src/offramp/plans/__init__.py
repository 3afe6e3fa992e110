"""The decisions of a network, as data: its topology, plans and their prices, and traces.

Nothing here imports torch.
"""
