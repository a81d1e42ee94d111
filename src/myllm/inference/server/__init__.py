"""`myllm serve`: http serves page.html, request parses its requests, events streams tokens, security checks headers."""
