"""AdamW and its learning-rate schedule. Takes named parameters; knows no model."""
