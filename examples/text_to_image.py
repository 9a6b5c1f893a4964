"""Turn a prompt into a picture: the whole library in five lines."""

import mlxdiff

pipe = mlxdiff.load()  # the built-in model; or give a folder or a hub id
result = pipe.generate("a small red circle left of a large blue square", seed=0, guidance=4)
result.save("circle.png", overwrite=True)
print(f"circle.png, seed {result.seeds[0]}, {sum(result.timings['steps']):.2f} s in the U-Net")
