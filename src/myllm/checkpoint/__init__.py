"""What a run saves and restores: format, hashes, sharded weights, asynchronous saves, retention."""
