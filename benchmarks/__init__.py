"""Latency, throughput and memory of a bundle as it ships."""
