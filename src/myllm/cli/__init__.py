"""Command lines: pretrain.py and `myllm COMMAND`. Nothing below imports these."""
