"""Classifiers after a segment: one kind per file."""
