"""The optimizer and its learning rate. Takes named parameters; knows no model.

optimizer: what the trainer steps and a checkpoint saves, by parameter name. adamw, muon: its two parts. ranks: Muon's
work shared out over ranks. lr_schedule: the rate of each step.
"""
