"""What changes how a segment computes: one layer per file."""
