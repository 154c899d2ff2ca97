"""Training: small modules that train.py reads like a story.

data, datasets: what it learns from; optim: what moves the weights; state, checkpoint: what
resuming needs; step: one optimizer step; demo, log, signals: what a person sees and says.
"""
