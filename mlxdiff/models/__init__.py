"""The networks in MLX. Importing this package loads nothing; ``models.backend`` is the way in.

Mirrors ``mlxdiff.reference`` file by file and class by class; a test compares the two.
"""
