"""The user's models with exits and gates under names: what stands where, and the tensors that go
between.
"""
