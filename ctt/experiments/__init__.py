"""Named experiments: their runs, how these are executed, and reports of them."""
