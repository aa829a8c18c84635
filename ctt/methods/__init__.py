"""Training methods by name, one file each."""

from ctt.methods.catalog import About, get, installed, names

__all__ = ["About", "get", "installed", "names"]
