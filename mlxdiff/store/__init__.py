"""Model storage: converted folders, quantization recipes, the hub, the catalogue of short names."""
