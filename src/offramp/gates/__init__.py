"""What changes a sample's path: one gate, or one family of score functions, per file."""
