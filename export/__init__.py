"""From a checkpoint to a bundle: ONNX, precision in the graph, parity."""
