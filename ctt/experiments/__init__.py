"""Named experiments: which runs they are made of, how these are run, and what is told of them."""
