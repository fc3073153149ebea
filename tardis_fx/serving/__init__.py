"""The vLLM plugin: serves a model whose FFNs a plan rewrites. ``import tardis_fx`` imports nothing of it."""
