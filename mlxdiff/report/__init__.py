"""What this machine makes of a model: times, and advice."""
