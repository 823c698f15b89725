"""Aggregation that withstands adversarial or broken rows, and what prepares rows for it."""
