"""`myllm tune`: search for the learning rate and other settings of a preset.

command      the command line and the plan
space        the settings that are searched, and their ranges
search       the trials: rungs, Optuna's ask and tell, the finalists on fresh seeds
fit          a parabola per setting, and what it says in words
report       the page and tune.json
range_test   `--range-test`: one run with a rising rate
"""
