"""Owns what is checked: before a run (preflight, its cost), during it (status), and afterwards (the audit).

May import `core`, `distributed.execution`, `distributed.training`, `distributed.views`, and all that these may import.
"""
