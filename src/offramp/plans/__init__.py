"""What a network decides, as data: its topology, plans and their prices, traces and what they tell.
No torch.
"""
