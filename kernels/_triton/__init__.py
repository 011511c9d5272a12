"""Triton kernels; each is imported inside the function that launches it."""
