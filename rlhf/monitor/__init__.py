"""Monitoring: metrics.jsonl, console, TensorBoard, Weights & Biases and the HTML report."""
