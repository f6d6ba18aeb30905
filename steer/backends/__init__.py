"""Other engines that a change can run in. Nothing here is imported unless it is asked for."""
