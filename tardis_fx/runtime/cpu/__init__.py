"""The correction op on a CPU, in C++."""
