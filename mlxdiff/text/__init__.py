"""Prompts, and the text encoders that read them."""
