"""The optimizer and its learning rate. Takes named parameters; knows no model.

adamw: AdamW with decay groups, a schedule, and state saved by parameter name. lr_schedule: the rate of each step.
"""
