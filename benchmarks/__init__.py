"""Measurements against plain constructions, each in processes of its own."""
