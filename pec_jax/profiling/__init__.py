"""What a step costs: ahead-of-time compilation, FLOPs, collectives, chips."""
