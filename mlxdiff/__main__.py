"""``mlxdiff`` and ``python -m mlxdiff``: handle signals first, then import the rest."""

from mlxdiff.machine import stopping

stopping.own_process()

from mlxdiff.cli import main  # noqa: E402 - signals come first

if __name__ == "__main__":
    main(prog_name="mlxdiff")
