"""From a trace to a plan: candidates, tests and the choice of the cheapest plan that passes.

Arrays in, arrays out. Nothing here imports torch.
"""
