"""The statistics of a promise: risks, p-values and tests over arrays of losses.

Nothing here knows models or gates, and nothing imports torch.
"""
