"""Where rows come from: arrays, torch data sets, iterables of batches, and a shelf of file formats.

Each public file here except `rows.py` and `specs.py` is one source (`cifar10:DIR`), with one
function `load(place, split) -> Rows`; its name is the file's name.
"""
