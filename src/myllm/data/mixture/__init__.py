"""Training on several data sets at once.

spec              how a mixture is written: names and weights
interleaving      which component each sequence of a run comes from: a pure function
mixed_dataset     the components together, where a single data set would stand; their order; epochs
component_losses  the training loss of each
"""
