"""Studies: the trials of one job in a database that survives being killed."""
