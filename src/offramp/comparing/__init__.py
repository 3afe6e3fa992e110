"""Recipes, gates and seeds under one protocol: taught, recorded, calibrated and measured alike, on one page."""
