"""Owns what is read off certificates: certified accuracy, the choice of Sigma, logs in the field's format.

NumPy alone. May import `core.procedures` (bounds) and `core.errors`.
"""
