"""TensorRT plans built on the device from a bundle. Nothing is here yet: see CHANGELOG.md."""
