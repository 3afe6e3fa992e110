"""How segments are run: one engine per file, each with one function `open`.

    open(network, steps, device) -> one Part per step, callables on named tensors

An engine refuses what it cannot run with the operator and the segment in the message.
"""
