"""Quality, decoding speed, the machine, tables and plots: shared by benchmarks, demo and commands."""
