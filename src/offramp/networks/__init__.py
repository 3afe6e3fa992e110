"""Networks: the user's models with exits and gates under names, and named tensors between them."""
