"""The training loop. Read it in this order:

setup, step, loop       build a Trainer from a config, take one step, run from the first step to the last
context, services       what all parts share; what runs beside the steps (folder, signals, saves, evaluations)
evaluator, run_log      when evaluations are due, and how ranks run them; what a run writes about itself
gradient_guard, restore, kernels, gc_schedule    skipped updates, resuming, kernels, garbage collection
stop_signals, watchdog  graceful shutdown; hanging ranks
throughput, profiler    the numbers of a log line; where the time of a step goes
anomaly/, preflight/    diagnosis of a step that diverged; the rehearsal before a long run
"""
