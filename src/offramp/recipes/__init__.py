"""The shelf of recipes: how exits are trained."""
