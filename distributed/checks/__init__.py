"""Owns what is checked: before a run (preflight, its cost), during it (status), and afterwards (the audit).

May import `core`, all that `distributed.execution` may import, that, `distributed.training` and `distributed.views`.
"""
