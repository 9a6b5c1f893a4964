"""Time a model on this machine, and diagnose the machine."""
