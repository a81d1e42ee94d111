"""Processes and devices: what the launcher said, collectives, DDP and FSDP, precision, CPU threads."""
