"""The training loop. Read it in this order:

setup, step, loop       build a Trainer from a config, take one step, run from the first step to the last
services                what runs beside the steps: the run's folder, signals, saves, evaluations, measurements
evaluator, run_log      when evaluations are due, and how ranks run them; what a run writes about itself
gradient_guard, kernels    skipped updates; the kernels that training computes with
stop_signals, watchdog  graceful shutdown; hanging ranks
throughput, profiler    the numbers of a log line; where the time of a step goes
anomaly/, preflight/    diagnosis of a step that diverged; the rehearsal before a long run
"""
