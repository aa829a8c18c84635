"""Training methods by name, one file each."""

from ctt.methods.catalog import About, get, names

__all__ = ["About", "get", "names"]
