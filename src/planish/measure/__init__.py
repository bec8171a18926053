"""Measuring: every figure comes from a child process that holds one exported model. No torch is imported here."""
