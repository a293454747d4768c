"""Bundles: what ships."""
