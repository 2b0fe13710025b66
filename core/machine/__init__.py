"""Owns what turns requests for draws into votes: noise and its keys, networks, the engine, and their device.

May import `core.records`, `core.errors` and `core.files`; it knows no procedure.
"""
