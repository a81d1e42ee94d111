"""The report of a run: figures and one HTML page that needs no other file.

html     write_report: what report.html (a Jinja template) and report.css show
plots    the figures, one function each
axes     lines, axes and labels that the figures share; plots.mplstyle has their looks
"""
