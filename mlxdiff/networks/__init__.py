"""What a network is: its config, its parameters, its cost."""
