"""What the benchmark scripts share: timing, cases, budgets, and the pages that show results.

A script that one runs lies in the folder above.
"""
