"""What computes: NumPy, or MLX (only this package imports mlx). Importing it loads nothing.

``protocol`` says what a backend offers; ``numpy`` and ``mlx`` are the two.
"""
