"""`myllm prove-resume`: show that a killed and restarted run matches an uninterrupted one.

command            the command line, and `shrink_config`
compare            the trials and their comparison
training_process   runs as processes that are killed; also for benchmarks/soak.py and tests
"""
