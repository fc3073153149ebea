"""Sums over tokens, and the regressions and checks that several rewrites make of them."""
