"""Pretrained weights -> MLX arrays. Imported as ``mlxdiff.convert``."""

if __name__ != "mlxdiff.convert":
    raise ImportError("this folder is mlxdiff.convert: install mlxdiff (pip install -e .) and import it by that name")
