"""`pytest benchmarks`: every operation against reference, peers and the machine's limits."""
