"""`myllm ladder`: compare recipes over sizes and lengths, and fit how many tokens one saves.

command, plan              the command line, the config of each cell
rates, search              rates by width and length, and how they are found
cells                      run the cells, how long that takes, their results, ladder.json
fit, analysis, ablation    laws of the loss, multipliers and their bands, one part off at a time
plots, report              all of it in words and figures
"""
