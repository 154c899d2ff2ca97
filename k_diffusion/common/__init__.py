"""What any part of the package may use: tensors, images, files, modules, text, options, seeds.

A module here imports nothing of the package but its neighbours.
"""
