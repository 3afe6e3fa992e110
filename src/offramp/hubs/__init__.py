"""The shelf of hubs, the sources of other people's models: `timm:NAME` calls `build` and
`preprocess` of hubs/timm.py.
"""
