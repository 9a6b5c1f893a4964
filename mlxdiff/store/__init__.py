"""Where models lie: converted folders, recipes, the hub, the catalogue of short names."""
