"""The stages of gpu_check.py: one function a stage, which yields what it finds as it finds it (frame.Check)."""
