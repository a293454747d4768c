"""TensorRT plans built on the device from a bundle, and what is in them."""
