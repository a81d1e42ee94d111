"""What a run costs, from its config alone: batch arithmetic, FLOPs, memory, time. Imports no torch."""
