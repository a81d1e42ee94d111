"""A run's folder: everything that training writes and reports read.

run_dir           claim, resume or start over a run
logs              metrics.jsonl, log.txt, environment.json; trackers/: TensorBoard, Weights & Biases and others
heartbeat         heartbeat.json and `myllm status`
history           read what a run has recorded; report/ draws it, compare/ several runs
eval_results      eval.json, the file of `myllm eval`
reference_curve   compare with a published run
catalog           all runs: what they are, how far they came, what they take on the disk
lifecycle         delete, rename and archive runs; saved_settings: what a resumed run keeps
step_process      a process beside training; mirror/: copies of checkpoints elsewhere
"""
