"""Owns the way from a plan to committed shards: work, replicas, the scheduler, and what Prometheus sees of them.

May import `core`, `distributed.methods`, `distributed.files`, `distributed.store` and `distributed.cluster`.
"""
