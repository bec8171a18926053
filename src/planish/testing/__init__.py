"""Contract tests that authors of plug-ins run too, and the faulty runtime that planish tests its own patience with."""
