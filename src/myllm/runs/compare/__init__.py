"""A page that compares runs: `myllm report A B`. It needs no other file and no network.

page          write_comparison: what report.html (a Jinja template) shows
curves        the numbers that charts.js draws
tables        summaries, evaluations, settings that differ, and samples, side by side
"""
