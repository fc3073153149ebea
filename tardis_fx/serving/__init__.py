"""The vLLM plugin: serves a model whose FFNs a plan rewrites. ``import tardis_fx`` does not import it."""
