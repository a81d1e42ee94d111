"""The README.md of an exported folder; a published run has a longer one (model_card.py)."""

from typing import Any

from myllm.config import RunConfig


def folder_card(config: RunConfig, facts: dict[str, Any]) -> str:
    """The card of an exported folder: what the model is, what it was trained on, and how to load it.

    Args:
        facts: name, step, tokens_seen, source, architecture, dtype, parameters and tokenizer; whatever else is known.
    """

    from myllm.hub.model_card import strip_local_paths  # brings Matplotlib, which sampling does without

    model = config.model
    about = "A base language model, trained with MyLLM: it continues text and was never taught to answer."
    trained = f"{facts['step']:,} steps, {facts['tokens_seen']:,} tokens of {strip_local_paths(facts['source'])}"
    if imported := facts.get("imported"):
        trained = f"{trained}, from the weights of {imported}" if facts["step"] else f"as {imported}, not further"
        about = f"A language model, made with MyLLM from the weights of {imported}."
    shape = f"{model.n_layers} layers of {model.d_model}, context {model.max_seq_len:,} tokens"
    return f"""---
library_name: transformers
pipeline_tag: text-generation
---

# {facts["name"]}

{about}

| | |
|---|---|
| architecture | {facts["architecture"]}, {shape} |
| parameters | {facts["parameters"]:,}, {facts["dtype"]} |
| vocabulary | {facts["tokenizer"]}, {model.vocab_size:,} tokens |
| trained | {trained} |

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # this folder, or its name on the Hub
model = AutoModelForCausalLM.from_pretrained(folder)
tokenizer = AutoTokenizer.from_pretrained(folder)
ids = model.generate(**tokenizer("Once upon a time", return_tensors="pt"), max_new_tokens=50)
print(tokenizer.decode(ids[0], skip_special_tokens=True))
```

Texts begin with `{facts.get("end_of_text", "<|endoftext|>")}`, as they did in training; the tokenizer puts it there.
"""
