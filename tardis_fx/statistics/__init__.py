"""Sums over tokens, and the regressions and checks based on them that several rewrites share."""
