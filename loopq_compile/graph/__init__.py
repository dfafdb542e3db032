"""What a graph is: its state, signature, loops, scheme, shapes, and how it is printed, checked and changed."""
