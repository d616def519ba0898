"""`python -m smallm COMMAND`: the same as the console script `smallm`."""

from smallm.cli.main import main

if __name__ == "__main__":
    raise SystemExit(main())
