"""Runtimes: one file for each, all behind the protocol in `contract.py`; found by name through `planish.registry`."""
