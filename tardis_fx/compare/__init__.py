"""``tardis compare``: rewrites and torchao's integers on one model, compared in quality, bytes, FLOPs and speed."""
