"""Owns runs made of runs, and answers from finished ones: rounds, shifts, sweeps, other terms, Sigma, predictions.

May import everything else in `distributed`.
"""
