"""What a compilation will take, and how long it may learn, known before it starts."""
