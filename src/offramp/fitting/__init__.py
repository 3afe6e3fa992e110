"""The one loop that trains: views of batches, the cache of pooled features, checkpoints,
history.
"""
