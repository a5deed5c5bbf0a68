"""The experiments that `python -m dlgm_tutorial.reproduce` runs, one module a chapter (chNN_name.py), found by name.

`dlgm_tutorial.reproduce` says how one is written.
"""

__all__ = []
