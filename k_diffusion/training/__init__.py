"""Training: small modules that train.py reads like a story.

args, launch, setup: what is asked for, and by how many processes it is done; data, datasets: what
it learns from; optim: what moves the weights; state, checkpoint, resume: what going on needs; step:
one optimizer step; demo, log, signals: what a person sees and says.
"""
