"""``tardis compare``: rewrites and torchao's integers on one model, compared by quality, bytes, FLOPs and speed."""
