"""Owns Ray's clusters: joining or starting one, what its nodes find of the checkout, how many replicas on which device.

May import `core` and `distributed.files`.
"""
