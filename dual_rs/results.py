"""Certificates as a DataFrame, certified accuracy with its interval, and the plot."""

from distributed.views.results import accuracy, of_certificates, of_log, of_run, plot

__all__ = ["accuracy", "of_certificates", "of_log", "of_run", "plot"]
