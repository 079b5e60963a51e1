"""``python -m pipeinfer_dask``: the command line."""

from pipeinfer_dask.cli import main

if __name__ == "__main__":
    main(prog_name="pipeinfer")
