"""What tools/prepare.py is made of, one module a data set, and tools/make_shards.py; and what they share."""
