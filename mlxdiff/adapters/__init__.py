"""Files that change a model: read, matched to it, and turned into what is added to its weights.

No backend is known here: the arithmetic is NumPy's, the networks take the results.
"""
