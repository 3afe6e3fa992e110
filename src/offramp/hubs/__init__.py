"""The shelf of hubs, where models of others come from: `timm:NAME` is hubs/timm.py with its `build`
and `preprocess`.
"""
