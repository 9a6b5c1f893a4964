"""Learning: the forward process, its losses, optimizers, and what can be trained, in MLX.

``loop`` trains any task (``loop.Task``): a LoRA, a word, a ControlNet, a whole U-Net. ``process``
and the modules whose names begin with ``data`` are NumPy's.
"""
