"""What the scripts at the root of the repository do, importable.

A module here adds flags to a parser and acts on them; the script itself only calls it.
"""
