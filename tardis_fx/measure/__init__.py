"""Quality, decoding speed, the machine and tables: shared by benchmarks, demo and commands."""
