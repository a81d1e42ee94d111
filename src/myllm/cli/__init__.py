"""The command line: one module per command or group of commands.

main     `myllm COMMAND`: the table of commands, and report, doctor and status
launch   command lines that begin with a preset: pretrain.py, plan, preflight
parse    how tyro reads options and shows help
trials   training runs that a command starts and compares
errors   one message and one exit code for every error
"""
