"""What a compiled train step costs: operations, collectives, memory, and a bound on its time."""
