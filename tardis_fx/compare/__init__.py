"""``tardis compare``: rewrites and integers on one model, measured side by side."""
