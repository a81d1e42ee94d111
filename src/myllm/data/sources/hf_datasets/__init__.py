"""Whatever the package `datasets` opens, as a list of files that are prepared like any other.

name      datasets:NAME[:CONFIG][:SPLIT] taken apart
listing   which files `datasets` opens for it, and the columns of their rows; cached. The rows of one file
"""
