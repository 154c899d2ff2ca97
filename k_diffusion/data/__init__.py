"""Training data: the data sets that a config can name, and the stream of batches made of them.

What becomes of a batch belongs to `training`.
"""
