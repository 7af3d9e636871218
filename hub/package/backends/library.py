"""Stands where the package has the attention of other packages, which a kernel of the Hub may not import."""

NAME = "library"
BACKENDS: dict = {}
