"""A short rehearsal before a long run (`myllm preflight`), and train.micro_batch_size auto.

- `rehearsal`: real steps, evaluations, a save and a load, timed
- `summary`: what that means for the whole run, and the problems that would stop it
- `batch_size`: the largest micro-batch that fits, by trial
- `device_memory`: peaks and limits of memory
- `data_and_disk`: the text and the disk space of a run
- `scratch`: a temporary folder with random data
"""
