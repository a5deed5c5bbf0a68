"""Small data files that ship with the package; `datasets` and `cast` read them."""
