"""From text to batches. Imports no model.

sources/        where text comes from: catalog, Hub listings, downloads, readers, cleaning
tokenizer/      GPT-2's tokenizer, tokenizer.json files, training one
prepare/        text to shards in parallel processes
mixture/        several data sets in given shares
dataset         a prepared data set: folder and manifest; token_stream: its shards; preparation_lock: who prepares it
sampler         which sequence comes when: a pure function of data set, seed and epoch; order: what the loader asks
dataloader      batches for one rank, read ahead; transfer: on their way to the device
sample_digest   a hash of everything a run has trained on
inspect         documents and sequences as text; settings: what a data set was prepared with
"""
