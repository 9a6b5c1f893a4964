"""Parse prompts and encode them with a model's text encoders."""
