"""Files that change a model (LoRA) or give it words (textual inversion): read, and matched to it.

No backend is known here: the arithmetic is NumPy's, the networks take the results.
"""
