"""Statistics of a promise: risks, p-values and tests over arrays of losses. No model, no gate, no
torch.
"""
