"""Experiment trackers: readers of a run's metrics.jsonl that pass its rows on, in a process of their own.

destinations   TensorBoard, Weights & Biases, trackio, MLflow behind one interface
rows           which rows a tracker has, and which figures of a row it gets
background     one process for each tracker of a run, and `myllm runs sync`
"""
