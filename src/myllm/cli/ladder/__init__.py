"""`myllm ladder`: compare recipes over sizes and lengths, and fit how many tokens one saves.

command   the command line
plan      recipes, and the config of each cell
rates     learning rates by width and length
search    the best rates of each recipe
budget    the plan in words, and its hours
cells     run the cells, read their results
fit       laws of the loss
analysis  multipliers, their bands and their extrapolation
results   ladder.json
summary   all of it in words
"""
