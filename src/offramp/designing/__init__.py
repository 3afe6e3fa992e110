"""Looking for a network that fits a budget, instead of making one by hand."""
