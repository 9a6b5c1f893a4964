"""The networks in NumPy: the oracle for MLX, the documentation, and the path without MLX.

Mirrors ``mlxdiff.models`` file by file and class by class; a test compares the two.
"""
