"""Owns what is checked: before a run (preflight, its cost), during it (status), and afterwards (the audit).

May import `core`, `distributed.methods`, `distributed.store` and `distributed.execution`.
"""
