"""Verbs that find directions and scores in what a model did."""
