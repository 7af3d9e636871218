"""Triton kernels and their launches, one subject a file; `rfkernels.backends.triton` puts them together.

Nothing here is imported before the backend is used, so that rfkernels needs no Triton to import.
"""
