"""The report of a run: figures and one HTML page that needs no other file.

html          write_report: what report.html (a Jinja template) and report.css show
evaluations   tables of evaluations, those of `myllm eval` too; values: numbers and settings as text
page          templates, styles and figures of a page that needs no other file; other reports use it too
plots         the figures, one function each
axes          lines, axes and labels that the figures share; plots.mplstyle has their looks
"""
