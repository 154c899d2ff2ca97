"""Frozen networks of others that turn images or texts into vectors.

Their packages are optional, and imported by the function that loads the weights.
"""
