"""Networks: their configs, the networks themselves, their parameters and their cost."""
