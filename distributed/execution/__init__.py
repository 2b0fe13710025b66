"""Owns the way from a plan to committed shards: the cluster, replicas, the scheduler, and what Prometheus sees of them.

May import `core`, `distributed.methods` and `distributed.store`.
"""
