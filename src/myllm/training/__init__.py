"""The training loop and what surrounds it: steps, evaluations, stops, anomalies, preflight."""
