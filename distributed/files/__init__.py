"""Owns files wherever they are: folders on disks and object stores, Parquet in memory, data sets read from there.

May import `core`, nothing else of `distributed`.
"""
