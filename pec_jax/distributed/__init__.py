"""The device mesh, and the processes that train together."""
