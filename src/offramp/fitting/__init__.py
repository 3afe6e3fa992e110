"""The one loop that teaches: views of batches, the cache of pooled features, checkpoints, history."""
