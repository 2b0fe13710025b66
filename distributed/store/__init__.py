"""Owns what is on disk: folders and object stores, the lock, the manifest, plans and shards, data sets read from there.

May import `core` and `distributed.methods` (whose rows a shard holds).
"""
