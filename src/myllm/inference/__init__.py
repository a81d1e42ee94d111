"""Text from a trained model.

load              find and load a model with its tokenizer; int8 quantizes its weights
initial_weights   into a new run, which trains them further
generate          the engine: prefill, choose, decode_step; cpu_decode makes its steps cheaper on CPUs
sampling          choose a token: filters and the draw; sampling_params are their settings
completion        text from text; samples reads prompts and writes the results
chat, server      the terminal and the browser
"""
