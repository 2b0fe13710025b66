"""Owns what is learned from shards: labels, the estimator's choices, trainings on Ray Train and their checkpoints.

May import `core`, `distributed.execution`, and all that this one may import.
"""
