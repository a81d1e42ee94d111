"""Text from a trained model: loading, generation, sampling, chat, int8."""
