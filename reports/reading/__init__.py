"""Reads what a run left behind."""
