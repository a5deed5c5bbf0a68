"""The chapters' own NumPy code, exported from their cells; `make scratch` writes these modules."""
