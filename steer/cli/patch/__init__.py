"""Verbs that make patches: one file per kind of edit."""
