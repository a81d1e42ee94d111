"""What a model can do.

registry        the table of evaluations: how each is built, run and turned into metrics
results         eval.json, the file of `myllm eval`
validation      the held-out text: its first sequences, and which data set has it
perplexity      loss, bits per byte, accuracy and calibration on given tokens
hellaswag       multiple choice, by two protocols; hellaswag_data reads the examples
cloze           multiple choice made from held-out text
speed, sample_quality, quantization    decode speed, statistics of samples, the cost of int8 weights
"""
