"""Run the command line as ``python -m expertsteer``."""

from expertsteer.cli.app import main

main()
