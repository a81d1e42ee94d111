"""`myllm runs`: the runs of this machine, and what to do with those that are over.

command   the command lines, and the question before anything is removed
report    the page of a run, or of several
watch     serve that page while the runs train
datasets  prepared data sets, and the runs that use them
"""
