"""Steps with bad numbers: report, dump, diagnose, replay."""
