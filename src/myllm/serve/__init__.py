"""`myllm serve`: a page in the browser to write with a model.

    page.html ─▶ server, address (who may ask, one at a time) ─▶ asked (what is asked) ─▶ written (tokens, as they come)

Standard library alone: one page, two addresses behind it, no build step, nothing loaded from elsewhere.
"""
