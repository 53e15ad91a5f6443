"""The command `mergeloom`, also as `python -m mergeloom`."""

from flows.cli.main import main

if __name__ == "__main__":
    main(prog_name="mergeloom")
