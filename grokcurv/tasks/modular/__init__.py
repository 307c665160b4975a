"""Modular arithmetic: operations, networks, and what of their weights is a solution."""
