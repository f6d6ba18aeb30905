"""Organisms: tiny models trained by us so that known effects are really there. See docs/organism.md."""
