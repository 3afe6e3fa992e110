"""Recipes, gates and seeds under one protocol: trained, recorded, calibrated and measured alike, on
one page.
"""
