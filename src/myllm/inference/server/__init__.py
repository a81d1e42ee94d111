"""`myllm serve`: http serves page.html and OpenAI's API, security checks headers."""
