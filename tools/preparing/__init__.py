"""What tools/prepare.py is made of: one module a data set, and what they share."""
