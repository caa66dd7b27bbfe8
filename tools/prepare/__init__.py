"""What tools.prepare is made of, one module a data set, and tools.shards; and what they share."""
