"""What any part of the package may use, from tensors and images to text, options and threads.

A module here imports nothing of the package but its neighbours.
"""
