"""Text generation: sampling, decoders, and a program as a model of transformers."""
