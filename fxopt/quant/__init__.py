"""Quantization as a measured decision: observing layers, tables of what was observed, and which layers to quantize."""
