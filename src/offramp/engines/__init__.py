"""Engines run segments. Each file has one, a class that keeps the contract
`offramp.contracts.Engine`.

If an engine cannot run something, its message names the operator and the segment.
"""
