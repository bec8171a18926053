"""Which plans to try: decisions, their predicted losses and costs as one factor graph, and the methods that search it."""
