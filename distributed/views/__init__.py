"""Owns rows for people: tables and images for the report, logs in the field's format.

May import `core`, `distributed.execution`, and all that this one may import.
"""
