"""Training: small modules that train.py reads like a story.

args and setup read the command line and start the processes; optim, lr_schedules, ema and power_ema
move the weights and average them, posthoc averages after the run; state, run_files and resume keep
what a resumed run needs; step is one optimizer step; demo, log and signals report and take orders;
dry_run estimates the cost.
"""
