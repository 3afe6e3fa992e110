"""Members of a ladder that are not torch modules: one file for each kind."""
