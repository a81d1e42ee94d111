"""Evaluations: validation, public tasks, perplexity, speed, quality of samples.

registry        the table of evaluations: how each is built, run and turned into metrics
validation      the held-out text: its first sequences, and which data set has it
perplexity      loss, bits per byte, accuracy and calibration on given tokens
tasks           the public tasks: HellaSwag, ARC, PIQA, OpenBookQA, WinoGrande, LAMBADA; examples reads their rows
choice          scores their questions
cloze           multiple choice made from held-out text
speed, sample_quality, quantization    decode speed, statistics of samples, the cost of int8 weights
"""
