"""What a model can do: validation, HellaSwag, cloze, perplexity, speed, samples."""
