"""The command line: one file per verb, its module imported only when the verb is called."""

from __future__ import annotations

from steer.cli.app import main as main
