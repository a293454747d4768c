"""Reads a film with a bundle on the device. Imports no torch, no onnx and no polygraphy."""
