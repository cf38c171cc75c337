"""Singular values of one matrix, and how a record keeps them."""
