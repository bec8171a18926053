"""Ways for units to leave a net, one file each; found by name in the registry."""
