"""Putting the layers into models that others define."""
