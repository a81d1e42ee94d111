"""`myllm prove-resume`: kill and restart a small run, and compare it with an undisturbed one."""
