"""The ops on a CPU, in C++."""
