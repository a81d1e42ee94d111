"""A short rehearsal before a long run: memory, time, data, disk."""
