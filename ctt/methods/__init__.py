"""Training methods by name, one file each."""

from ctt.methods.catalog import About, absolute, get, installed, names, own_file

__all__ = ["About", "absolute", "get", "installed", "names", "own_file"]
