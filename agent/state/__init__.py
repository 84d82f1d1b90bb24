"""What should be and what is: immutable states, and the steps from one to the other."""
