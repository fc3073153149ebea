"""``tardis bench``: decoding beside what a user would run instead, in one process, with the bytes that bound it."""
