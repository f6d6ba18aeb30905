"""`python -m steer.cli`: the same program where the script is not on the path."""

from steer.cli import main

main()
