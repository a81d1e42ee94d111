"""What a run saves and restores.

state           TrainState: everything but tensors that a restart needs
format          write and read checkpoints: Snapshot, Checkpoint, write_checkpoint, load_latest
layout          names of folders and files
dcp             sharded tensors on disk, by torch.distributed.checkpoint; into a model and an optimizer
async_saver     saves in the background
integrity       manifests and hashes; retention: which checkpoints stay, disk space
locate          the checkpoint that a user names; rng: random number generators
"""
