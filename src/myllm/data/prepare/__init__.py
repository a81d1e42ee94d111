"""Text to shards: download, tokenize in parallel processes, hold out validation, write, hash.

prepare       the entry: resolve, plan, tokenize, write shards, write the manifest
spec          what decides the bytes, and so the folder's name; estimate, disk_space: what it costs
work_items    files in pieces for a worker, and how it tokenizes them; workers, scheduler: who does what when
shard_plan    which documents go where; shard_writer: shards and manifest on the disk
work_dir      files of an unfinished preparation; progress: its bar
background    a preparation beside training; multi_machine: on several machines; repair: of damaged shards
"""
