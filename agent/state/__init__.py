"""What should be and what is: immutable lookups, and the steps from one to the other."""
