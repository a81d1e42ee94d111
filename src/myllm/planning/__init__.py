"""The cost of a run from its config alone: nothing here imports torch or allocates memory.

- `batch`: batch_tokens as ranks x micro-batch x accumulation steps
- `length`: epochs, steps, warm-up, decay
- `transfer`: rates and weight decay for a run of another length
- `flops`: parameters, FLOPs and moments of a model; `gpu_specs`: peak FLOP/s and memory of GPUs
- `memory_estimate`: peak memory of one rank; `disk`: checkpoints and shards
- `forecast`: all of it for one run (`myllm plan`, `--dry-run`); `hardware_table`: docs/hardware.md
- `config_checks`: every error of a config at once
"""
