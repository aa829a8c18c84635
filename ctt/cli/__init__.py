"""Command-line programs. Thin: nothing here imports torch before the arguments are read."""
