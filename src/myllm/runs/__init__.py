"""A run on disk: its folder, logs, heartbeat, history and reference curve. Imports no torch until asked."""
