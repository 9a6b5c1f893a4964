"""Run the command ``mlxdiff`` as ``python -m mlxdiff``."""

from mlxdiff.cli import main

if __name__ == "__main__":
    main(prog_name="mlxdiff")
