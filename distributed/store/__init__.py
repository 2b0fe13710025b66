"""Owns a run directory: its lock, its manifest, plans and shards, and the proof that they are whole and its own.

May import `core`, `distributed.methods` (whose rows a shard holds) and `distributed.files`.
"""
