"""Owns rows for people: tables and images for the report, logs in the field's format.

May import `core`, `distributed.methods`, `distributed.store` and `distributed.execution`.
"""
