"""Members of a ladder that are no torch modules: a file each kind."""
