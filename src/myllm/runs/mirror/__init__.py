"""Copies of a run's checkpoints at a URL, from which another machine resumes (`checkpoint.mirror`).

store     URL/RUN_NAME through fsspec: which checkpoints are whole, and reading, writing and removing them
upload    the process beside training that copies new checkpoints
fetch     at the start: get the newest whole checkpoint if this machine has none as new
"""
