"""Make `.venv-oracle`, or repair it: `python3.11 constraints/oracle.py` (what `make oracle` runs).

It holds mergekit, against which merging is tested; what mergekit itself needs is read from `.venv`, whose pins satisfy it.
"""

from beside import Beside

if __name__ == "__main__":
    Beside("oracle", "mergekit").main()
