"""Inference in deep latent Gaussian models: the package of the book.

One module a chapter and a few shared ones; import the module, not a name from here:
`from dlgm_tutorial import exact_inference`.
"""

__version__ = "0.1.0"
