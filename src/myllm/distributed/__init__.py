"""The processes of a run and their devices.

launcher          what torchrun tells a process, and how a process exits; elastic: torchrun that preserves exit codes
collectives       DistContext, the process group, collectives
parallelize       DDP, FSDP2 and torch.compile around the model
precision         compute type, TF32, deterministic steps
device_info       names and speed of devices, GPUs that torch cannot use
cpu_threads       cores and threads of this process; library_env: environment variables for libraries
standard_streams  output that never ends a run; terminal: whether somebody watches
network_check     all-reduces with known sums
"""
