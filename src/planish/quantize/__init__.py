"""Quantization to int8 after training: observers choose ranges, placement chooses where, apply inserts, options predict the loss."""
