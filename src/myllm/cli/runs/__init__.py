"""`myllm runs`: the runs of this machine, and what to do with those that are over.

command   the command lines
confirm   ask before anything is removed
"""
