"""Trace and plan -> one HTML page that explains itself, works offline and prints. No torch."""
