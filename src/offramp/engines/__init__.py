"""How segments are run: one engine per file, a class that keeps the contract
`offramp.contracts.Engine`.

An engine refuses what it cannot run with the operator and the segment in the message.
"""
