"""`myllm serve`: a page in the browser to write with a model."""
