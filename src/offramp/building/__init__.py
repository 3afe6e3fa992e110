"""From trained models to networks, and back from folders: cut, ladder, factories, placement,
saving.
"""
