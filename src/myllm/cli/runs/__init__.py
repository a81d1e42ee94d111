"""`myllm runs`: the runs of this machine, and what to do with those that are over.

command   the command lines
datasets  prepared data sets, and the runs that use them
confirm   ask before anything is removed
"""
